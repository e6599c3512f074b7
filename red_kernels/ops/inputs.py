"""The inputs of operations before they run: one dtype, and the seed of a dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import nodes
from ..backends.arguments import Dropout
from . import checks

__all__ = ["drawn_dropout", "of_one_dtype"]


def drawn_dropout(p: float, training: bool, like: Tensor) -> Dropout | None:
    """A dropout whose seed comes from torch's generator on the device of ``like``; None for none.

    So a recomputation under activation checkpointing, which restores the generator, drops the same elements. Raises
    ValueError if ``dropout_p`` is not a probability.
    """
    if not training or p == 0.0:
        return None
    checks.dropout(p)
    if nodes.seed is not None and not torch.compiler.is_compiling():
        return Dropout(p, nodes.seed(like))
    return Dropout(p, torch.randint(0, 2**62, (1,), dtype=torch.int64, device=like.device))


def of_one_dtype(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their sum."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)
