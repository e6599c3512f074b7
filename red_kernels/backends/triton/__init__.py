"""The Triton kernels: the backend of tensors on a GPU. Importing it needs Triton; it is never imported without.

The functions have the arguments and results of those in :mod:`red_kernels.reference`. Called plainly they start their
kernels directly; while torch.compile traces they are operators, registered in the namespace ``red_kernels_triton``.

Where to find what: ``kernels`` has a file for each family of kernels, over the device functions of ``device`` and
``norm_math``; ``rules`` says which tile and grid they take; ``operations`` allocates; ``launch`` starts them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...reference import EditGrads, EditNormGrads, NormEditGrads
from ..operators import KERNEL_DTYPES, SCHEMAS, bits, flags, not_plain, register_fakes
from . import operations
from .launch import INTERPRETED, unusable
from .linear import linear_edit_forward as linear_edit_forward  # the one thing that a backend may lack

NAME = "triton"
NAMESPACE = "red_kernels_triton"

_device = "cpu" if INTERPRETED else "cuda"
_ops: Any = getattr(torch.ops, NAMESPACE)
_tracing = torch.compiler.is_compiling


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot take an activation, or None."""
    if not (x.is_cuda if _device == "cuda" else x.device.type == _device):
        where = "in Triton's interpreter, on the CPU" if INTERPRETED else "on a GPU"
        return f"x is on {x.device}, and these kernels run {where}"
    if x.dtype not in KERNEL_DTYPES:
        return f"x has dtype {x.dtype}, and these kernels take float32, bfloat16 and float16"
    if x.is_cuda:
        reason = unusable(x.get_device())
        if reason is not None:
            return f"x is on {x.device}, and {reason}"
    return not_plain(x)


def edit_forward(*arguments: Any) -> Tensor:
    if _tracing():
        return _ops.edit_forward.default(*arguments)
    return operations.edit_forward(*arguments)


def edit_backward(*arguments: Any) -> EditGrads:
    if _tracing():
        return EditGrads(*_ops.edit_backward.default(*arguments[:-1], bits(arguments[-1])))
    return operations.edit_backward(*arguments)


def edit_norm_forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    if _tracing():
        return _ops.edit_norm_forward.default(*arguments)
    return operations.edit_norm_forward(*arguments)


def edit_norm_backward(*arguments: Any) -> EditNormGrads:
    if _tracing():
        return EditNormGrads(*_ops.edit_norm_backward.default(*arguments[:-1], bits(arguments[-1])))
    return operations.edit_norm_backward(*arguments)


def norm_edit_forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    if _tracing():
        return _ops.norm_edit_forward.default(*arguments)
    return operations.norm_edit_forward(*arguments)


def norm_edit_backward(*arguments: Any) -> NormEditGrads:
    if _tracing():
        return NormEditGrads(*_ops.norm_edit_backward.default(*arguments[:-1], bits(arguments[-1])))
    return operations.norm_edit_backward(*arguments)


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in SCHEMAS:
        name = schema[: schema.index("(")]
        library.define(schema)
        library.impl(name, _operator(getattr(operations, name), name.endswith("backward")), _device.upper())
    register_fakes(NAMESPACE)
    return library


def _operator(operation: Any, backward: bool) -> Any:
    if not backward:
        return operation
    gradients = {"edit_backward": 3, "edit_norm_backward": 6, "norm_edit_backward": 5}[operation.__name__]
    return lambda *arguments: tuple(operation(*arguments[:-1], flags(arguments[-1], gradients)))


_library = _register()  # kept: what it registered goes with it
