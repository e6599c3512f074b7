"""Tensors that are not dense, as any argument of any operation; and what can be done with the outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import ARGUMENTS
from torch import Tensor

import red_kernels as rk

NAMES = {**ARGUMENTS, "linear_edit": ("x", "weight", "linear_bias", "scale", "bias", "residual")}


def nested(t: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([t, t], layout=layout)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "sparse_csc": lambda t: t.to_sparse_csc(),
    "sparse_bsr": lambda t: t.to_sparse_bsr((1, 1)),
    "sparse_bsc": lambda t: t.to_sparse_bsc((1, 1)),
    "_mkldnn": lambda t: t.to_mkldnn(),
    "strided": lambda t: nested(t, torch.strided),
    "jagged": lambda t: nested(t, torch.jagged),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls some of the layouts a prototype
        yield


def dense_arguments(operation: str, edits: bool) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {"x": (4, 8), "residual": (4, 8)}
    if operation == "linear_edit":
        shapes["weight"] = (8, 8)
    if edits:
        shapes |= {"scale": (3, 8), "bias": (3, 8)}
    made: dict[str, Any] = {n: torch.randn(shapes.get(n, (8,))) for n in NAMES[operation]}
    if edits:
        made["edit_ids"] = torch.zeros(4, dtype=torch.int64)
    return made


def converted(t: Tensor, layout: str) -> Tensor:
    """Some layouts have two dimensions at least, or no integers: then another shape or dtype has to do."""
    for attempt in (t, t[None], t.float(), t.float()[None]):
        try:
            return LAYOUTS[layout](attempt)
        except (RuntimeError, IndexError):
            continue
    raise AssertionError(f"no tensor of layout {layout}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", NAMES)
def test_a_tensor_that_is_not_dense(operation: str, layout: str) -> None:
    for edits in (False, True):
        dense = dense_arguments(operation, edits)
        for name in dense:
            given = {**dense, name: converted(dense[name], layout)}
            ids = {"edit_ids": given.pop("edit_ids")} if edits else {}
            with pytest.raises(TypeError, match=rf"^{name} is a (nested )?tensor.*layout {layout}.*expected a dense"):
                getattr(rk, operation)(*given.values(), **ids)
