"""The `with` blocks that say which edits hold: where each of them holds, and how threads inherit it.

A block holds for the code that runs inside of it:

- Entered by a plain function or a coroutine, it is in a context variable: each asyncio task has its own, and a task
  that is started inside inherits it.
- Entered by a generator, it is bound to the generator's frame. A generator runs in the context of its caller, so a
  context variable would stay set when it yields. Here the block holds while the generator is running, in any thread. A
  generator that `contextlib` makes a context manager of only serves its caller: the caller enters the block.
- A thread that is started inside, or a task that is given to a `ThreadPoolExecutor` there, inherits it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch

from .selection import OFF, Off, Rows, Selection, State

__all__ = ["Block", "innermost", "state_of"]

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_MANAGERS = (
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._AsyncGeneratorContextManager.__aenter__.__code__,
)
_lock = threading.Lock()
_open = 0  # how many blocks are running, in all models
_watching = False  # whether threads and executors say what they inherit
_streams: dict[FrameType, list[Block]] = {}  # the running blocks of generators, by the generator's frame


class _Held(NamedTuple):
    block: Block
    home: tuple[int, int] | None  # thread and task that entered it; None where it was inherited


_held: ContextVar[tuple[_Held, ...]] = ContextVar("red_kernels_held", default=())


class Block(contextlib.ContextDecorator):
    """A `with` block in which the rows of a batch have edits of their own, or in which there are no edits.

    Args:
        selections: of the models it is for.
        rows: what holds inside; None for no edits.
        entered, left: called when the block begins and ends.
    """

    def __init__(
        self,
        selections: Iterable[Selection],
        rows: Rows | None,
        entered: Callable[[], None] = lambda: None,
        left: Callable[[], None] = lambda: None,
    ) -> None:
        self.selections = tuple(selections)
        self.applied: Rows | Off = OFF if rows is None else rows
        self.names: tuple[str | None, ...] = () if rows is None else tuple(rows.names)
        self.running = False
        self.astray = False  # whether it was left by another thread or task than the one that entered it
        self.task = -1  # of autograd, where it was entered in a backward pass
        self._frame: FrameType | None = None
        self._shifting = False
        self._entered, self._left = entered, left

    def _recreate_cm(self) -> Block:  # each call of a decorated function has a block of its own
        return Block(self.selections, None if self.applied is OFF else self.applied, self._entered, self._left)

    def __enter__(self) -> None:
        if self.running:
            raise RuntimeError("this block is entered already; make another one by use_edits or disable_edits")
        self._entered()
        self._frame = _generator(sys._getframe(1))
        home = _home()
        self._shifting = self._frame is not None or home[1] != 0
        self.task = torch._C._current_graph_task_id()
        self.running, self.astray = True, False
        with _lock:
            _count(1)
            for selection in self.selections:
                selection.open.append(self)
                selection.shifting += self._shifting
            if self._frame is not None:
                _streams.setdefault(self._frame, []).append(self)
        if self._frame is None:
            _held.set((*_held.get(), _Held(self, home)))
        _tell_compiled(self.selections)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.running:
            return
        self.running = False
        with _lock:
            _count(-1)
            for selection in self.selections:
                selection.open.remove(self)
                selection.shifting -= self._shifting
            if self._frame is not None:
                blocks = _streams[self._frame]
                blocks.remove(self)
                if not blocks:
                    del _streams[self._frame]
        held, home = _held.get(), _home()
        self.astray = self._frame is None and not any(one == (self, home) for one in held)
        self._frame = None
        _held.set(tuple(one for one in held if one.block is not self))
        _tell_compiled(self.selections)
        self._left()


def state_of(selection: Selection) -> tuple[State, Block | None]:
    """What holds here, and the block that says so; the active edit outside of all blocks."""
    if torch.compiler.is_compiling():
        return _compiled_state(selection), None
    block = innermost(selection)
    return (selection.chosen, None) if block is None else (block.applied, block)


def innermost(selection: Selection) -> Block | None:
    """The innermost block for a model that holds in the code that is running."""
    if _streams:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            for block in reversed(_streams.get(frame, ())):
                if selection in block.selections:
                    return block
            frame = frame.f_back
    for block, home in reversed(_held.get()):
        if selection in block.selections and _holds(block, home):
            return block
    return None


def _compiled_state(selection: Selection) -> State:
    if selection.shifting:
        return _uncompiled_state(selection)
    applied = selection.here.applied
    if applied is None and selection.open:
        raise RuntimeError(
            "use_edits: a compiled model was called outside of the block that another thread is in; enter a block "
            "in this thread too"
        )
    return selection.chosen if applied is None else applied


@torch.compiler.disable
def _uncompiled_state(selection: Selection) -> State:
    """What holds here, for compiled code: whatever it could read may be what another task or generator has left."""
    return state_of(selection)[0]


def _tell_compiled(selections: Iterable[Selection]) -> None:
    for selection in selections:
        block = innermost(selection)
        selection.here.applied = None if block is None else block.applied


def _holds(block: Block, home: tuple[int, int] | None) -> bool:
    """Whether an entry of this context holds.

    A thread or task that has inherited it keeps it beyond the end of the block. Where the block was left by another one
    than had entered it, an entry may only be what that one could not take away.
    """
    return block.running or home is None or (home != _home() and not block.astray)


def _home() -> tuple[int, int]:
    """The running thread and asyncio task; 0 for no task."""
    asyncio = sys.modules.get("asyncio")
    task = None
    if asyncio is not None and asyncio._get_running_loop() is not None:
        task = asyncio.current_task()
    return threading.get_ident(), 0 if task is None else id(task)


def _generator(frame: FrameType | None) -> FrameType | None:
    """The frame of the innermost generator that is running, but for those that are context managers."""
    while frame is not None:
        caller = frame.f_back
        if frame.f_code.co_flags & _GENERATORS and (caller is None or caller.f_code not in _MANAGERS):
            return frame
        frame = caller
    return None


# ---- threads that are started inside


def _inherited() -> tuple[_Held, ...]:
    """All blocks that hold here, for a thread that begins."""
    found = [_Held(block, None) for block, home in _held.get() if _holds(block, home)]
    streams: list[Block] = []
    frame: FrameType | None = sys._getframe(1) if _streams else None
    while frame is not None:
        streams[:0] = _streams.get(frame, ())
        frame = frame.f_back
    return (*found, *(_Held(block, None) for block in streams))


class _Submitting(threading.local):
    running = False


_submitting = _Submitting()
_start: Callable[..., Any] = threading.Thread.start
_submit: Callable[..., Any] = ThreadPoolExecutor.submit


def _start_inside(self: threading.Thread) -> None:
    held = () if _submitting.running else _inherited()
    if held:
        run = self.run

        def run_inside() -> None:
            self.__dict__.pop("run", None)
            _task(held, run)()

        self.run = run_inside  # type: ignore[method-assign]
    _start(self)


def _submit_inside(self: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    held = _inherited()
    # A worker that this starts serves others too: what holds is said with each task.
    outer, _submitting.running = _submitting.running, True
    try:
        return _submit(self, _task(held, function) if held else function, *args, **kwargs)
    finally:
        _submitting.running = outer


def _task(held: tuple[_Held, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as it runs in a thread, once, with what that inherits."""
    selections = tuple(selection for block, _ in held for selection in block.selections)

    def run(*args: Any, **kwargs: Any) -> Any:
        former = _held.set(held)
        _tell_compiled(selections)
        try:
            with _lock:  # it may go on longer than the block, and start threads itself
                _count(1)
            return function(*args, **kwargs)
        finally:
            with _lock:
                _count(-1)
            _held.reset(former)
            _tell_compiled(selections)

    return run


def _count(change: int) -> None:
    """Count the running blocks and heirs. While there are any, threads and executors say what they inherit."""
    global _open, _start, _submit, _watching
    _open += change
    if _open and not _watching:
        _start, threading.Thread.start = threading.Thread.start, _start_inside  # type: ignore[method-assign]
        _submit = ThreadPoolExecutor.submit
        ThreadPoolExecutor.submit = _submit_inside  # type: ignore[assignment, method-assign]
        _watching = True
    elif not _open and threading.Thread.start is _start_inside and ThreadPoolExecutor.submit is _submit_inside:
        # Where another library has put its own around ours, these stay, and do nothing outside of blocks.
        threading.Thread.start = _start  # type: ignore[method-assign]
        ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign]
        _watching = False
