"""The progress of a long stage: a bar on a terminal; in a log file periodic lines with the remaining time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Stage", "duration"]

T = TypeVar("T")
_PARTS = 20  # approximate number of lines of a long stage
_LEAST, _MOST = 10.0, 300.0  # seconds between two lines


def duration(seconds: float) -> str:
    """A readable time: `8 s`, `2 min 30 s`, `1 h 40 min`. Below a second it is `1 s`."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min" + (f" {rest} s" if rest and minutes < 10 else "")
    hours, rest = divmod(round(whole / 60), 60)
    return f"{hours} h" + (f" {rest} min" if rest else "")


def _draws(console: Console) -> bool:
    """Whether a bar is visible. With FORCE_COLOR rich takes any file for a terminal; on a dumb one it draws nothing."""
    isatty = getattr(console.file, "isatty", None)
    return console.is_interactive and isatty is not None and bool(isatty())


class Stage:
    """A stage of a job, made of consecutive parts. Use it in a `with` statement.

    On a terminal it shows a bar, which disappears at the end. Elsewhere, and on a dumb terminal, it prints lines. The
    first one comes when a part is done (and `after` is over), so the first estimate is as early as possible. The next
    ones come by time: about twenty over the whole stage, at least ten seconds apart and at most five minutes, if parts
    are done that often. The last part has a line if another one had, or `after` is over.

    Args:
        console: for the output.
        title: the name of the stage, for example `training`.
        total: the number of parts.
        done: the number of parts that an earlier run has done.
        unit: the name of a part.
        after: no line before this many seconds: a shorter stage prints none.
    """

    def __init__(
        self, console: Console, title: str, total: int, *, done: int = 0, unit: str = "step", after: float = 0.0
    ) -> None:
        self._console, self._title, self._unit = console, title, unit
        self._total, self._first, self._done, self._after = total, done, done, after
        self._begun = time.perf_counter()
        self._said: float | None = None  # the time of the last line
        self._bar: Progress | None = None

    def __enter__(self) -> Stage:
        self.open()
        return self

    def open(self) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()
        if _draws(self._console):
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._bar.add_task(self._title, total=self._total, completed=self._done, note="")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def reached(self, done: int, note: str = "") -> None:
        """Show the number of finished parts, earlier runs' included, with a note such as the loss."""
        ended = self._done >= self._total
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
        elif self._due(last=done >= self._total) and not ended:
            self._say(f"{self._unit} {done} of {self._total}", note)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Iterate over items, each of which is a part, done when the next one is requested."""
        for item in items:
            yield item
            self.reached(self._done + 1)

    def begins(self, what: str) -> None:
        """Show the next part before it is done."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], note=what)
        elif self._due():
            self._say(f"{self._unit} {self._done + 1} of {self._total}", what)

    def left(self) -> float | None:
        """The remaining seconds at the present speed; None before the first part is done."""
        own = self._done - self._first
        if own <= 0:
            return None
        return (time.perf_counter() - self._begun) / own * (self._total - self._done)

    def _due(self, last: bool = False) -> bool:
        now = time.perf_counter()
        if self._said is None:
            return now - self._begun >= self._after
        left = self.left()
        whole = now - self._begun + (0.0 if left is None else left)
        return last or now - self._said >= min(max(_LEAST, whole / _PARTS), _MOST)

    def _say(self, where: str, note: str) -> None:
        self._said = time.perf_counter()
        left = self.left()
        words = [part for part in (note, f"about {duration(left)} left" if left else "") if part]
        text = f"{self._title}, {where}" + (f": {', '.join(words)}" if words else "")
        self._console.print(escape(text), highlight=False, soft_wrap=True)
