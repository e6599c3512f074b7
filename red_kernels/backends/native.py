"""The compiled CPU kernels of ``csrc``: loads the shared library and calls its registered operators.

The functions have the arguments and results of those in :mod:`red_kernels.reference`. The instruction set is chosen
by the processor, or by the variable RED_KERNELS_CPU or :func:`use_instruction_set`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..reference import EditGrads, EditNormGrads, NormEditGrads
from .operators import KERNEL_DTYPES, bits, not_plain, register_fakes

NAME = "cpu"

_LIBRARY = Path(__file__).parent.parent / "lib" / "libred_kernels_cpu.so"
_ops: Any = torch.ops.red_kernels


def load_error() -> str | None:
    """Why the kernels cannot be used, with the remedy, or None."""
    return _error


def check_setting() -> None:
    """Raise ValueError if RED_KERNELS_CPU was set and cannot be followed."""
    if _wrong_setting is not None:
        raise ValueError(_wrong_setting)


def unsupported(x: Tensor) -> str | None:
    """Why the kernels cannot take an activation, or None."""
    if _error is not None:
        return _error
    if x.device.type != "cpu":
        return f"x is on {x.device}, and these kernels run on the CPU"
    if x.dtype not in KERNEL_DTYPES:
        return f"x has dtype {x.dtype}, and these kernels take float32, bfloat16 and float16"
    return not_plain(x)


def edit_forward(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    edit_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> Tensor:
    return _ops.edit_forward.default(x, residual, scale, bias, edit_ids, seed, dropout_p)


def edit_backward(
    dz: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    edit_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    n_edits: int,
    needs: tuple[bool, bool, bool],
) -> EditGrads:
    return EditGrads(*_ops.edit_backward.default(dz, x, scale, edit_ids, seed, dropout_p, n_edits, bits(needs)))


def edit_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    edit_ids: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    weight_offset: float,
    centered: bool,
    keep_z: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    return _ops.edit_norm_forward.default(
        x, residual, scale, bias, weight, norm_bias, edit_ids, seed, dropout_p, eps, weight_offset, centered, keep_z
    )


def edit_norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor | None,
    x: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    edit_ids: Tensor | None,
    seed: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    dropout_p: float,
    weight_offset: float,
    n_edits: int,
    needs: tuple[bool, bool, bool, bool, bool, bool],
) -> EditNormGrads:
    return EditNormGrads(
        *_ops.edit_norm_backward.default(
            dy, dz, z, x, residual, scale, bias, weight, edit_ids, seed, mean, rstd,
            dropout_p, weight_offset, n_edits, bits(needs),
        )
    )  # fmt: skip


def norm_edit_forward(
    x: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    edit_ids: Tensor | None,
    eps: float,
    weight_offset: float,
    centered: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    return _ops.norm_edit_forward.default(x, weight, norm_bias, scale, bias, edit_ids, eps, weight_offset, centered)


def norm_edit_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    edit_ids: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    weight_offset: float,
    n_edits: int,
    needs: tuple[bool, bool, bool, bool, bool],
) -> NormEditGrads:
    return NormEditGrads(
        *_ops.norm_edit_backward.default(
            dy, x, weight, norm_bias, scale, edit_ids, mean, rstd, weight_offset, n_edits, bits(needs)
        )
    )


def instruction_set() -> str:
    """The instruction set in use: 'base', 'avx2', 'avx512' or 'avx512_bf16'."""
    return _call(_handle().red_kernels_cpu_in_use)


def instruction_sets() -> list[str]:
    """The instruction sets compiled in that this processor can run, best last."""
    return _call(_handle().red_kernels_cpu_runnable).split()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set in a ``with`` block, in all threads (RED_KERNELS_CPU does so for a
    process).

    Raises RuntimeError if ``name`` is none of :func:`instruction_sets`.
    """
    before = instruction_set()
    _call(_handle().red_kernels_cpu_use, name.encode())
    try:
        yield
    finally:
        _call(_handle().red_kernels_cpu_use, before.encode())


def trim_memory() -> int:
    """Give the memory kept for large outputs back to the system; returns how many bytes that was."""
    return _handle().red_kernels_cpu_trim()


def kept_memory() -> int:
    """Bytes of freed outputs that are kept for reuse (at most RED_KERNELS_CPU_POOL_MB, by default an eighth of all)."""
    return _handle().red_kernels_cpu_kept()


def _handle() -> ctypes.CDLL:
    if _error is not None:
        raise RuntimeError(f"the CPU kernels are missing: {_error}")
    assert _dll is not None
    return _dll


def _call(function: Any, *arguments: Any) -> str:
    text = ctypes.create_string_buffer(512)
    good = function(*arguments, text, ctypes.c_size_t(len(text)))
    if not good:
        raise RuntimeError(text.value.decode())
    return text.value.decode()


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if not _LIBRARY.is_file():
        missing = _LIBRARY.with_name("cpu.missing")
        if missing.is_file():
            return None, missing.read_text()
        return None, "it was never built; remedy: pip install red-kernels with a C++ compiler and torch installed"
    try:
        dll = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return None, f"{_LIBRARY.name} does not load ({error}); remedy: install red-kernels again beside this torch"
    dll.red_kernels_cpu_trim.restype = dll.red_kernels_cpu_kept.restype = ctypes.c_size_t
    return dll, None


def _check_setting(dll: ctypes.CDLL) -> str | None:
    """Why RED_KERNELS_CPU cannot be followed, or None."""
    try:
        _call(dll.red_kernels_cpu_in_use)
    except RuntimeError as error:
        return f"{error}; remedy: set RED_KERNELS_CPU to one of these, or not at all"
    return None


_dll, _error = _load()
_wrong_setting = None if _dll is None else _check_setting(_dll)
if _error is None:
    register_fakes("red_kernels")
    _error = _wrong_setting
