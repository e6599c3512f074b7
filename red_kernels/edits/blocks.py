"""The `with` blocks that choose edits: their scope, and how threads inherit it.

A block is in force for the code that runs inside it:

- Entered by a plain function or a coroutine, it is in a context variable: each asyncio task has its own, and a task
  started inside inherits it.
- Entered by a generator, it is bound to the generator's frame. A generator runs in its caller's context, so a context
  variable would stay set when it yields. The block is in force while the generator runs, in any thread. A generator
  that `contextlib` makes a context manager only serves its caller: the caller enters the block.
- A thread started inside, or a task given to a `ThreadPoolExecutor` or an event loop there, inherits it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch

from .selection import OFF, Off, Rows, Selection, State

__all__ = ["Block", "any_block", "innermost", "lock", "state_of"]

_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
_MANAGERS = (
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._AsyncGeneratorContextManager.__aenter__.__code__,
)
# It protects blocks and edits. The garbage collector, or a signal, may take it again in the same thread. A fork waits
# for it: the child has no other thread to release it.
lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
_open = 0  # number of running blocks, in all models
_watching = False  # whether threads and executors pass on their blocks
_streams: dict[FrameType, list[Block]] = {}  # the running blocks of generators, by the generator's frame


class _Entry:
    """One entry into a block: whether it runs, and whether another thread or task has left it."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.running, self.astray = True, False


class _Held(NamedTuple):
    entry: _Entry
    home: tuple[int, int] | None  # thread and task that entered it; None if inherited


_held: ContextVar[tuple[_Held, ...]] = ContextVar("red_kernels_held", default=())


