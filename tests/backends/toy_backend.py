"""A backend of another package, in one file: fp32 on the CPU, in plain PyTorch, and it counts what it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from red_kernels.backends import Backend, reference, register_backend

NAME = "toy"
runs: Counter[str] = Counter()


def _counted(name: str) -> Callable[..., Any]:
    function = getattr(reference, name)

    def run(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            runs[name] += 1
        return function(*arguments)

    return run


class Operations:
    """The six functions."""

    edit_forward = staticmethod(_counted("edit_forward"))
    edit_backward = staticmethod(_counted("edit_backward"))
    edit_norm_forward = staticmethod(_counted("edit_norm_forward"))
    edit_norm_backward = staticmethod(_counted("edit_norm_backward"))
    norm_edit_forward = staticmethod(_counted("norm_edit_forward"))
    norm_edit_backward = staticmethod(_counted("norm_edit_backward"))


def unsupported(x: Tensor) -> str | None:
    """Why it cannot take an activation, or None."""
    return None if x.dtype == torch.float32 else f"x has dtype {x.dtype}, and this toy takes float32"


def register() -> None:
    runs.clear()
    register_backend(Backend(NAME, Operations, lambda: None, unsupported, device="cpu", state=lambda: "for playing"))
