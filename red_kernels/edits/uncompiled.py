"""State that compiled code must leave its graph to read. A separate module: the decorator imports the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["uncompiled"]


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`: compiled code might read the state of another task or generator."""
    return function(*arguments)
