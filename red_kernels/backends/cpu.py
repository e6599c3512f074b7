"""The compiled CPU kernels of ``csrc/cpu``: loads the shared library, whose registered operators run them.

The processor determines the instruction set, unless the variable RED_KERNELS_CPU or :func:`use_instruction_set` does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from . import compiled, nodes
from .record import Backend
from .schemas import KERNEL_DTYPES, not_plain

NAMESPACE = "red_kernels"

_LIBRARY = Path(__file__).parent.parent / "lib" / "libred_kernels_cpu.so"


def load_error() -> str | None:
    """Why the kernels are unusable, with the remedy, or None."""
    return _error


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot take an activation, or None. Raises ValueError if RED_KERNELS_CPU is invalid."""
    if _error is not None:
        if _error is _wrong_setting:
            raise ValueError(_error)
        return _error
    if not x.is_cpu:
        return f"x is on {x.device}, and these kernels run on the CPU"
    if x.dtype not in KERNEL_DTYPES:
        return f"x has dtype {x.dtype}, and these kernels take float32, bfloat16 and float16"
    return not_plain(x)


def instruction_set() -> str:
    """The instruction set in use: on x86-64 'base', 'avx2', 'avx512' or 'avx512_bf16', on AArch64 'neon' or
    'neon_bf16', on any other processor 'base'."""
    return compiled.ask(_handle().red_kernels_cpu_in_use)


def instruction_sets() -> list[str]:
    """The compiled instruction sets that this processor can run, best last."""
    return compiled.ask(_handle().red_kernels_cpu_runnable).split()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set in a ``with`` block, in all threads (RED_KERNELS_CPU does so for a
    process).

    Raises RuntimeError if ``name`` is none of :func:`instruction_sets`.
    """
    before = instruction_set()
    compiled.ask(_handle().red_kernels_cpu_use, name.encode())
    try:
        yield
    finally:
        compiled.ask(_handle().red_kernels_cpu_use, before.encode())


def trim_memory() -> int:
    """Return the memory kept for large outputs to the system; returns its size in bytes."""
    return _handle().red_kernels_cpu_trim()


def kept_memory() -> int:
    """Bytes of freed outputs kept for reuse (at most RED_KERNELS_CPU_POOL_MB, by default an eighth of the memory)."""
    return _handle().red_kernels_cpu_kept()


@contextmanager
def without_pool() -> Iterator[None]:
    """Take large outputs from torch's own allocator in a ``with`` block, in all threads.

    That is slower, but torch's memory profiler counts only torch's own allocations, not the pool.
    """
    before = _handle().red_kernels_cpu_use_pool(0)
    try:
        yield
    finally:
        _handle().red_kernels_cpu_use_pool(before)


def _handle() -> ctypes.CDLL:
    if _error is not None:
        raise RuntimeError(f"the CPU kernels are missing: {_error}")
    assert _dll is not None
    return _dll


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    dll, error = compiled.load(
        _LIBRARY,
        _LIBRARY.with_name("cpu.missing"),
        "it was never built; remedy: pip install red-kernels with a C++ compiler and torch installed",
    )
    if dll is not None:
        dll.red_kernels_cpu_trim.restype = dll.red_kernels_cpu_kept.restype = ctypes.c_size_t
        dll.red_kernels_cpu_lent.restype = ctypes.c_size_t  # an address
    return dll, error


def _check_setting(dll: ctypes.CDLL) -> str | None:
    """Why RED_KERNELS_CPU is invalid, or None."""
    try:
        compiled.ask(dll.red_kernels_cpu_in_use)
    except RuntimeError as error:
        return f"{error}; remedy: set RED_KERNELS_CPU to one of these, or unset it"
    return None


_dll, _error = _load()
_wrong_setting = None if _dll is None else _check_setting(_dll)
if _error is None:
    _error = _wrong_setting
compiled.register(NAMESPACE)
BACKEND = Backend(
    "cpu",
    None if _dll is None else compiled.operations(NAMESPACE),
    load_error,
    unsupported,
    "cpu",
    state=lambda: f"instruction set {instruction_set()} of {', '.join(instruction_sets())}",
    variants=instruction_sets,
    use=use_instruction_set,
    nodes=None if _dll is None else nodes.nodes_of(NAMESPACE, "cpu", _dll.red_kernels_cpu_lent()),
)
