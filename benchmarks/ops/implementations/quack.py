"""quack's RMSNorm, fused with the residual's addition, behind an eager edit."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..operations import RMS_EPS, Arguments, FusedEdit, Operation
from .base import Function, Implementation, on_gpu


def implementations(device: torch.device) -> list[Implementation]:
    """quack."""
    module, reason = on_gpu(device, "quack-kernels", "quack.rmsnorm")
    return [Implementation("quack", functools.partial(_make, module), reason)]


def _make(module: Any, operation: Operation) -> Function | str:
    if operation.norm != "rms":
        return "with gradients it has only RMSNorm"
    edit = FusedEdit()

    def function(arguments: Arguments) -> tuple[Tensor, ...]:
        if operation.norm_first:
            return (edit(module.rmsnorm(arguments.x, arguments.weight, eps=RMS_EPS), arguments),)
        edited = edit(arguments.x, arguments)
        y, z = module.rmsnorm(edited, arguments.weight, residual=arguments.residual, eps=RMS_EPS, prenorm=True)
        return y, z

    return function
