"""The record of the Triton backend: Triton is imported only if it may be usable."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import torch
from torch import Tensor

from .record import Backend

_OLDEST = (3, 6)
_NO_GPU = (
    "torch finds no GPU here; remedy: a GPU and a torch built for it, or TRITON_INTERPRET=1, which runs the kernels "
    "on the CPU, slowly, for checks"
)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> str | None:
    """Why the Triton kernels are unusable here, with the remedy, or None."""
    if _TRITON is not None and not _INTERPRETED and not torch.cuda.is_available():
        return _NO_GPU
    return _MISSING


def require_gpu() -> None:
    """Raise RuntimeError, naming the missing part, if the kernels cannot be measured on a GPU."""
    purpose = "red-kernels bench --tune measures the Triton kernels on a GPU"
    if not torch.cuda.is_available():
        raise RuntimeError(f"{purpose}, and torch {torch.__version__} finds none here")
    reason = missing()
    if reason is not None:
        raise RuntimeError(f"{purpose}: {reason}")
    if _INTERPRETED:
        raise RuntimeError(f"{purpose}, and TRITON_INTERPRET=1 runs them on the CPU; remedy: unset it")


def _load() -> tuple[Any, str | None]:
    """The Triton backend, or the reason for its absence, with the remedy. Triton is imported only if it may be usable.

    It does not check for a GPU: that would start the driver, and a process that imports this could then neither fork
    nor choose among its GPUs.
    """
    if not _INTERPRETED and not _driver():
        return None, _NO_GPU
    # A broken or future Triton must not prevent the import of the package: hence every Exception.
    try:
        import triton as package

        version = tuple(int(part) for part in package.__version__.split(".")[:2])
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return None, f"Triton cannot be imported ({reason}); remedy: pip install --force-reinstall 'triton>=3.6,<3.10'"
    if version < _OLDEST:
        return None, f"Triton is {package.__version__}, expected 3.6 or later; remedy: pip install --upgrade triton"
    try:
        from . import triton
    except Exception as error:
        return None, f"the kernels do not load ({type(error).__name__}: {error}); remedy: pip install 'triton<3.10'"
    return triton, None


def _driver() -> bool:
    """Whether torch could use a GPU: it is built for one, and a driver is installed. Loading does not start it."""
    if torch.version.hip is not None:
        return True
    if torch.version.cuda is None:
        return False
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _unsupported(x: Tensor) -> str | None:
    return _MISSING if _TRITON is None else _TRITON.unsupported(x)


def _state() -> str:
    return "" if _TRITON is None else _TRITON.state()


_TRITON, _MISSING = _load()
BACKEND = Backend(
    "triton",
    _TRITON,
    missing,
    _unsupported,
    "cpu" if _INTERPRETED else "cuda",
    automatic=not _INTERPRETED,
    state=_state,
)
