"""Linear layers whose output is `W x + b` and nothing else, and how their weight lies."""

from __future__ import annotations

from torch import nn

from ..fusion.fingerprint import fingerprint, forward_of, unwrapped

__all__ = ["linear_columns"]

_COLUMNS = {
    "12817d3c8dae2c62": True,  # transformers' Conv1D
    "02de280511999245": False,  # Falcon
}


def linear_columns(kind: type[nn.Module]) -> bool | None:
    """Whether layers of this class keep their weight as (in, out), not (out, in); None for a class not known."""
    forward = unwrapped(forward_of(kind))
    return False if forward is nn.Linear.forward else _COLUMNS.get(fingerprint(forward) or "")
