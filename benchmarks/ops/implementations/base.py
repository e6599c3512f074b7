"""An implementation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..operations import Arguments, Operation

Function = Callable[[Arguments], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Implementation:
    """An implementation of some of the operations.

    Attributes:
        name: in results and tables.
        make: returns the function for an operation, or the reason why there is none. It is called once for each case.
        missing: the reason why it cannot run here at all, or None.
        ours: whether it is of this package.
        active: a context manager around its calls.
    """

    name: str
    make: Callable[[Operation], Function | str]
    missing: str | None = None
    ours: bool = False
    active: Callable[[], AbstractContextManager[Any]] = nullcontext


def on_gpu(device: torch.device, package: str, module: str) -> tuple[Any, str | None]:
    """A module of a package with kernels only for GPUs, and the reason why it is unusable."""
    if device.type != "cuda":
        return None, "its kernels run only on a GPU"
    try:
        return importlib.import_module(module), None
    except ImportError as error:
        if error.name == module.partition(".")[0]:
            return None, f"not installed: pip install {package}"
        return None, f"cannot be imported: {error}"
    except Exception as error:  # importing a package may raise any error
        return None, f"cannot be imported: {type(error).__name__}: {error}"
