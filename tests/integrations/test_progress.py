"""How stages show how far they are: lines by time in a log, a bar on a terminal; other libraries' bars in no log."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub.utils as hub
import pytest
import tiny_folders
import torch
import tqdm.auto
import tqdm.std
from places import ROOT
from rich.console import Console
from torch import nn
from transformers.utils import logging

from benchmarks import runs
from benchmarks.step import growth
from red_kernels import cli
from red_kernels.finetune import measure
from red_kernels.finetune.base_dtype import BaseDtype
from red_kernels.support import progress as _progress
from red_kernels.support.bars import bars_on_terminals_only
from red_kernels.support.base_models import quietly
from red_kernels.support.progress import Stage, duration


class Clock:
    """Stands for the module `time` in `_progress`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(_progress, "time", made)
    return made


def lines(clock: Clock, total: int, seconds: float | Callable[[int], float], **options: Any) -> list[tuple[float, str]]:
    """What a stage in a log says, and when."""
    text = io.StringIO()
    found: list[tuple[float, str]] = []
    console = Console(file=text, width=40)  # no line is broken where the file is narrow
    done = options.get("done", 0)
    with Stage(console, "training", total, **options) as stage:
        for number in range(done + 1, total + 1):
            clock.now += seconds(number) if callable(seconds) else seconds
            stage.reached(number, "loss 1.5")
            if text.getvalue():
                found += [(clock.now, line) for line in text.getvalue().splitlines()]
                text.seek(0)
                text.truncate()
    assert text.getvalue() == ""
    return found


# ---- a stage in a log


def test_the_first_line_comes_after_the_first_part(clock: Clock) -> None:
    first, *_, last = lines(clock, 30, 60.0)
    assert first == (60.0, "training, step 1 of 30: loss 1.5, about 29 min left")
    assert last == (1800.0, "training, step 30 of 30: loss 1.5")


@pytest.mark.parametrize(
    ("total", "seconds", "least", "most"),
    [
        (30, 0.01, 2, 2),  # a run of less than a second: the first and the last
        (30, 6.0, 15, 17),  # ten seconds apart
        (30, 60.0, 16, 30),
        (100_000, 0.36, 115, 125),  # ten hours in tiny steps: five minutes apart
        (10_000, 36.0, 1100, 1250),  # a hundred hours: every five minutes
        (3, 3600.0, 3, 3),
        (1, 5.0, 1, 1),
    ],
)
def test_lines_come_by_time(clock: Clock, total: int, seconds: float, least: int, most: int) -> None:
    found = lines(clock, total, seconds)
    assert least <= len(found) <= most
    apart = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(found)]
    assert all(seconds >= 9.99 for seconds in apart[:-1])
    assert all(each <= 300 + 2 * seconds for each in apart)
    assert "left" not in found[-1][1]


def test_the_time_left_is_that_of_this_run(clock: Clock) -> None:
    """A resumed run counts its own steps only, and the estimate follows the speed."""
    found = lines(clock, 100, lambda number: 10.0 if number <= 95 else 40.0, done=90)
    assert found[0] == (10.0, "training, step 91 of 100: loss 1.5, about 1 min 30 s left")
    assert found[5][1] == "training, step 96 of 100: loss 1.5, about 1 min left"


def test_a_short_stage_says_nothing(clock: Clock) -> None:
    assert lines(clock, 12, 0.4, after=5.0) == []
    found = lines(clock, 12, 2.0, after=5.0)
    assert found[0][1] == "training, step 3 of 12: loss 1.5, about 18 s left"
    assert found[-1][1] == "training, step 12 of 12: loss 1.5"


def test_items_are_parts(clock: Clock) -> None:
    text = io.StringIO()
    with Stage(Console(file=text), "tokenising", 4, unit="document") as stage:
        for part in ("ab", "cd"):
            for _ in stage.over(part):
                clock.now += 15.0
    assert text.getvalue().splitlines() == [
        "tokenising, document 1 of 4: about 45 s left",
        "tokenising, document 2 of 4: about 30 s left",
        "tokenising, document 3 of 4: about 15 s left",
        "tokenising, document 4 of 4",
    ]


