"""Argument checks of the public operations: each error names the argument, the value and the expected one."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from ..backends.arguments import Norm

_STRIDED = torch.strided
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def activation(x: Tensor, name: str = "x") -> None:
    """Raise TypeError or ValueError unless ``x`` is a dense floating activation ``(..., d)`` with ``d >= 1``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout is not _STRIDED or x.is_nested:
        dense(x, name)
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}, expected float32, bfloat16, float16 or float64")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., d) with d >= 1")


def dense(tensor: Tensor, name: str) -> None:
    """Raise TypeError for a tensor that is sparse, nested or in a layout of a library, such as mkldnn's."""
    if not _dense(tensor):
        layout = str(tensor.layout).removeprefix("torch.")
        kind = f"nested tensor (layout {layout})" if tensor.is_nested else f"tensor of layout {layout}"
        remedy = f"{name}.to_padded_tensor(0.0)" if tensor.is_nested else f"{name}.to_dense()"
        raise TypeError(f"{name} is a {kind}, expected a dense tensor (layout strided); remedy: {remedy}")


def _dense(tensor: Tensor) -> bool:
    return tensor.layout is _STRIDED and not tensor.is_nested


def same_shape(other: Tensor, x: Tensor, name: str) -> None:
    """Raise unless ``other`` is a dense floating activation with the shape and device of ``x``."""
    if (
        isinstance(other, Tensor)
        and other.layout is _STRIDED
        and not other.is_nested
        and other.dtype == x.dtype
        and other.shape == x.shape
        and other.device == x.device
    ):
        return
    activation(other, name)
    if other.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(other.shape)}, expected that of x, {tuple(x.shape)}")
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device}, expected the device of x, {x.device}")


def norm_vector(vector: Tensor | None, x: Tensor, name: str) -> None:
    """Raise unless ``vector`` is None or a dense floating ``(d,)`` on the device of ``x``."""
    if vector is not None and not fits(vector, x.shape[-1], x.device):
        _vector(vector, x, name)
        if vector.dim() != 1 or vector.shape[0] != x.shape[-1]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected ({x.shape[-1]},), the width of x")


def norm(norm: Norm, x: Tensor) -> None:
    """Raise TypeError or ValueError unless a norm fits ``x``."""
    weight, bias, eps, offset, _ = norm
    if weight is not None:
        norm_vector(weight, x, "weight")
    if bias is not None:
        norm_vector(bias, x, "norm_bias")
    epsilon(eps)
    if type(offset) is not float or offset != 0.0:
        number(offset, "weight_offset")


def edit_vectors(x: Tensor, scale: Tensor | None, bias: Tensor | None, edit_ids: Tensor | None) -> None:
    """Raise unless scale and bias are None, ``(d,)``, or ``(n, d)`` with integer ``edit_ids`` for each row."""
    if edit_ids is None:
        d, device = x.shape[-1], x.device
        for name, vector in (("scale", scale), ("bias", bias)):
            if vector is None or fits(vector, d, device):
                continue
            if isinstance(vector, Tensor) and _dense(vector) and vector.dim() == 2:
                raise ValueError(
                    f"{name} has shape {tuple(vector.shape)}, which needs edit_ids= to choose an edit for each row"
                )
            norm_vector(vector, x, name)
        return
    if scale is None and bias is None:
        raise ValueError("edit_ids was given, but neither scale nor bias")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is None:
            continue
        _vector(vector, x, name)
        if vector.dim() != 2 or vector.shape[0] == 0 or vector.shape[1] != x.shape[-1]:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, expected (n, {x.shape[-1]}) with n >= 1, because edit_ids "
                "is given"
            )
    if scale is not None and bias is not None and scale.shape != bias.shape:
        raise ValueError(f"scale has shape {tuple(scale.shape)} and bias {tuple(bias.shape)}, expected the same")
    _edit_ids(edit_ids, x, scale if scale is not None else bias)


