"""Linear layers with exactly `W x + b` as their output, and the layout of their weight."""

from __future__ import annotations

from torch import nn

from ..fusion.fingerprint import fingerprint, unwrapped
from ..models.modules import COLUMNS

__all__ = ["linear_columns"]


def linear_columns(kind: type[nn.Module]) -> bool | None:
    """Whether layers of this class store their weight as (in, out) instead of (out, in); None for an unknown class."""
    forward = unwrapped(kind.forward)
    return False if forward is nn.Linear.forward else COLUMNS.get(fingerprint(forward) or "")
