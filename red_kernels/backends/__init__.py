"""Which implementation runs an operation: the one place where backends are listed and chosen.

A backend is a module with ``NAME``, ``unsupported(x)`` (why it cannot take an activation, or None) and the six
functions of :mod:`red_kernels.reference`, with the same arguments and results. It may also have
``linear_edit_forward``: all of :func:`red_kernels.linear_edit`, without gradients, or None where it is better composed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .. import reference
from . import cuda, gpu, native

_NAMES = ("triton", "cuda", "cpu", "reference")
_ENVIRONMENT = "RED_KERNELS_BACKEND"


class _Blocks:
    """The open ``rk.backend`` blocks of one thread; ``name`` is what the last of them asks for, None if there is none.

    ``open`` holds a list ``[name]`` for each block, told apart by identity, in the order of opening.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.open: list[list[str]] = []

    def add(self, entry: list[str]) -> None:
        self.open.append(entry)
        self.name = entry[0]

    def remove(self, entry: list[str]) -> None:
        self.open = [other for other in self.open if other is not entry]
        self.name = self.open[-1][0] if self.open else None


# A plain `local` and no subclass: then torch.compile reads and guards the calling thread's own value.
_thread = threading.local()
_FROM_ENVIRONMENT = os.environ.get(_ENVIRONMENT) or None

_MODULES: dict[str, Any] = {"cuda": cuda, "cpu": native, "reference": reference}
if gpu.TRITON is not None:
    _MODULES["triton"] = gpu.TRITON


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None if it can be used here, else the reason it is missing and the remedy."""
    return {name: _missing(name) for name in _NAMES}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for all operations in a ``with`` block (the variable RED_KERNELS_BACKEND does so for a process).

    The choice is that of the calling thread, compiled code included: the block opened last in it, of those still open,
    decides, in whatever order they are closed and whatever blocks other threads open and close. A backward uses the
    backend of its forward. Raises ValueError for an unknown name and RuntimeError for a backend that is missing, with
    the reason and the remedy.
    """
    _require(name, "rk.backend")
    blocks = getattr(_thread, "blocks", None)
    if blocks is None:
        blocks = _thread.blocks = _Blocks()
    entry = [name]
    blocks.add(entry)
    try:
        yield
    finally:
        blocks.remove(entry)


def choose(x: Tensor, operation: str) -> Any:
    """The backend module for an operation on ``x``: the one asked for, else the fastest that takes ``x``.

    ``operation`` is "edit", "edit_norm", "norm_edit" or "linear_edit", for the table in ``choice.py``.

    Raises RuntimeError if the one asked for is missing, and ValueError if it cannot take ``x``, or if
    RED_KERNELS_BACKEND or RED_KERNELS_CPU has a value that is none of those expected.
    """
    name = forced_backend()
    if name is None:
        if x.is_cuda:
            return gpu.choose(x, operation) or reference
        if native.unsupported(x) is None:
            return native
        native.check_setting()
        return reference
    module = by_name(name)
    reason = module.unsupported(x)
    if reason is not None:
        raise ValueError(f"the backend {name!r} was asked for, but {reason}; remedy: rk.backend('reference')")
    return module


def by_name(name: str) -> Any:
    """The backend module of that name; it must be available."""
    return _MODULES[name]


def forced_backend() -> str | None:
    """The backend asked for by ``rk.backend`` or RED_KERNELS_BACKEND, or None for the automatic choice.

    The variable's value is checked here, at the first use, and not on import: `red-kernels info` has to run with a
    wrong one to say what is wrong. Raises ValueError and RuntimeError as :func:`backend` does.
    """
    blocks = getattr(_thread, "blocks", None)
    if blocks is not None and blocks.name is not None:
        return blocks.name
    if _FROM_ENVIRONMENT is not None:
        _require(_FROM_ENVIRONMENT, _ENVIRONMENT)
    return _FROM_ENVIRONMENT


def _missing(name: str) -> str | None:
    if name == "triton":
        return gpu.triton_missing()
    if name == "cuda":
        return cuda.load_error()
    return native.load_error() if name == "cpu" else None


def _require(name: str, source: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"{source} got {name!r}, expected one of {', '.join(map(repr, _NAMES))}")
    reason = _missing(name)
    if reason is not None:
        raise RuntimeError(f"{source}: the backend {name!r} is missing: {reason}")
