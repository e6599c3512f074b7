"""Apex's fused norms, behind an eager edit and residual addition."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..operations import LAYER_EPS, RMS_EPS, Arguments, FusedEdit, Norm, Operation
from .base import Function, Implementation, on_gpu
from .eager import composed
from .liger import NO_NORM


def implementations(device: torch.device) -> list[Implementation]:
    """Apex; its norms are in a separately compiled extension."""
    module, reason = on_gpu(device, "apex", "apex.normalization.fused_layer_norm")
    if reason is None:
        _, reason = on_gpu(device, "apex (with its CUDA extensions)", "fused_layer_norm_cuda")
    return [Implementation("apex", functools.partial(_make, module), reason)]


class _ApexNorm(Norm):
    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, operation: Operation, h: Tensor, arguments: Arguments) -> Tensor:
        shape = h.shape[-1:]
        found: Tensor
        if operation.norm == "layer":
            found = self.module.fused_layer_norm_affine(h, arguments.weight, arguments.norm_bias, shape, eps=LAYER_EPS)
        else:
            found = self.module.fused_rms_norm_affine(h, arguments.weight, shape, eps=RMS_EPS)
        return found


def _make(module: Any, operation: Operation) -> Function | str:
    return composed(FusedEdit(), _ApexNorm(module), operation) if operation.norm else NO_NORM