def test_what_begins_is_said_before_it_is_done(clock: Clock) -> None:
    text = io.StringIO()
    with Stage(Console(file=text), "growth [x]", 3, unit="case") as stage:
        stage.begins("width, [64]")
        assert text.getvalue() == "growth [x], case 1 of 3: width, [64]\n"
        clock.now += 120.0
        stage.reached(1)
        stage.begins("width, 128")
    assert text.getvalue().splitlines()[1:] == ["growth [x], case 1 of 3: about 4 min left"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((0.0, "1 s"), (0.6, "1 s"), (59.4, "59 s"), (59.6, "1 min"), (150, "2 min 30 s"), (599, "9 min 59 s")),
        *((600, "10 min"), (3599.4, "59 min"), (3600, "1 h"), (6000, "1 h 40 min"), (360_000, "100 h")),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ---- the speeds, the evaluation, and the look before the first step


def test_the_comparison_of_speeds_says_how_long_it_takes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "time", clock)

    def step() -> int:
        clock.now += 20.0
        return 100

    text = io.StringIO()
    speeds = measure.compare_speed({"a": step, "b": step}, torch.device("cpu"), console=Console(file=text))
    assert speeds["a"].samples == (5.0,) * 3
    assert text.getvalue().splitlines() == [
        "comparing speeds, round 1 of 3: about 1 min 20 s left",
        "comparing speeds, round 2 of 3: about 40 s left",
        "comparing speeds, round 3 of 3",
    ]


def test_rounds_beyond_those_expected_are_not_said(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first steps took longer than the others: the last line comes once."""
    monkeypatch.setattr(measure, "time", clock)
    taken = itertools.chain([30.0], itertools.repeat(6.0))

    def step() -> int:
        clock.now += next(taken)
        return 100

    text = io.StringIO()
    speeds = measure.compare_speed({"a": step}, torch.device("cpu"), console=Console(file=text))
    assert len(speeds["a"].samples) == 7
    assert text.getvalue().splitlines() == [
        "comparing speeds, round 1 of 3: about 12 s left",
        "comparing speeds, round 3 of 3",
    ]


class Slow(nn.Module):
    """A language model of one vector that takes its time for each call and each token."""

    def __init__(self, clock: Clock, call: float, token: float) -> None:
        super().__init__()
        self.vector, self.frozen = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False)
        self.dropout = nn.Dropout(0.5)
        self.clock, self.call, self.token, self.calls = clock, call, token, list[int]()

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        self.calls.append(input_ids.numel())
        self.clock.now += self.call + self.token * input_ids.numel()
        hidden = self.dropout(self.vector * self.frozen) * input_ids[..., None]
        return SimpleNamespace(loss=hidden.sum(), logits=hidden)


@pytest.mark.parametrize(
    ("call", "token", "calls"),
    [
        (0.0, 1e-6, [4, 4, 16, 64, 100]),
        (0.05, 0.02, [4, 4, 16, 64]),
        (0.0, 0.2, [4, 4, 16]),  # 5 tokens a second: the look takes five
        (5.7, 0.02, [4, 4, 16]),  # threads that wait for each other: no more than three calls
        (2.0, 0.01, [4, 4, 16, 64, 100]),
    ],
)
def test_a_first_look_is_short(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, call: float, token: float, calls: list[int]
) -> None:
    monkeypatch.setattr(measure, "time", clock)
    model = Slow(clock, call, token).train()
    batch = {"input_ids": torch.ones(3, 100), "labels": torch.ones(3)}
    state = torch.get_rng_state()
    assert measure.first_look(model, batch, 1024) == pytest.approx(call + 1024 * token)
    assert model.calls == calls
    assert model.training
    assert model.vector.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_first_look_at_a_short_row(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one size only: then each token takes its share of the call."""
    monkeypatch.setattr(measure, "time", clock)
    model = Slow(clock, 1.0, 0.5)
    assert measure.first_look(model, {"input_ids": torch.ones(1, 2), "labels": torch.ones(1)}, 8) == pytest.approx(8.0)
    assert model.calls == [2, 2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_folders.llama_and_text(tmp_path_factory.mktemp("tiny"))


def words(folders: dict[str, Path], output: Path, *more: str) -> list[str]:
    return [
        *("finetune", "--model", str(folders["llama"]), "--data", str(folders["text"]), "--output", str(output)),
        *("--length", "16", "--steps", "30", "--no-compare", "--device", "cpu", "--dtype", "fp32", *more),
    ]


def test_finetune_says_how_long_a_slow_step_takes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step: each of 64 tokens takes two seconds, and 20 of 30 steps are left in the second run."""
    from red_kernels.finetune import job as finetune

    monkeypatch.setattr(finetune, "first_look", lambda model, batch, tokens: 2.0 * tokens)
    assert cli.main(words(folders, tmp_path / "out", "--steps", "3")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    said = "A look at a few tokens: a step of 64 tokens will take about 2 min 8 s, the training 6 min 24 s"
    assert said in shown
    assert shown.index(said) < shown.index("training, step 1 of 3")
    monkeypatch.setattr(finetune, "first_look", lambda model, batch, tokens: 0.01)
    assert cli.main(words(folders, tmp_path / "out", "--steps", "3", "--overwrite")) == 0
    assert "A look" not in capsys.readouterr().out  # the first step's own line comes as soon


# ---- bars of other libraries


def states() -> tuple[Any, ...]:
    return (
        vars(tqdm.std.tqdm)["__init__"],
        logging.is_progress_bar_enabled(),
        hub.are_progress_bars_disabled(),
        datasets.are_progress_bars_disabled(),
    )


class Screen(io.StringIO):
    """A standard error that may be a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "variables", "bar"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),  # rich would show nothing at all there
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),  # colours are wanted, not a bar over and over
        (False, {"TERM": "xterm", "TTY_COMPATIBLE": "1"}, False),
    ],
)
def test_a_bar_is_drawn_where_it_is_seen(terminal: bool, variables: dict[str, str], bar: bool) -> None:
    screen = Screen(terminal)
    with Stage(Console(file=screen, _environ=variables, width=100), "training", 3) as stage:
        stage.reached(1)
    assert ("\x1b[" in screen.getvalue()) == bar
    assert ("training, step 1 of 3" in screen.getvalue()) != bar


