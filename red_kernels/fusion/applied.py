"""The edit for a fused operation at a site."""

from __future__ import annotations

from torch import Tensor

from ..backends.arguments import Edit, operands_of
from ..edits.module import RedEdit
from ..ops.checks import fits
from .norms import is_dense, unobserved
from .waiting import NO_EDIT, PLAIN

__all__ = ["left_to_do"]


def left_to_do(own: RedEdit, x: Tensor) -> Edit | None:
    """The edit for a fused operation, which fits `x`; `NO_EDIT` for none; None: call the module.

    None is for tensors that are not plain, such as sharded ones, for kinds of edit whose kernel takes no addition, and
    for edits with hooks, which may move their vectors to the device.
    """
    if not is_dense(x) or not x.is_floating_point() or not unobserved(own):
        return None
    applied = own.applied(x)
    if applied is None:
        return NO_EDIT
    if applied.kind.kernel not in ("affine", "mix"):
        return None
    applied = operands_of(applied)
    width, device, dimensions = x.shape[-1], x.device, 1 if applied.ids is None else 2
    for vector in applied.vectors.values():
        if vector is not None and not (type(vector) in PLAIN and fits(vector, width, device, dimensions)):
            return None
    return applied
