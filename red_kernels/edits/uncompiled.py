"""What compiled code has to leave its graph to ask. A module of its own: the decorator imports the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["uncompiled"]


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`: what compiled code could read may be what another task or generator has left."""
    return function(*arguments)