class Block(contextlib.ContextDecorator):
    """A `with` block with an edit for each row of a batch, or without edits.

    Args:
        selections: of its models.
        rows: the state inside; None for no edits.
        check: called first when the block starts; it may refuse.
        entered, left: called when the block starts and ends.
    """

    def __init__(
        self,
        selections: Iterable[Selection],
        rows: Rows | None,
        check: Callable[[], None] = lambda: None,
        entered: Callable[[], None] = lambda: None,
        left: Callable[[], None] = lambda: None,
    ) -> None:
        self.selections = tuple(selections)
        self.applied: Rows | Off = OFF if rows is None else rows
        self.names: tuple[str | None, ...] = () if rows is None else tuple(rows.names)
        self.task = -1  # of autograd, if entered in a backward pass
        self._entry: _Entry | None = None  # while the block runs
        self._frame: FrameType | None = None
        self._shifting = False
        self._check, self._entered, self._left = check, entered, left

    def _recreate_cm(self) -> Block:  # each call of a decorated function has its own block
        rows = self.applied if isinstance(self.applied, Rows) else None
        return Block(self.selections, rows, self._check, self._entered, self._left)

    def __call__(self, function: Any) -> Any:
        """Each call of a function, and each run of a generator or coroutine that it creates, is inside a block."""
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def coroutine(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    return await function(*args, **kwargs)

            return coroutine
        if inspect.isasyncgenfunction(function):

            @functools.wraps(function)
            async def stream(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    async with contextlib.aclosing(function(*args, **kwargs)) as values:
                        async for value in values:
                            yield value

            return stream
        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generator(*args: Any, **kwargs: Any) -> Any:
                with self._recreate_cm():
                    return (yield from function(*args, **kwargs))

            return generator
        return super().__call__(function)

    def __enter__(self) -> None:
        frame, home = _generator(sys._getframe(1)), _home()
        with lock:
            if self._entry is not None:
                raise RuntimeError("this block is entered already; create another one by use_edits or disable_edits")
            self._check()
            self._entry = _Entry(self)
            self._frame = frame
            self._shifting = self._frame is not None or home[1] != 0
            self.task = torch._C._current_graph_task_id()
            _count(1)
            for selection in self.selections:
                selection.varied = True
                selection.open.append(self)
                selection.shifting += self._shifting
            if self._frame is not None:
                _streams.setdefault(self._frame, []).append(self)
        if self._frame is None:
            there = (one for one in _held.get() if _holds(one))
            _held.set((*there, _Held(self._entry, home)))
        _tell_compiled(self.selections)
        self._entered()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with lock:
            entry, self._entry = self._entry, None
            if entry is None:
                return
            entry.running = False
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
        entry.astray = self._frame is None and not any(one == (entry, home) for one in held)
        self._frame = None
        _held.set(tuple(one for one in held if one.entry is not entry))
        _tell_compiled(self.selections)
        self._left()


def state_of(selection: Selection) -> tuple[State, Block | None]:
    """The state in force here, and its block; the active edit outside all blocks."""
    if torch.compiler.is_compiling():
        return _compiled_state(selection), None
    block = innermost(selection)
    return (selection.chosen, None) if block is None else (block.applied, block)


def any_block() -> bool:
    """Whether a block of any model may be in force here."""
    return bool(_streams or _held.get())


def innermost(selection: Selection) -> Block | None:
    """The innermost block of a model that is in force for the running code."""
    if _streams:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            for block in reversed(_streams.get(frame, ())):
                if selection in block.selections:
                    return block
            frame = frame.f_back
    for held in reversed(_held.get()):
        if selection in held.entry.block.selections and _holds(held):
            return held.entry.block
    return None


def _compiled_state(selection: Selection) -> State:
    if selection.shifting:
        from .uncompiled import uncompiled  # late: it imports the compiler

        state: State = uncompiled(state_of, selection)[0]
        return state
    applied: State = getattr(selection.here, "applied", None)
    if applied is None and selection.open:
        raise RuntimeError(
            "use_edits: a compiled model was called outside of the block that another thread has entered; enter a "
            "block in this thread too"
        )
    return selection.chosen if applied is None else applied


def _tell_compiled(selections: Iterable[Selection]) -> None:
    for selection in selections:
        block = innermost(selection)
        selection.here.applied = None if block is None else block.applied


def _holds(held: _Held) -> bool:
    """Whether an entry of this context is in force.

    A thread or task that inherited it keeps it after the end of the block. If another thread or task left the block
    than had entered it, an entry may be a rest that it could not remove.
    """
    entry, home = held
    return entry.running or home is None or (home != _home() and not entry.astray)


def _home() -> tuple[int, int]:
    """The running thread and asyncio task; 0 for no task."""
    task = None if asyncio._get_running_loop() is None else asyncio.current_task()
    return threading.get_ident(), 0 if task is None else id(task)


def _generator(frame: FrameType | None) -> FrameType | None:
    """The frame of the innermost running generator, except context managers."""
    while frame is not None:
        caller, code = frame.f_back, frame.f_code
        managed = caller is not None and caller.f_code in _MANAGERS
        # A generator expression has no block: what it enters is for the code that iterates over it.
        if code.co_flags & _GENERATORS and code.co_name != "<genexpr>" and not managed:
            return frame
        frame = caller
    return None


# ---- threads started inside


def _inherited() -> tuple[_Held, ...]:
    """All blocks in force here, for a new thread."""
    found = [_Held(held.entry, None) for held in _held.get() if _holds(held)]
    return (*found, *_of_streams())


def _of_streams() -> list[_Held]:
    """The blocks of the generators that run here."""
    found: list[_Held] = []
    frame: FrameType | None = sys._getframe(1) if _streams else None
    while frame is not None:
        found[:0] = [_Held(block._entry, None) for block in _streams.get(frame, ()) if block._entry is not None]
        frame = frame.f_back
    return found


class _Submitting(threading.local):
    running = False


_submitting = _Submitting()
_start: Callable[..., Any] = threading.Thread.start
_submit: Callable[..., Any] = ThreadPoolExecutor.submit
_create_task: Callable[..., Any] = asyncio.BaseEventLoop.create_task


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
    # A worker started by this call serves others too, so each task carries its own blocks.
    outer, _submitting.running = _submitting.running, True
    try:
        return _submit(self, _task(held, function) if held else function, *args, **kwargs)
    finally:
        _submitting.running = outer


def _create_task_inside(self: asyncio.BaseEventLoop, coroutine: Any, **options: Any) -> Any:
    if options.get("context") is not None or not _of_streams():  # a task's context has all blocks but those of streams
        return _create_task(self, coroutine, **options)
    context = contextvars.copy_context()
    context.run(_held.set, _inherited())
    return context.run(_create_task, self, coroutine, **options)


def _task(held: tuple[_Held, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs in a thread, once, with the inherited blocks."""
    selections = tuple(selection for entry, _ in held for selection in entry.block.selections)
    context = getattr(getattr(function, "func", None), "__self__", None)
    if isinstance(context, contextvars.Context):  # asyncio.to_thread runs it in a copy of the context
        context.run(_held.set, held)

    def run(*args: Any, **kwargs: Any) -> Any:
        former = _held.set(held)
        _tell_compiled(selections)
        try:
            with lock:  # it may outlast the block, and start threads itself
                _count(1)
            return function(*args, **kwargs)
        finally:
            with lock:
                _count(-1)
            _held.reset(former)
            _tell_compiled(selections)

    return run


def _count(change: int) -> None:
    """Count the running blocks and heirs. While there are any, threads and executors pass on their blocks."""
    global _open, _start, _submit, _create_task, _watching
    _open += change
    if _open and not _watching:
        _create_task = asyncio.BaseEventLoop.create_task
        asyncio.BaseEventLoop.create_task = _create_task_inside  # type: ignore[assignment, method-assign]
        _start, threading.Thread.start = threading.Thread.start, _start_inside  # type: ignore[method-assign]
        _submit = ThreadPoolExecutor.submit
        ThreadPoolExecutor.submit = _submit_inside  # type: ignore[assignment, method-assign]
        _watching = True
    elif not _open and (
        threading.Thread.start is _start_inside
        and ThreadPoolExecutor.submit is _submit_inside
        and asyncio.BaseEventLoop.create_task is _create_task_inside
    ):
        # If another library has wrapped our functions, these stay, and do nothing outside blocks.
        threading.Thread.start = _start  # type: ignore[method-assign]
        ThreadPoolExecutor.submit = _submit  # type: ignore[method-assign]
        asyncio.BaseEventLoop.create_task = _create_task  # type: ignore[method-assign]
        _watching = False
