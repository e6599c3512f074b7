"""flash-attention's Triton norms, fused with the residual's addition, behind an eager edit."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..operations import LAYER_EPS, RMS_EPS, Arguments, FusedEdit, Operation
from .base import Function, Implementation, on_gpu
from .liger import NO_NORM


def implementations(device: torch.device) -> list[Implementation]:
    """flash-attention."""
    module, reason = on_gpu(device, "flash-attn", "flash_attn.ops.triton.layer_norm")
    return [Implementation("flash-attention", functools.partial(_make, module), reason)]


def _make(module: Any, operation: Operation) -> Function | str:
    if not operation.norm:
        return NO_NORM
    edit = FusedEdit()
    rms = operation.norm == "rms"

    def norm(h: Tensor, arguments: Arguments, **options: Any) -> Any:
        norm_bias, eps = (None, RMS_EPS) if rms else (arguments.norm_bias, LAYER_EPS)
        return module.layer_norm_fn(h, arguments.weight, norm_bias, eps=eps, is_rms_norm=rms, **options)

    def function(arguments: Arguments) -> tuple[Tensor, ...]:
        if operation.norm_first:
            return (edit(norm(arguments.x, arguments), arguments),)
        edited = edit(arguments.x, arguments)
        if operation.outputs == 1:
            return (norm(edited, arguments, residual=arguments.residual),)
        y, z = norm(edited, arguments, residual=arguments.residual, prenorm=True)
        return y, z

    return function
