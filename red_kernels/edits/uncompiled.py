"""What compiled code has to leave its graph to ask. A module of its own: the decorator imports the compiler."""

from __future__ import annotations

import torch

from .blocks import state_of
from .selection import Selection, State

__all__ = ["uncompiled_state"]


@torch.compiler.disable
def uncompiled_state(selection: Selection) -> State:
    """What holds here: whatever compiled code could read may be what another task or generator has left."""
    return state_of(selection)[0]
