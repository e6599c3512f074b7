"""The Triton kernels: the backend of tensors on a GPU. Importing it needs Triton.

The functions are those of :mod:`red_kernels.backends.reference`. A plain call starts the kernels directly. While
torch.compile traces, the call is an operator, registered in the namespace ``red_kernels_triton``.

Modules: ``kernels`` has a file for each family of kernels, over the device functions of ``device`` and ``norm_math``,
or ``mix_math``. ``rules`` and ``mix_rules`` choose tiles and grids. ``operations`` and ``mixing`` allocate, with their
common code in ``dealing``. ``launch`` starts the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from .. import compiled
from ..arguments import flattened
from ..schemas import KERNEL_DTYPES, NAMES, SCHEMAS, flags, not_plain, register_fakes
from . import mixing, operations, tuned
from .launch import INTERPRETED, architecture, unusable
from .linear import linear_edit_forward as linear_edit_forward  # optional in a backend

NAMESPACE = "red_kernels_triton"

_device = "cpu" if INTERPRETED else "cuda"
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


def state() -> str:
    """Triton's version, and for each kind of device whether measured launch rules are in use."""
    devices = ["cpu"] if INTERPRETED else [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    said = f"Triton {triton.__version__}" + (", interpreted on the CPU" if INTERPRETED else "")
    for chip in dict.fromkeys(architecture(torch.empty(0, device=device)) for device in devices):
        try:
            table = tuned.table_for(chip.name, chip.warp)
        except (ValueError, OSError) as error:
            said += f"; {chip.name}: launch rules cannot be used: {error}"
            continue
        if table is None:
            said += f"; {chip.name}: no table of measured launch rules"
        else:
            said += (
                f"; {chip.name}: {len(table.tiles)} measured launch rules, and {len(table.linear_wins)} sizes at which "
                f"the fused matmul wins, from {table.path}, measured on {table.device} at {table.date}"
            )
    return said


def _register() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema, implementation in zip(SCHEMAS, flattened(_direct, flags).values(), strict=True):
        library.define(schema)
        library.impl(schema[: schema.index("(")], implementation, _device.upper())
    register_fakes(NAMESPACE)
    return library


def _function(name: str) -> Callable[..., Any]:
    """Kernels are started directly, or by an operator while torch.compile traces."""
    direct, traced = getattr(_direct, name), getattr(_traced, name)

    def function(*arguments: Any) -> Any:
        return traced(*arguments) if _tracing() else direct(*arguments)

    return function


_direct = SimpleNamespace(**{name: getattr(mixing if name.startswith("mix") else operations, name) for name in NAMES})
_library = _register()  # kept: its operators disappear with it
_traced = compiled.operations(NAMESPACE)
edit_forward = _function("edit_forward")
edit_backward = _function("edit_backward")
edit_norm_forward = _function("edit_norm_forward")
edit_norm_backward = _function("edit_norm_backward")
norm_edit_forward = _function("norm_edit_forward")
norm_edit_backward = _function("norm_edit_backward")
mix_forward = _function("mix_forward")
mix_backward = _function("mix_backward")
mix_norm_forward = _function("mix_norm_forward")
mix_norm_backward = _function("mix_norm_backward")
