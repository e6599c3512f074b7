"""`torch.compile` of the composition with torch's norms, for one shape at a time, in two of its modes."""

from __future__ import annotations

import functools

import torch

from ..operations import Edit, FusedNorm, Operation
from .base import Function, Implementation
from .eager import composed

# Graphs of the whole call are left to the clock, which replays every implementation from a graph.
MODES = {"compile": "default", "compile-max-autotune": "max-autotune-no-cudagraphs"}
ON_CPU = "on a CPU it tunes only matrix products, which these operations lack: its code equals that of compile"


def implementations(device: torch.device) -> list[Implementation]:
    """Both modes; on a CPU the first."""
    return [
        Implementation(
            name, functools.partial(_compiled, mode), ON_CPU if device.type == "cpu" and mode != "default" else None
        )
        for name, mode in MODES.items()
    ]


def _compiled(mode: str, operation: Operation) -> Function:
    function: Function = torch.compile(
        composed(Edit(), FusedNorm(), operation), dynamic=False, fullgraph=True, mode=mode
    )
    return function
