"""A linear layer with its edit as one kernel, for inference: allocation, tile, and the conditions of its use.

Our matrix product competes with those of the vendors' libraries, which differ between devices. So this kernel is used
only where a table (:mod:`.tuned`) has a measured win; without measurements there is none. :func:`force` overrides the
tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..arguments import Edit, flat_edit
from ..schemas import not_plain
from . import rules, tuned
from .kernels import linear
from .launch import Kernel, architecture

_linear_edit = Kernel(linear.linear_edit)
KERNELS = (_linear_edit,)

_forced: bool | None = None


def linear_edit_forward(
    x: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    edit: Edit,
) -> Tensor | None:
    """``residual + scale * (x @ weight.T + linear_bias) + bias``, or None if the composed form is better.

    ``x``, ``weight``, ``linear_bias`` and ``residual`` have one dtype. The product stays in fp32 until the result is
    rounded, unlike in the composed form. A row whose id chooses no edit is NaN.
    """
    d, k = weight.shape
    rows = x.numel() // k
    if not (wins(architecture(x), rows, d, k, x.dtype) if _forced is None else _forced):
        return None
    # other types of weights (quantised, distributed) define their own product
    if not_plain(weight) or (linear_bias is not None and not_plain(linear_bias)):
        return None
    tensors = (x, weight, linear_bias, residual, *flat_edit(edit)[:3])
    if _forced is None and not all(map(_as_measured, tensors)):
        return None
    return run(x, weight, linear_bias, residual, edit)


def run(
    x: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None,
    edit: Edit,
) -> Tensor:
    """Start the kernel, whether it wins or not. Non-contiguous inputs are copied first."""
    inputs = tuple(
        t if t is None or t.is_contiguous() else t.contiguous()
        for t in (x, weight, linear_bias, residual, *flat_edit(edit)[:3])
    )
    d, k = weight.shape
    rows = x.numel() // k
    z = x.new_empty(*x.shape[:-1], d)
    if rows:
        chip, precision = architecture(x), _precision(x.dtype, architecture(x))
        edits = next((t.shape[0] for t in flat_edit(edit)[:2] if t is not None), 1)
        tile = rules.linear(tuned.bucket(rows), d, k, x.element_size(), precision, chip)
        blocks = -(-rows // tile.block_m) * -(-d // tile.block_n)
        _linear_edit(
            (min(blocks, chip.multiprocessors), 1, 1),
            (*inputs, z),
            (rows, edits),
            (d, k, tile.block_m, tile.block_n, tile.block_k, tile.group, tile.splits, precision),
            tile.warps,
            tile.stages,
        )
    return z


def wins(chip: rules.Architecture, m: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether the kernel was measured to beat the composed form for ``(m, k) @ (n, k).T`` on such a device.

    float32 with TF32 allowed is the table's dtype 'tf32', as its times differ from float32's.
    """
    name = "tf32" if _precision(dtype, chip) == "tf32" else str(dtype).removeprefix("torch.")
    return tuned.linear_wins(name, m, n, k, chip)


@contextmanager
def force(use: bool) -> Iterator[None]:
    """In a ``with`` block :func:`red_kernels.linear_edit` uses the kernel wherever possible, or nowhere.

    For tests and measurements: it applies to all threads.
    """
    global _forced
    before, _forced = _forced, use
    try:
        yield
    finally:
        _forced = before


def _precision(dtype: torch.dtype, chip: rules.Architecture) -> str:
    """The precision of fp32 products: that of torch's own on this device."""
    if dtype != torch.float32 or chip.name.startswith("gfx"):  # there TF32 is experimental
        return "ieee"
    # The only one of torch's names for this setting that can always be read: it decides, whichever was set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _as_measured(t: Tensor | None) -> bool:
    """Whether a tensor has the memory layout of the measured ones."""
    return t is None or (t.is_contiguous() and t.data_ptr() % rules.VECTOR_BYTES == 0)
