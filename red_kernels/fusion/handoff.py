"""Handing the next layer its normed input across the layers' boundary.

A fused layer that has computed `z`, its output, and `y = norm(z)` for the norm that the next layer begins with, returns
`z` and leaves `y` as a note on that tensor. The norm, when it is called with that very tensor, takes the note off and
returns `y`. Whatever happens on the way (another tensor, another norm, an exception, an early exit), the note goes with
the tensor it hangs on, and the norm computes what it always did.

`y` and `z` come from one autograd node, so the gradient of `z` that a tensor hook would see lacks what comes through
`y`. That is why a note is made only where nobody can get hold of `z` on its way: inside the forward of the library's
own stack of layers, without hooks on what `z` passes.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.arguments import Norm
from ..edits.selection import saved_tensor_hooks
from .deferral import OWN_HOOKS
from .fingerprint import class_fingerprint
from .norms import norm_arguments, unobserved
from .paths import walk

__all__ = ["TAKES_NOTES", "NextNorm", "Step", "leave_note", "running", "take_note"]

TAKES_NOTES = "_red_kernels_takes_notes"  # set in the classes of norms that do
_NOTE = "_red_kernels_note"


class _Running(threading.local):
    def __init__(self) -> None:
        self.stacks: list[weakref.ref[nn.Module]] = []


_running = _Running()


@contextlib.contextmanager
def running(stack: nn.Module) -> Iterator[None]:
    """While the forward of a stack of layers runs in this thread. Interrupts end it as well."""
    stacks = _running.stacks
    depth = len(stacks)
    try:
        stacks.append(weakref.ref(stack))
        yield
    finally:
        del stacks[depth:]


class _Note(NamedTuple):
    norm: nn.Module
    normed: Tensor
    weight: Tensor | None
    version: int
    with_gradients: bool


def _version(z: Tensor) -> int:
    return -1 if z.is_inference() else z._version


def leave_note(z: Tensor, normed: Tensor, norm: nn.Module) -> None:
    """Leave `normed = norm(z)` on `z`."""
    note = _Note(norm, normed, norm._parameters["weight"], _version(z), torch.is_grad_enabled())
    z.__dict__[_NOTE] = note


def take_note(norm: nn.Module, z: Tensor) -> Tensor | None:
    """Take the note off `z`, if there is one, and return `norm(z)` if it still is that."""
    note = z.__dict__.pop(_NOTE, None)
    if (
        note is None
        or note.norm is not norm
        or note.version != _version(z)
        or note.with_gradients != torch.is_grad_enabled()
        or note.weight is not norm._parameters.get("weight")
        or z.retains_grad
        or z._backward_hooks is not None
        or saved_tensor_hooks(True) is not None
        or not unobserved(norm)
    ):
        return None
    return note.normed


class Step(NamedTuple):
    """A module that `z` passes: its name in the stack, in parts, and the fingerprints its `forward` may have."""

    path: tuple[str, ...]
    known: tuple[str, ...]


@dataclass(frozen=True)
class NextNorm:
    """Where a layer's output goes: through which modules, and into which norm.

    The modules are remembered by their names in the stack, whose forward is running when they are looked up. So a
    copy or an unpickled model finds its own, and no reference keeps a model in memory.

    Attributes:
        leaves: the modules whose output is `z`, from the inside out.
        enters: the modules that get `z` before the norm does.
        norm: name of the norm, in parts.
        clamps_half: whether the layer replaces `z` in float16.
    """

    leaves: tuple[Step, ...]
    enters: tuple[Step, ...]
    norm: tuple[str, ...]
    clamps_half: bool = False

    def arguments(self, layer: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[nn.Module, Norm] | None:
        """The norm to hand `norm(residual + x)` to, with what that takes; None where `z` must not carry a note."""
        stacks = _running.stacks
        stack = stacks[-1]() if stacks else None
        # Another module of that name may be a wrapper around the layer, or the layer is elsewhere now.
        if stack is None or walk(stack, self.leaves[0].path) is not layer:
            return None
        # Activation checkpointing: inside a saved-tensor hook `z` and `y` live and die apart; its reentrant form runs
        # the layers of a training model without gradients first.
        gradients = torch.is_grad_enabled()
        if (layer.training and not gradients) or saved_tensor_hooks(True) is not None:
            return None
        if self.clamps_half and torch.float16 in (x.dtype, None if residual is None else residual.dtype):
            return None
        for step in self.leaves:
            module = walk(stack, step.path)
            if module is None or not _passes(module, step.known, module._forward_hooks, gradients):
                return None
        for step in self.enters:
            module = walk(stack, step.path)
            if module is None or not _passes(module, step.known, module._forward_pre_hooks, gradients):
                return None
        norm = walk(stack, self.norm)
        if norm is None or not getattr(type(norm), TAKES_NOTES, False):
            return None
        found = norm_arguments(norm, x, residual)
        return None if found is None else (norm, found)


def _passes(module: nn.Module, known: tuple[str, ...], hooks: dict[int, Any], gradients: bool) -> bool:
    """Whether a module does nothing unknown to `z`, and nobody observes it on the side where `hooks` hang."""
    if (
        module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or class_fingerprint(type(module)) not in known
    ):
        return False
    return not hooks or not any(_observes(hook, gradients) for hook in hooks.values())


def _observes(hook: Callable[..., Any], gradients: bool) -> bool:
    """Whether a hook may look at `z`: any but ours may, and but transformers' own, which stay once they were needed."""
    if hook in OWN_HOOKS:  # they know what the fused forward has done, or only ask
        return False
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    if collector is None or getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return True
    collected = collector.get()
    return gradients and collected is not None and "hidden_states" in collected