def mix_vectors(
    x: Tensor,
    first: Tensor,
    second: Tensor | None,
    bias: Tensor | None,
    blocks: int,
    pair: int,
    edit_ids: Tensor | None,
) -> None:
    """Raise unless the vectors of a mix fit ``x`` and each other, and its width the pairs or the blocks."""
    if first is None or (second is None and blocks == 0):
        name = "first" if first is None else "second"
        raise TypeError(f"{name} must be a tensor, got NoneType" + ("" if blocks else "; a rotation needs both"))
    for name, vector in (("first", first), ("second", second), ("bias", bias)):
        try:
            edit_vectors(x, vector, None if edit_ids is None else first, edit_ids)
        except (TypeError, ValueError) as error:
            called, _, said = str(error).partition(" ")  # that check calls the two scale and bias
            called = {"scale": name, "bias": "first"}.get(called, called)
            raise type(error)(f"{called} {said}".replace(" and bias ", " and first ")) from None
    mix_width(x.shape[-1], blocks, pair)


def mix_width(d: int, blocks: int, pair: int) -> None:
    """Raise TypeError or ValueError unless a row of ``d`` columns has whole pairs, or whole blocks."""
    if isinstance(blocks, bool) or not isinstance(blocks, int):
        raise TypeError(f"blocks must be an integer, got {type(blocks).__name__}")
    if blocks < 0:
        raise ValueError(f"blocks is {blocks}, expected 0 for a rotation, or the number of blocks of columns")
    if blocks == 0 and d % (2 * pair):
        raise ValueError(f"x has width {d}, expected a multiple of {2 * pair}, the group size of a rotation")
    if blocks and d % blocks:
        raise ValueError(f"blocks is {blocks}, expected a divisor of the width of x, {d}")


def _edit_ids(edit_ids: Tensor, x: Tensor, vectors: Tensor | None) -> None:
    if not isinstance(edit_ids, Tensor):
        raise TypeError(f"edit_ids must be a tensor of integers, got {type(edit_ids).__name__}")
    dense(edit_ids, "edit_ids")
    if edit_ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"edit_ids has dtype {edit_ids.dtype}, expected an integer dtype")
    if edit_ids.shape != x.shape[:-1]:
        raise ValueError(
            f"edit_ids has shape {tuple(edit_ids.shape)}, expected {tuple(x.shape[:-1])}, one for each row"
        )
    if edit_ids.device != x.device:
        raise ValueError(f"edit_ids is on {edit_ids.device}, expected the device of x, {x.device}")
    assert vectors is not None
    # On an accelerator the values are not checked: the host would wait for the device.
    if edit_ids.device.type == "cpu" and not torch.compiler.is_compiling() and edit_ids.numel():
        while torch._C._functorch.is_functorch_wrapped_tensor(edit_ids):  # a tensor under vmap has no values of its own
            edit_ids = torch._C._functorch.get_unwrapped(edit_ids)
        low, high = int(edit_ids.min()), int(edit_ids.max())
        if low < 0 or high >= vectors.shape[0]:
            raise IndexError(f"edit_ids has values from {low} to {high}, expected 0 to {vectors.shape[0] - 1}")


def fits(vector: Tensor, d: int, device: torch.device, dimensions: int = 1) -> bool:
    """Whether a vector, or several in two dimensions, is valid, in few steps; slower checks name the fault."""
    if (
        not isinstance(vector, Tensor)
        or vector.layout is not _STRIDED
        or vector.dtype not in ACTIVATION_DTYPES
        or vector.dim() != dimensions
        or vector.device != device
    ):
        return False
    # To count elements is quicker than to ask for a shape. No nested tensor has one dimension.
    return vector.numel() == d if dimensions == 1 else not vector.is_nested and vector.shape[-1] == d


def _vector(vector: Tensor, x: Tensor, name: str) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(vector).__name__}")
    dense(vector, name)
    if vector.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"{name} has dtype {vector.dtype}, expected float32, bfloat16, float16 or float64")
    if vector.device != x.device:
        raise ValueError(f"{name} is on {vector.device}, expected the device of x, {x.device}")


def dropout(dropout_p: float) -> None:
    """Raise TypeError or ValueError unless ``dropout_p`` is a probability."""
    _real(dropout_p, "dropout_p")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p is {dropout_p}, expected a probability from 0 to 1")


def epsilon(eps: float) -> None:
    """Raise TypeError or ValueError unless ``eps`` is zero or positive, and finite."""
    _real(eps, "eps")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}, expected 0 or more")


def number(value: float, name: str) -> None:
    """Raise TypeError unless ``value`` is a real number, and ValueError unless it is finite."""
    _real(value, name)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number")


def _real(value: float, name: str) -> None:
    # Nearly all are floats: the test of an abstract class is for the rest. A trace has symbolic numbers.
    if type(value) is not float and not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
