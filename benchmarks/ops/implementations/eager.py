"""Eager PyTorch: the edit as RED's authors write it, and with torch's fused operations instead of single ones."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..operations import Arguments, Edit, FusedEdit, FusedNorm, Norm, Operation, compose
from .base import Function, Implementation


def composed(edit: Edit, norm: Norm, operation: Operation) -> Function:
    """The operation composed of an edit and a norm."""

    def function(arguments: Arguments) -> tuple[Tensor, ...]:
        return compose(operation, arguments, edit, norm)

    return function


def implementations(device: torch.device) -> list[Implementation]:
    """`eager`: product, sum, residual and a library's norm; `eager-fused`: `torch.addcmul` and torch's own norms."""
    return [
        Implementation("eager", functools.partial(composed, Edit(), Norm())),
        Implementation("eager-fused", functools.partial(composed, FusedEdit(), FusedNorm())),
    ]
