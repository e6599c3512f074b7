"""The edit of a forward that runs again: under activation checkpointing it is the edit of the first run.

Every checkpointing leaves an object in the graph. torch's non-reentrant one leaves a frame that its hooks for saved
tensors refer to; every reentrant one leaves the context of its `autograd.Function`. There the first run notes the edit
of each site. The second run reads the note, in any thread and in any state.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from .bank import EditBank
from .blocks import Block
from .selection import Selection, saved_tensor_hooks

__all__ = ["keep", "kept", "recalled", "runs_plainly"]

_NOTES = "_red_kernels_states"  # the attribute with the notes: site to its applied edit, and the vectors' versions
_KEPT = "_red_kernels_kept"  # the attribute with further data of a first run: a key to a tensor
_MISSING: Any = object()
_SEVERAL: Any = object()  # a site that ran more than once, with different edits
# Until torch 2.13 `apply` is a Python function, whose frame is above that of `forward`.
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)
_looked_at: dict[int, tuple[CodeType, bool]] = {}  # by identity: the code, and whether it is a Function's `forward`
_Frame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", ())


def runs_plainly(selection: Selection) -> bool:
    """Whether a forward neither runs again nor may be run again later; fast, since every site calls it."""
    if torch._C._current_graph_task_id() != -1 or saved_tensor_hooks(True) is not None:
        return False
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return True
    # Without gradients it may be the first run of reentrant checkpointing. Only the stack shows that, and it is
    # searched only if there are several edits to choose from.
    selection.unnoted = selection.unnoted or not selection.varied
    return not selection.varied


def recalled(own: EditBank, live: Any, block: Block | None) -> tuple[Any, bool]:
    """The edit of a site in a forward under checkpointing, and whether this run is a second one.

    Args:
        own: the site's edits.
        live: the state in force now.
        block: its block, or None.

    Raises:
        RuntimeError: a forward runs again, but the edit of its first run is unknown, or the values of its vectors have
            changed, which without checkpointing is an error of autograd.
    """
    task = torch._C._current_graph_task_id()
    first, second, unknown = _checkpoints()
    state: Any = _MISSING
    versions: tuple[tuple[Tensor, int], ...] = ()
    if block is None or task == -1 or block.task != task:  # a block entered after the second run's start is in force
        for frame in second:
            state, versions = _noted(frame, own)
            if state is not _MISSING:
                break
        if state is _MISSING and task != -1:
            node: Any = torch._C._current_autograd_node()
            state, versions = _noted(node, own)
            if state is _MISSING and torch.is_grad_enabled():
                _check_clear(own.selection, live)
    again = state is not _MISSING
    if state is _SEVERAL:
        raise RuntimeError(
            "under activation checkpointing a layer ran several times in one checkpoint, with different edits: its "
            "second run cannot tell which edit to apply; give each run its own checkpoint"
        )
    if not again:
        state = live
    elif any(vector._version != version for vector, version in versions):
        raise RuntimeError(
            "under activation checkpointing a forward runs again, but the vectors of its edit were changed in place "
            "since (by an optimizer step, or by loading): run the backward pass before that"
        )
    if not torch.is_grad_enabled():
        contexts, without = _contexts()
        first = [*first, *contexts]
        unknown = unknown or without
    for owner in first:
        notes = owner.__dict__.setdefault(_NOTES, {})
        former = notes.get(own)
        if former is None:
            notes[own] = state, own.versions(state)
        elif former[0] != state:
            notes[own] = _SEVERAL, ()
    if unknown and not again and len(own.selection.unclear) < 2:
        own.selection.unclear.add(state)
    return state, again


def keep(key: object, value: Tensor) -> None:
    """Leave a tensor for the second run of the running forward, if there will be one."""
    recorded = torch.is_grad_enabled()
    if torch.is_inference_mode_enabled() or (recorded and saved_tensor_hooks(True) is None):
        return
    first = _checkpoints()[0]
    for owner in first if recorded else (*first, *_contexts()[0]):
        held = owner.__dict__.setdefault(_KEPT, {})
        held[key] = value if held.get(key, value) is value else _SEVERAL


def kept(key: object) -> tuple[Tensor | None, bool]:
    """The tensor left by the first run of this second run, and whether it is of a reentrant checkpoint.

    Raises RuntimeError if the forward ran several times in one checkpoint, with different tensors.
    """
    if torch._C._current_graph_task_id() == -1 and saved_tensor_hooks(True) is None:
        return None, False
    node: Any = torch._C._current_autograd_node()
    for owner in (*_checkpoints()[1], node):
        found = getattr(owner, _KEPT, {}).get(key)
        if found is _SEVERAL:
            raise RuntimeError(
                "under activation checkpointing a stack of layers ran several times in one checkpoint, with different "
                "inputs: its second run cannot tell which input to read; give each run its own checkpoint"
            )
        if found is not None:
            return found, owner is node
    return None, False


def _noted(owner: Any, own: EditBank) -> tuple[Any, Any]:
    found: tuple[Any, Any] = getattr(owner, _NOTES, {}).get(own, (_MISSING, ()))
    return found


def _check_clear(selection: Selection, live: Any) -> None:
    """Raise if this may be the second run of a forward without notes, and several edits are possible."""
    others = selection.unclear | ({selection.first} if selection.unnoted and selection.varied else set())
    if others - {live}:
        raise RuntimeError(
            "under activation checkpointing a forward runs again without a note of its edit, and several edits were in "
            "use: its edit is unknown; run the backward pass before another edit is used"
        )


def _checkpoints() -> tuple[list[Any], list[Any], bool]:
    """The checkpoints of a forward: those in their first run and in their second; and other hooks.

    Hooks for saved tensors are stacked. torch shows only the top, so they are popped and pushed back.
    """
    first: list[Any] = []
    second: list[Any] = []
    unknown = False
    taken: list[Any] = []
    try:
        while (hooks := saved_tensor_hooks(True)) is not None and hooks != "unknown":
            frame, again = _frame_of(hooks[0])
            if frame is None:
                unknown = True
            else:
                (second if again else first).append(frame)
            taken.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
    finally:
        for hooks in reversed(taken):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    # Inside a checkpoint other hooks only store its saved tensors.
    return first, second, unknown and not first and not second


def _frame_of(pack: Any) -> tuple[Any, bool]:
    """The checkpoint of a hook, and whether it runs for the second time: then the reference is weak."""
    for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
        try:
            held = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        again = isinstance(held, weakref.ref)
        if again:
            held = held()
        if isinstance(held, _Frame):
            return held, again
    return None, False


def _contexts() -> tuple[list[Any], bool]:
    """The contexts of the `autograd.Function`s whose forward runs here; and whether one has none."""
    found: list[Any] = []
    without = False
    for forward in _forwards():
        names = forward.f_code.co_varnames
        context = forward.f_locals.get(names[0]) if names else None
        if isinstance(context, torch._C._FunctionBase):
            found.append(context)
        else:
            without = True
    return found, without


def _forwards() -> Iterator[FrameType]:
    """The frames of this thread that are the `forward` of an `autograd.Function`, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    below = None
    while frame is not None:
        if below is not None and (frame.f_code is _APPLY if _APPLY is not None else _is_forward(below.f_code)):
            yield below
        frame, below = frame.f_back, frame


def _is_forward(code: CodeType) -> bool:
    """Whether an `autograd.Function` has this code as its `forward`; searched once, at the first sight."""
    known = _looked_at.get(id(code))
    if known is None:
        known = _looked_at[id(code)] = (
            code,
            any(
                getattr(kind.forward, "__code__", None) is code
                for kind in _functions(torch.autograd.Function.__mro__[1])
            ),
        )
    return known[1]


def _functions(base: Any) -> Iterator[Any]:
    kind: Any
    for kind in base.__subclasses__():
        yield kind
        yield from _functions(kind)