BARS: dict[str, Callable[[], Any]] = {
    "tqdm": lambda: tqdm.std.tqdm(range(3), desc="drawn"),
    "tqdm.auto": lambda: tqdm.auto.tqdm(range(3), desc="drawn"),
    "tqdm, positional": lambda: tqdm.std.tqdm(range(3), "drawn", 3),
    "transformers": lambda: logging.tqdm(range(3), desc="drawn"),
    "datasets": lambda: datasets.utils.tqdm(range(3), desc="drawn"),
    "datasets, on": lambda: datasets.utils.tqdm(range(3), desc="drawn", disable=False),
    "hub": lambda: hub.tqdm(range(3), desc="drawn"),
    "hub, on": lambda: hub.tqdm(range(3), desc="drawn", disable=False),
}


@pytest.mark.parametrize("bar", BARS)
@pytest.mark.parametrize("terminal", [True, False])
def test_other_libraries_draw_on_terminals_only(monkeypatch: pytest.MonkeyPatch, bar: str, terminal: bool) -> None:
    before = states()
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with bars_on_terminals_only():
        list(BARS[bar]())
    assert ("drawn" in screen.getvalue()) == terminal
    assert states() == before
    list(BARS[bar]())
    assert "drawn" in screen.getvalue()  # turned on again


