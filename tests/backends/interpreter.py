"""Triton's interpreter as these tests need it: rounding as on a GPU, accesses that are watched, and less waiting.

``mend()`` changes the interpreter of the Triton installed, 3.6 to 3.9, in place:

- bfloat16. The interpreter turns fp32 into bfloat16 by cutting bits off, and a NaN whose bits are all in the low half
  into infinity. A GPU rounds to the nearest number, ties to even (``cvt.rn.bf16.f32``). A kernel held to a rounding
  step would be judged by an error of the interpreter's own.
- Multiply-adds, which Triton 3.6 rounds twice there, and a GPU once.
- Sums. numpy adds the rows of an array one after another, which loses more digits than a GPU's tree of additions.
- Bounds. Every address that a kernel reads or writes must lie within one of the tensors that it was given. The
  interpreter would read and write wherever it is told.
- Warnings. An overflow is infinity, as on a GPU, and no matter for a warning.
- Time. The interpreter patches the whole of ``triton.language`` again for each call of a device function, which takes
  as long as all of the arithmetic. Once for each launch is enough.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_mended = False
_tensors: list[tuple[int, int]] = []  # where the tensors of the running kernel begin and end
_backwards = False


def mend() -> None:
    """Change the interpreter; see the module. Doing so again changes nothing."""
    global _mended
    if _mended:
        return
    _mended = True
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    _wrap(builder, "cast_impl", _cast)
    _wrap(builder, "create_fma", _fused)
    _wrap(interpreter.ReduceOps, "sum", _summed)
    _wrap(builder, "create_masked_load", _watched)
    _wrap(builder, "create_masked_store", _watched)
    _wrap(builder, "set_grid_idx", _ordered)
    _wrap(executor, "_init_args_hst", _noted)
    _wrap(executor, "__call__", _quiet)
    interpreter._patch_lang = _once(interpreter._patch_lang)


@contextmanager
def programs_backwards() -> Iterator[None]:
    """Run the programs of every grid from the last to the first in a ``with`` block."""
    global _backwards
    _backwards = True
    try:
        yield
    finally:
        _backwards = False


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of fp32 ``values`` as bfloat16, uint16 of the same shape: to nearest, ties to even; NaN stays NaN."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    # Half a step less one, and one more where the last bit that stays is set: a carry goes up to the exponent, and from
    # the largest number to infinity.
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """fp32 values of the bits of bfloat16 numbers, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def tree_sum(values: np.ndarray, axis: int, keepdims: bool) -> np.ndarray:
    """The sum along an axis whose size is a power of two, by halves."""
    values = np.moveaxis(values, axis, 0)
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return np.moveaxis(values, 0, axis) if keepdims else values[0]


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by ``wrapper(method, self, ...)``."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapped(self: Any, *arguments: Any, **options: Any) -> Any:
        return wrapper(method, self, *arguments, **options)

    setattr(owner, name, wrapped)


def _cast(method: Callable[..., Any], builder: Any, source: Any, target: Any) -> Any:
    kinds = source.dtype.scalar, target.scalar
    if kinds == (tl.float32, tl.bfloat16):
        return interpreter.TensorHandle(to_bfloat16(source.data), tl.bfloat16)
    if kinds == (tl.bfloat16, tl.float32):
        return interpreter.TensorHandle(from_bfloat16(source.data), tl.float32)
    return method(builder, source, target)


def _fused(method: Callable[..., Any], builder: Any, x: Any, y: Any, z: Any) -> Any:
    if z.data.dtype != np.float32:
        return method(builder, x, y, z)
    # The product is exact; rounded twice are only sums within 2^-29 steps of a tie.
    total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)


def _summed(method: Callable[..., Any], reduction: Any, value: Any) -> Any:
    if reduction.axis is None:
        return method(reduction, value)
    return reduction.to_tensor(tree_sum(value.handle.data, reduction.axis, reduction.keep_dims), value.dtype)


def _watched(method: Callable[..., Any], builder: Any, pointers: Any, *rest: Any, **options: Any) -> Any:
    # load: pointers, mask, other, ...; store: pointers, value, mask, ...
    mask = rest[1] if method.__name__ == "create_masked_store" else rest[0]
    active = pointers.data if mask.data.all() else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if active.size:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        first, end = int(active.min()), int(active.max()) + width
        if not any(low <= first and end <= high for low, high in _tensors):
            verb = "writes" if method.__name__ == "create_masked_store" else "reads"
            raise IndexError(f"the kernel {verb} outside of its tensors: {end - first} bytes from {first:#x} on")
    return method(builder, pointers, *rest, **options)


def _noted(method: Callable[..., Any], executor: Any, arguments: Any, options: Any) -> Any:
    found = method(executor, arguments, options)
    tensors = [t for t in (*found[0], *found[1].values()) if hasattr(t, "data_ptr")]
    _tensors[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.is_contiguous()]
    return found


def _quiet(method: Callable[..., Any], executor: Any, *arguments: Any, **options: Any) -> Any:
    with np.errstate(all="ignore"):
        return method(executor, *arguments, **options)


def _ordered(method: Callable[..., Any], builder: Any, *place: int) -> None:
    if _backwards:
        place = tuple(size - 1 - index for size, index in zip(builder.grid_dim, place, strict=True))
    method(builder, *place)


def _once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``_patch_lang`` that does nothing in device functions whose module it has patched during this launch."""
    patched: set[int] = set()

    def wrapped(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None  # the scope of a device function's patch is not used
        scope = patch(function)
        if not patched:
            restore = scope.restore

            def end() -> None:
                patched.clear()
                restore()

            scope.restore = end
        patched.add(module)
        return scope

    return wrapped
