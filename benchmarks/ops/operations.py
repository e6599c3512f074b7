"""The package's operations, their plain definitions and the least bytes that they move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 1e-6
LAYER_EPS = 1e-5


class Arguments(NamedTuple):
    """The arguments of every implementation: activations `(rows, width)`, vectors `(width,)`; `residual` optional."""

    x: Tensor
    residual: Tensor
    scale: Tensor
    bias: Tensor
    weight: Tensor
    norm_bias: Tensor


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: the function of `red_kernels`.
        variant: its form: `"post-norm"` returns only the normed sum, for models that normalise last.
        norm: `"rms"`, `"layer"` or `""`.
        residual: whether a residual is added before the norm.
        norm_first: whether the norm comes before the edit.
        forward, backward: the least number of activations read and written.
    """

    name: str
    variant: str
    norm: str
    residual: bool
    norm_first: bool
    forward: int
    backward: int

    @property
    def key(self) -> tuple[str, str]:
        """Its distinguishing fields."""
        return self.name, self.variant

    @property
    def outputs(self) -> int:
        """The number of returned tensors: also the sum if it continues in the residual stream."""
        return 2 if self.norm and self.residual and not self.variant else 1

    def differentiated(self, arguments: Arguments) -> list[Tensor]:
        """The arguments with gradients: a frozen model's norms need none."""
        x, residual, scale, bias, _, _ = arguments
        return [x, residual, scale, bias] if self.residual else [x, scale, bias]

    def passes(self) -> dict[str, int]:
        """Pass to the least number of activations moved."""
        return {"forward": self.forward, "backward": self.backward, "both": self.forward + self.backward}


OPERATIONS = (
    Operation("edit_add_rms_norm", "", "rms", True, False, 4, 6),
    Operation("edit_add_layer_norm", "", "layer", True, False, 4, 6),
    Operation("edit_add_layer_norm", "post-norm", "layer", True, False, 3, 5),
    Operation("edit_add", "", "", True, False, 3, 3),
    Operation("edit", "", "", False, False, 2, 3),
    Operation("rms_norm_edit", "", "rms", False, True, 2, 3),
    Operation("layer_norm_edit", "", "layer", False, True, 2, 3),
)
NAMES = tuple(dict.fromkeys(operation.name for operation in OPERATIONS))


def find(name: str, variant: str) -> Operation:
    """An operation by its key."""
    return next(operation for operation in OPERATIONS if operation.key == (name, variant))


def compose(operation: Operation, arguments: Arguments, edit: Edit, norm: Norm) -> tuple[Tensor, ...]:
    """The operation composed of an edit and a norm, as in a model without fusion: `y`, or `y, z`."""
    x, residual = arguments.x, arguments.residual
    if operation.norm_first:
        return (edit(norm(operation, x, arguments), arguments),)
    z = edit(x, arguments)
    if operation.residual:
        z = residual + z
    if not operation.norm:
        return (z,)
    y = norm(operation, z, arguments)
    return (y, z) if operation.outputs == 2 else (y,)


class Edit:
    """`scale * h + bias` in the precision of the vectors, rounded to the activation's dtype."""

    def __call__(self, h: Tensor, arguments: Arguments) -> Tensor:
        return (h * arguments.scale + arguments.bias).to(h.dtype)


class FusedEdit(Edit):
    """The same in one of torch's own operations."""

    def __call__(self, h: Tensor, arguments: Arguments) -> Tensor:
        return torch.addcmul(arguments.bias, h, arguments.scale).to(h.dtype)


class Norm:
    """The norms as model libraries write them: RMSNorm in steps of fp32, LayerNorm by torch."""

    def __call__(self, operation: Operation, h: Tensor, arguments: Arguments) -> Tensor:
        if operation.norm == "layer":
            return F.layer_norm(h, h.shape[-1:], arguments.weight, arguments.norm_bias, LAYER_EPS)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPS)
        return arguments.weight * normed.to(h.dtype)


class FusedNorm(Norm):
    """Both norms by torch."""

    def __call__(self, operation: Operation, h: Tensor, arguments: Arguments) -> Tensor:
        if operation.norm == "rms":
            return F.rms_norm(h, h.shape[-1:], arguments.weight, RMS_EPS)
        return super().__call__(operation, h, arguments)
