"""This package's operations, by each of its backends on the device."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

import red_kernels as rk
from red_kernels.backends import records

from ..operations import LAYER_EPS, RMS_EPS, Operation
from .base import Function, Implementation


def implementations(device: torch.device) -> list[Implementation]:
    """The backends to time: `cpu` on a CPU, `cuda` and `triton` on a GPU."""
    found = [record for record in records() if record.automatic and record.device == device.type]
    return [
        Implementation(
            record.name,
            _function,
            record.missing(),
            ours=True,
            active=contextlib.nullcontext if len(found) == 1 else functools.partial(rk.backend, record.name),
        )
        for record in found
    ]


def _function(operation: Operation) -> Function:
    name, variant = operation.key
    functions: dict[str, Function] = {
        "edit": lambda a: (rk.edit(a.x, a.scale, a.bias),),
        "edit_add": lambda a: (rk.edit_add(a.x, a.residual, a.scale, a.bias),),
        "edit_add_rms_norm": lambda a: _both(rk.edit_add_rms_norm(a.x, a.residual, a.scale, a.bias, a.weight, RMS_EPS)),
        "edit_add_layer_norm": lambda a: _both(
            rk.edit_add_layer_norm(a.x, a.residual, a.scale, a.bias, a.weight, a.norm_bias, LAYER_EPS)
        ),
        "edit_add_layer_norm, post-norm": lambda a: (
            rk.edit_add_layer_norm(a.x, a.residual, a.scale, a.bias, a.weight, a.norm_bias, LAYER_EPS, need_z=False)[0],
        ),
        "rms_norm_edit": lambda a: (rk.rms_norm_edit(a.x, a.weight, a.scale, a.bias, RMS_EPS),),
        "layer_norm_edit": lambda a: (rk.layer_norm_edit(a.x, a.weight, a.norm_bias, a.scale, a.bias, LAYER_EPS),),
    }
    return functions[", ".join(filter(None, (name, variant)))]


def _both(results: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    return results  # type: ignore[return-value]  # the sum is None only where it is not asked for
