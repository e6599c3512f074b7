"""Liger's norms, fused with the residual's addition if available, behind an eager edit."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..operations import LAYER_EPS, RMS_EPS, Arguments, FusedEdit, Norm, Operation, compose
from .base import Function, Implementation, on_gpu

NO_NORM = "it has kernels only for norms, not for an edit"


def implementations(device: torch.device) -> list[Implementation]:
    """Liger. Its kernels must not overwrite the incoming gradient, which other implementations get too."""
    module, reason = on_gpu(device, "liger-kernel", "liger_kernel.transformers.functional")
    return [Implementation("liger", functools.partial(_make, module), reason)]


class _LigerNorm(Norm):
    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, operation: Operation, h: Tensor, arguments: Arguments) -> Tensor:
        found: Tensor
        if operation.norm == "layer":
            found = self.module.liger_layer_norm(h, arguments.weight, arguments.norm_bias, LAYER_EPS)
        else:
            found = self.module.liger_rms_norm(h, arguments.weight, RMS_EPS, in_place=False)
        return found


def _make(module: Any, operation: Operation) -> Function | str:
    if not operation.norm:
        return NO_NORM
    edit, norm = FusedEdit(), _LigerNorm(module)

    def function(arguments: Arguments) -> tuple[Tensor, ...]:
        if operation.norm == "rms" and operation.residual:
            edited = edit(arguments.x, arguments)
            y, z = module.liger_fused_add_rms_norm(
                edited, arguments.residual, arguments.weight, RMS_EPS, in_place=False
            )
            return y, z
        return compose(operation, arguments, edit, norm)

    return function
