"""The recorded or tangent-taking backward of a C++ node (csrc/nodes): that of the Python Function."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ..backends import nodes
from .handover import norm_backward
from .passes import Gradients, derivative, edit_backward, edit_norm_backward, norm_edit_backward

__all__: list[str] = []

_DTYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16, -1: None}  # as in c10/ScalarType.h


class _Kind(NamedTuple):
    """The Python side of a kind of C++ node.

    Attributes:
        name: of the Function.
        backward: of `ops.passes`.
        needs: turns the flags of a node's inputs into those of the backward.
    """

    name: str
    backward: Callable[..., Gradients]
    needs: Callable[[tuple[bool, ...]], tuple[bool, ...]]


_KINDS = {
    "edit": _Kind("BundledEditFunction", edit_backward, lambda need: (need[0], need[2], need[3])),
    "edit_norm": _Kind("BundledEditNormFunction", edit_norm_backward, lambda need: need),
    "norm_of_sum": _Kind(
        "NormOfSumFunction", norm_backward, lambda need: (need[0], False, False, False, need[1], need[2])
    ),
    "norm_edit": _Kind("BundledNormEditFunction", norm_edit_backward, lambda need: need),
}
_contexts = {name: type(kind.name, (SimpleNamespace,), {}) for name, kind in _KINDS.items()}


def _backward(
    name: str, backend: str, saved: tuple[Any, ...], needs: tuple[bool, ...], facts: tuple[Any, ...], grads: Gradients
) -> Gradients:
    """The gradients of a node's inputs."""
    scale, bias, weight, norm_bias, dropout_p, n_edits, eps, offset, centered = facts
    kind = _KINDS[name]
    ctx = _contexts[name](
        backend=backend,
        saved_tensors=saved,
        needs=kind.needs(needs),
        vectors=(_DTYPES[scale], _DTYPES[bias]),
        n_edits=n_edits,
        dropout_p=dropout_p,
        norm=(eps, offset, centered),
        norm_dtypes=(_DTYPES[weight], _DTYPES[norm_bias]),
    )
    found = derivative(ctx, kind.backward, grads)
    if name == "edit":
        dx, dscale, dbias = found
        return dx, grads[0] if needs[1] else None, dscale, dbias
    return found


if nodes.set_python_backward is not None:
    nodes.set_python_backward(_backward)
