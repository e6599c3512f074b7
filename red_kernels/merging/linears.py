"""Linear layers whose output is `W x + b` and nothing else, and how their weight lies."""

from __future__ import annotations

from torch import nn

from ..fusion.fingerprint import fingerprint, unwrapped
from ..models.modules import COLUMNS

__all__ = ["linear_columns"]


def linear_columns(kind: type[nn.Module]) -> bool | None:
    """Whether layers of this class keep their weight as (in, out), not (out, in); None for a class not known."""
    forward = unwrapped(kind.forward)
    return False if forward is nn.Linear.forward else COLUMNS.get(fingerprint(forward) or "")
