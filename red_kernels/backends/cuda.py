"""The CUDA kernels of ``csrc/cuda``: loads the shared library, whose registered operators run them.

For tests the variable RED_KERNELS_CUDA_EMULATED, the path of the same sources built for an emulator, runs them on CPU
tensors: slowly, and only if this backend is chosen.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import compiled, cpu, nodes
from .record import Backend
from .schemas import KERNEL_DTYPES, not_plain

_EMULATED_PATH = os.environ.get("RED_KERNELS_CUDA_EMULATED") or None
EMULATED = _EMULATED_PATH is not None
# On a GPU the operators are those of the CPU backend, imported first: its library defines the ones implemented here.
NAMESPACE = "red_kernels_emulated" if EMULATED else cpu.NAMESPACE

_LIBRARY = Path(__file__).parent.parent / "lib" / "libred_kernels_cuda.so"
_OLDEST = (8, 0)
_NO_GPU = (
    "torch finds no GPU of NVIDIA's here; remedy: an NVIDIA GPU and a torch built for CUDA, or another backend: "
    "'triton', 'cpu' or 'reference'"
)
_NEVER_BUILT = (
    "it was never built; remedy: pip install red-kernels with nvcc and torch installed; RED_KERNELS_CUDA=1 makes a "
    "failed build an error with its reason"
)


class Code(NamedTuple):
    """A library's code for a compute capability: machine code, or PTX, which a driver compiles for later ones."""

    capability: tuple[int, int]
    ptx: bool

    def runs_on(self, device: tuple[int, int]) -> bool:
        """Whether a device of that compute capability runs it: machine code runs only on its own major number."""
        return device >= self.capability and (self.ptx or device[0] == self.capability[0])


def parse_architectures(text: str) -> tuple[Code, ...]:
    """The parts of ``"sm_80 sm_90 compute_100"``. Raises ValueError for any other text."""
    found = []
    for word in text.split():
        parts = re.fullmatch(r"(sm|compute)_([0-9]{1,4})([0-9])", word)
        if parts is None:
            raise ValueError(f"it names the targets {text!r}, expected names such as sm_90 or compute_100")
        found.append(Code((int(parts[2]), int(parts[3])), parts[1] == "compute"))
    return tuple(found)


def load_error() -> str | None:
    """Why the kernels are unusable, with the remedy, or None."""
    if _error is None and not EMULATED and not torch.cuda.is_available():
        return _NO_GPU
    return _error


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot take an activation, or None."""
    if _error is not None:
        return _error
    if not (x.device.type == "cpu" if EMULATED else x.is_cuda):
        where = "in an emulator, on the CPU" if EMULATED else "on a GPU"
        return f"x is on {x.device}, and these kernels run {where}"
    if x.dtype not in KERNEL_DTYPES:
        return f"x has dtype {x.dtype}, and these kernels take float32, bfloat16 and float16"
    if not EMULATED:
        reason = unusable(x.get_device())
        if reason is not None:
            return f"x is on {x.device}, and {reason}"
    return not_plain(x)


def unusable(device: int) -> str | None:
    """Why the kernels cannot run on a GPU, or None. Checked once for each GPU, except while torch.compile traces."""
    if device in _unusable:
        return _unusable[device]
    reason, found = None, capability(device)
    if not any(code.runs_on(found) for code in _codes):
        new = f"install red-kernels with RED_KERNELS_ARCHS={found[0]}{found[1]}"
        remedy = new if found >= _OLDEST else "rk.backend('triton')"
        reason = (
            f"its compute capability is {found[0]}.{found[1]}, expected {_OLDEST[0]}.{_OLDEST[1]} or later and one "
            f"that the library was built for: {_architectures}; remedy: {remedy}"
        )
    elif not torch.compiler.is_compiling():
        reason = _does_not_load(device)
    if not torch.compiler.is_compiling():
        _unusable[device] = reason
    return reason


def _does_not_load(device: int) -> str | None:
    """Why the driver does not load the kernels on a GPU, or None."""
    if _dll is None:
        return _error
    try:
        compiled.ask(_dll.red_kernels_cuda_check, device)
    except (AttributeError, RuntimeError) as error:
        return f"the kernels do not load ({error}); remedy: a newer driver, or rk.backend('triton')"
    return None


def capability(device: int) -> tuple[int, int]:
    """The compute capability of a GPU. Read once for each GPU, except while torch.compile traces."""
    found = _capabilities.get(device)
    if found is None:
        found = torch.cuda.get_device_capability(device)
        if not torch.compiler.is_compiling():
            _capabilities[device] = found
    return found


def skip_launches(on: bool) -> None:
    """Make every operator return before its launches, with uninitialised results; or stop that.

    For measuring the host's time of a call without a GPU: only the emulator's library supports it. Raises RuntimeError
    without it.
    """
    if _dll is None or not EMULATED:
        raise RuntimeError(
            f"launches are skipped in the emulator only: {_error or 'RED_KERNELS_CUDA_EMULATED is unset'}"
        )
    _dll.red_kernels_cuda_skip_launches(int(on))


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or the reason for its absence, with the remedy. It is loaded only if it may be usable, without
    querying a GPU: see :func:`red_kernels.backends.find_triton`."""
    if _EMULATED_PATH is not None:
        expected = "expected the path of libred_kernels_cuda_emulated.so; remedy: build it, or unset the variable"
        return compiled.load(
            Path(_EMULATED_PATH), None, f"RED_KERNELS_CUDA_EMULATED is {_EMULATED_PATH!r}, which is no file, {expected}"
        )
    if torch.version.cuda is None:
        return None, _NO_GPU
    return compiled.load(_LIBRARY, _LIBRARY.with_name("cuda.missing"), _NEVER_BUILT)


def _ask_architectures(dll: ctypes.CDLL) -> tuple[str, tuple[Code, ...], str | None]:
    """The targets of a library, as text and parsed; and why it is not of this version, or None."""
    try:
        text = compiled.ask(dll.red_kernels_cuda_architectures)
        return text, () if EMULATED else parse_architectures(text), None
    except (AttributeError, RuntimeError, ValueError) as error:
        return "", (), f"{dll._name} is not a library of this version ({error}); remedy: install red-kernels again"


_unusable: dict[int, str | None] = {}
_capabilities: dict[int, tuple[int, int]] = {}
_architectures: str = ""
_codes: tuple[Code, ...] = ()
_dll, _error = _load()
if _dll is not None:
    _architectures, _codes, _error = _ask_architectures(_dll)
if EMULATED:
    compiled.register(NAMESPACE)
BACKEND = Backend(
    "cuda",
    None if _error is not None else compiled.operations(NAMESPACE),
    load_error,
    unsupported,
    "cpu" if EMULATED else "cuda",
    automatic=not EMULATED,
    state=lambda: "in an emulator, on CPU tensors" if EMULATED else f"built for {_architectures}",
    nodes=None if _error is not None else nodes.nodes_of(NAMESPACE, "cuda"),
)