@pytest.mark.parametrize("off", ["transformers", "hub", "datasets", ""])
def test_what_was_off_stays_off(monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    monkeypatch.setattr(sys, "stderr", Screen(False))
    switches = {
        "transformers": (logging.disable_progress_bar, logging.enable_progress_bar),
        "hub": (hub.disable_progress_bars, hub.enable_progress_bars),
        "datasets": (datasets.disable_progress_bars, datasets.enable_progress_bars),
    }
    disable, enable = switches.get(off, (lambda: None, lambda: None))
    disable()
    try:
        before = states()
        for context in (bars_on_terminals_only, quietly):
            with contextlib.suppress(KeyError), context(), bars_on_terminals_only():  # nested, and failing
                assert not logging.is_progress_bar_enabled()
                raise KeyError
            assert states() == before
    finally:
        enable()


def test_a_bar_of_its_own_file_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever says `disable=False`, or where a bar goes that is a terminal, has it."""
    monkeypatch.setattr(sys, "stderr", Screen(False))
    other = Screen(True)
    with bars_on_terminals_only():
        list(tqdm.std.tqdm(range(3), desc="drawn", file=other))
        list(tqdm.std.tqdm(range(3), "asked", 3, True, None, None, 0.1, 10.0, None, None, False))
    assert "drawn" in other.getvalue()
    assert "asked" in sys.stderr.getvalue()  # type: ignore[attr-defined]


# ---- the command, in a log and on a terminal

DRAWS = """
import sys, time
import tqdm
from red_kernels import cli
from red_kernels.integrations import base_models, finetune

load = base_models.load_base
def drawing(*arguments, **options):
    for _ in tqdm.tqdm(range(50), desc="Converting", mininterval=0):
        pass
    return load(*arguments, **options)
finetune.load_base = drawing
sys.exit(cli.main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}


def test_in_a_pipe_no_bar_is_drawn(folders: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRAWS, *words(folders, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    for stream in (done.stdout, done.stderr):
        assert "\r" not in stream
        assert "\x1b" not in stream
        assert "Converting" not in stream
    stages = ["Base model's dtype: fp32", "Loading the data", "Loading the model", "training, step 1 of 30: loss"]
    places = [done.stdout.index(stage) for stage in stages]
    assert places == sorted(places)
    steps = [int(number) for number in re.findall(r"training, step (\d+) of 30", done.stdout)]
    assert steps[0] == 1
    assert steps[-1] == 30
    assert len(steps) <= 30
    assert re.search(r"step 1 of 30: loss [\d.]+, [\d,]+ tokens/s, about .* left", done.stdout)


def test_on_a_terminal_bars_are_drawn(folders: dict[str, Path], tmp_path: Path) -> None:
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 40, 160, 0, 0))  # tqdm draws nothing without any columns
    command = [sys.executable, "-c", DRAWS, *words(folders, tmp_path / "out")]
    variables = {**environment(), "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(command, stdout=other, stderr=other, stdin=other, env=variables)
    os.close(other)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    assert process.wait(timeout=300) == 0, shown.decode()
    text = shown.decode()
    assert "Converting" in text
    assert "training" in text
    assert "━" in text  # rich's bar
    assert "training, step 1 of 30" not in text  # a log's line


def test_the_suite_says_its_cases(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is said before it is done, and the rest by time; a finished folder says nothing."""

    def measured(case: dict[str, Any], settings: growth.Settings, run: runs.Run) -> dict[str, Any]:
        clock.now += 25.0
        return {"seconds": {}}

    monkeypatch.setattr(growth, "measure", measured)
    monkeypatch.setattr(growth, "print_results", lambda content, console: None)

    def said(settings: growth.Settings, resume: bool) -> list[str]:
        text = io.StringIO()
        cpu, quiet = torch.device("cpu"), Console(file=io.StringIO())
        run = runs.Run(cpu, quiet, quick=True, progress=Console(file=text), chosen=BaseDtype("fp32", "auto", "chosen"))
        growth.run_job(settings, run, tmp_path, resume)
        return text.getvalue().splitlines()

    count = len(growth.cases(growth.Settings(dtype="fp32"), runs.Run(torch.device("cpu"), Console(), quick=True)))
    found = said(growth.Settings(), resume=False)
    assert found[0] == f"growth, case 1 of {count}: layers, 1, 1, 64, 4, 8, 1, fp32"
    assert found[1] == f"growth, case 1 of {count}: about {duration(25 * (count - 1))} left"
    assert found[-1] == f"growth, case {count} of {count}"
    assert len(found) == count + 1
    assert said(growth.Settings(), resume=True) == []  # all are done


def test_merging_says_its_stages(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words(folders, tmp_path / "out", "--steps", "1")) == 0
    capsys.readouterr()
    edits, output = str(tmp_path / "out" / "edits"), str(tmp_path / "merged")
    assert cli.main(["merge", "--model", str(folders["llama"]), "--edits", edits, "--output", output, "--force"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[:3] == [f"Loading the model: {folders['llama']}", "Merging", f"Writing {output}"]
    assert shown.err == ""  # which is for the one line of an error
