"""Which implementation runs an operation: the one place where backends are listed and chosen.

A backend is a module with ``NAME``, ``unsupported(x)`` (why it cannot take an activation, or None) and the six
functions of :mod:`red_kernels.reference`, with the same arguments and results.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import native

_NAMES = ("triton", "cuda", "cpu", "reference")
_ENVIRONMENT = "RED_KERNELS_BACKEND"


class _Forced(threading.local):
    """Each thread's own choice."""

    name: str | None = None


_forced = _Forced()
# torch.compile cannot guard on a thread's own value, so a trace reads this one: the choice last made in any thread.
_forced_for_trace: str | None = None

_MODULES: dict[str, Any] = {"cpu": native, "reference": reference}
_ABSENT = {
    "triton": "this version has no Triton kernels; remedy: use 'cpu' or 'reference'",
    "cuda": "this version has no CUDA kernels; remedy: use 'cpu' or 'reference'",
}


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None if it can be used here, else the reason it is missing and the remedy."""
    return {name: _missing(name) for name in _NAMES}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for all operations in a ``with`` block (the variable RED_KERNELS_BACKEND does so for a process).

    A backward uses the backend of its forward. Raises ValueError for an unknown name and RuntimeError for a backend
    that is missing, with the reason and the remedy.
    """
    _require(name, "rk.backend")
    global _forced_for_trace
    before = _forced.name
    _forced.name = _forced_for_trace = name
    try:
        yield
    finally:
        _forced.name = _forced_for_trace = before


def choose(x: Tensor) -> Any:
    """The backend module for an activation: the one asked for, else the fastest that takes ``x``.

    Raises RuntimeError if the one asked for is missing, and ValueError if it cannot take ``x``.
    """
    name = forced_backend()
    if name is None:
        return native if native.unsupported(x) is None else reference
    module = by_name(name)
    reason = module.unsupported(x)
    if reason is not None:
        raise ValueError(f"the backend {name!r} was asked for, but {reason}; remedy: rk.backend('reference')")
    return module


def by_name(name: str) -> Any:
    """The backend module of that name; it must be available."""
    return _MODULES[name]


def forced_backend() -> str | None:
    """The backend asked for by ``rk.backend`` or RED_KERNELS_BACKEND, or None for the automatic choice."""
    name = _forced_for_trace if torch.compiler.is_compiling() else _forced.name
    return name or _FROM_ENVIRONMENT


def automatic_backend(device_type: str) -> str:
    """The backend that the automatic choice uses for half and single precision on a device type."""
    return "cpu" if device_type == "cpu" and _missing("cpu") is None else "reference"


def _missing(name: str) -> str | None:
    if name in _ABSENT:
        return _ABSENT[name]
    return native.load_error() if name == "cpu" else None


def _require(name: str, source: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"{source} got {name!r}, expected one of {', '.join(map(repr, _NAMES))}")
    reason = _missing(name)
    if reason is not None:
        raise RuntimeError(f"{source}: the backend {name!r} is missing: {reason}")


def _from_environment() -> str | None:
    name = os.environ.get(_ENVIRONMENT)
    if name:
        _require(name, _ENVIRONMENT)
    return name or None


_FROM_ENVIRONMENT = _from_environment()
