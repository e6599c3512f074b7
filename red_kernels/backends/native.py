"""The compiled CPU kernels of ``csrc``: loads the shared library and calls its registered operators."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "cpu"


def load_error() -> str | None:
    """Why the library is not loaded, with the remedy, or None."""
    return "not built; remedy: install with a C++ compiler"


def unsupported(x: Tensor) -> str | None:
    return "not built"
