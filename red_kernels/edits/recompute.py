"""The edit of a forward that runs again: under activation checkpointing it is the one that the first run had.

Whatever runs a forward again leaves something in the graph: torch's non-reentrant checkpointing a frame that its hooks
for saved tensors refer to, every reentrant one the context of its `autograd.Function`. There the first run notes what
each site has applied. The second run reads that, in whichever thread and whatever holds by then.
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

_NOTES = "_red_kernels_states"  # the attribute with the notes: site to what it has applied, and the vectors' versions
_KEPT = "_red_kernels_kept"  # the attribute with what else a first run leaves: a key to a tensor
_MISSING: Any = object()
_SEVERAL: Any = object()  # a site that ran more than once, with different edits
# Until torch 2.13 `apply` is a function of Python, with a frame of its own below which `forward` runs.
_APPLY = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)
_looked_at: dict[int, tuple[CodeType, bool]] = {}  # by identity: the code, and whether it is such a `forward`
_Frame: Any = getattr(torch.utils.checkpoint, "_CheckpointFrame", ())


def runs_plainly(selection: Selection) -> bool:
    """Whether a forward neither runs again nor may be run again later; quick, as every site asks."""
    if torch._C._current_graph_task_id() != -1 or saved_tensor_hooks(True) is not None:
        return False
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return True
    # Without gradients it may be the first run of reentrant checkpointing. That is seen on the stack only, and looked
    # for only where there is more than one edit to tell apart.
    selection.unnoted = selection.unnoted or not selection.varied
    return not selection.varied


def recalled(own: EditBank, live: Any, block: Block | None) -> tuple[Any, bool]:
    """What a site has to apply in a forward that does not run plainly, and whether this run is a second one.

    Args:
        own: the site's edits.
        live: what holds now.
        block: the block that says so, or None.

    Raises:
        RuntimeError: a forward runs again of which it cannot be told what the first run applied, or whose vectors have
            other values by now, which without checkpointing is an error of autograd's.
    """
    task = torch._C._current_graph_task_id()
    first, second, unknown = _checkpoints()
    state: Any = _MISSING
    versions: tuple[tuple[Tensor, int], ...] = ()
    if block is None or task == -1 or block.task != task:  # a block entered since the second run began holds
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
    """Leave a tensor for the second run of the forward that is running, if it is to have one."""
    recorded = torch.is_grad_enabled()
    if torch.is_inference_mode_enabled() or (recorded and saved_tensor_hooks(True) is None):
        return
    first = _checkpoints()[0]
    for owner in first if recorded else (*first, *_contexts()[0]):
        held = owner.__dict__.setdefault(_KEPT, {})
        held[key] = value if held.get(key, value) is value else _SEVERAL


def kept(key: object) -> tuple[Tensor | None, bool]:
    """What the first run has left of the forward that runs again, and whether that is of a reentrant checkpoint.

    Raises RuntimeError where it ran several times in one checkpoint, with different tensors.
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
    """Raise where this may be the second run of a forward without notes, and more than one edit comes into question."""
    others = selection.unclear | ({selection.first} if selection.unnoted and selection.varied else set())
    if others - {live}:
        raise RuntimeError(
            "under activation checkpointing a forward runs again without a note of its edit, and several edits were in "
            "use: its edit is unknown; run the backward pass before another edit is used"
        )


def _checkpoints() -> tuple[list[Any], list[Any], bool]:
    """The checkpoints that a forward is in: those that run for the first time, for the second; and other hooks.

    Hooks for saved tensors lie one on top of the other. Torch shows the top only, so they are taken off and put back.
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
    # Below a checkpoint other hooks only store what it saves.
    return first, second, unknown and not first and not second


def _frame_of(pack: Any) -> tuple[Any, bool]:
    """The checkpoint that a hook belongs to, and whether it runs for the second time: then it is held weakly."""
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
    """The contexts of the `autograd.Function`s whose forward is running here; and whether one has none."""
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
    """The frames of this thread that are the `forward` of an `autograd.Function`, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    below = None
    while frame is not None:
        if below is not None and (frame.f_code is _APPLY if _APPLY is not None else _is_forward(below.f_code)):
            yield below
        frame, below = frame.f_back, frame


def _is_forward(code: CodeType) -> bool:
    """Whether some `autograd.Function` has this code as its `forward`; looked for once, when it is first seen."""
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
