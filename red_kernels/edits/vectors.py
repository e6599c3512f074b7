"""The trained tensors of one edit at one site, and how they are frozen and thawed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import Edit, Kind, kind_with

__all__ = ["EditVectors", "Gate"]


class Gate:
    """Whether an edit is visible: shared by all of its sites, so that it appears at all of them in one step."""

    def __init__(self) -> None:
        self.open = False


class EditVectors(nn.Module):
    """The trained tensors of one edit at one site: Parameters named like the parts of its kind, mostly `(width,)`.

    `model.half()`, `model.to(torch.bfloat16)` and the like leave fp32 vectors in fp32: in half precision an update
    smaller than half a rounding step at 1.0 is lost.

    An edit is frozen while it is inactive. A backward pass through an earlier forward still gives its vectors their
    gradients, which autograd alone would drop.

    Args:
        width: of the site's output.
        kind: its tensors, and their initial values; None for none.
        dtype, device: of the vectors.

    Attributes:
        frozen: the parts that were trainable before `freeze`.
        lent: whether a block of `use_edits` has thawed them, so that the last block freezes them again.
    """

    frozen: tuple[str, ...] = ()
    lent: bool = False

    gate: Gate | None = None  # shared by parts that appear at once; None for always visible

    def __init__(self, width: int, kind: Kind | None, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.kind = kind
        for name, start in () if kind is None else kind.start(width, dtype, device).items():
            self.register_parameter(name, nn.Parameter(start))

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return () if self.kind is None else self.kind.names

    def reset_parameters(self) -> None:
        """Restore the initial values, after vectors on the meta device got memory without values."""
        if self.kind is not None:
            with torch.no_grad():
                self.kind.fill(self._parameters)

    def freeze(self) -> None:
        """Make the vectors untrainable, until `thaw`."""
        for part, vector in tuple(self._parameters.items()):
            if vector is not None and vector.requires_grad:
                self.frozen = (*self.frozen, part)
                _bring_late_gradients(self, part, vector)
                vector.requires_grad_(False)
        self.lent = False

    def thaw(self) -> bool:
        """Make the vectors that `freeze` has frozen trainable again; whether there were any."""
        held = (self._parameters.get(part) for part in self.frozen)
        found = [vector for vector in held if vector is not None and not vector.requires_grad]
        self.frozen = ()
        for vector in found:
            with torch.inference_mode(vector.is_inference()):  # torch refuses it otherwise
                vector.requires_grad_(True)
        return bool(found)

    def requires_grad_(self, requires_grad: bool = True) -> EditVectors:
        """As for any module, with the edits inside; vectors that `freeze` froze and `thaw` would make trainable."""
        for module in self.modules():
            if isinstance(module, EditVectors) and not requires_grad:
                module.freeze()
            elif isinstance(module, EditVectors):
                module.frozen, module.lent = (), False
        super().requires_grad_(requires_grad)
        return self

    def vectors(self, again: bool = False) -> Edit:
        """The present edit. `again`: for the second run of a forward, whose edit may be frozen by now."""
        own, kind = self._parameters, self.kind
        assert kind is not None
        found: dict[str, Tensor | None]
        try:
            found = {name: own[name] for name in kind.names}
        except KeyError:  # FSDP 1 replaces them by views of its flat parameter
            found = {name: getattr(self, name) for name in kind.names}
        if again and self.frozen and torch.is_grad_enabled():
            found = {name: None if vector is None else _trainable_again(vector) for name, vector in found.items()}
        return Edit(kind, found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "kind" not in state:  # of a release without kinds, with None for missing parts
            own = {name: held for name, held in state["_parameters"].items() if held is not None}
            rest = {name: held for name, held in state.items() if name != "parts"}
            state = {**rest, "_parameters": own, "kind": kind_with(state.get("parts", own))}
        super().__setstate__(state)
        if self.lent:  # a copy, in which no block runs
            self.freeze()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EditVectors:
        def keeping_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype.itemsize < min(4, tensor.dtype.itemsize):
                return tensor.to(moved.device)
            return moved

        super()._apply(keeping_precision, recurse)
        return self


def _bring_late_gradients(holder: EditVectors, part: str, vector: Tensor) -> None:
    """Give a frozen vector the gradients of earlier forwards: autograd drops those of frozen tensors."""
    if any(getattr(hook, "func", None) is _late_gradient for hook in (vector._backward_hooks or {}).values()):
        return
    vector.register_hook(partial(_late_gradient, weakref.ref(holder), part))


def _late_gradient(reference: weakref.ref[EditVectors], part: str, gradient: Tensor) -> None:
    holder = reference()
    if holder is None or part not in holder.frozen:  # autograd delivers it, or the user has frozen the vector
        return
    vector = holder._parameters.get(part)
    if vector is not None and not vector.requires_grad:
        _accumulate(vector, gradient)


def _accumulate(vector: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        vector.grad = gradient.detach().clone() if vector.grad is None else vector.grad + gradient


def _trainable_again(vector: Tensor) -> Tensor:
    """A frozen vector for the second run of an earlier forward, whose graph delivers its gradients."""
    if vector.requires_grad or not vector.is_leaf:
        return vector
    with torch.enable_grad():
        alias = vector.detach().requires_grad_()
    alias.register_hook(partial(_accumulate, vector))
    return alias
