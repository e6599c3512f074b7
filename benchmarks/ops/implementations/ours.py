"""This package's operations, by each of its backends that runs on the device."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

import red_kernels as rk
from red_kernels.backends import available_backends

from ..operations import LAYER_EPS, RMS_EPS, Operation
from .base import Function, Implementation


def implementations(device: torch.device) -> list[Implementation]:
    """`cpu` on a CPU, where it is the one that is taken by itself; `cuda` and `triton` on a GPU."""
    names = ("cpu",) if device.type == "cpu" else ("cuda", "triton")
    reasons = available_backends()
    return [
        Implementation(
            name,
            _function,
            reasons[name],
            ours=True,
            active=contextlib.nullcontext if name == "cpu" else functools.partial(rk.backend, name),
        )
        for name in names
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
