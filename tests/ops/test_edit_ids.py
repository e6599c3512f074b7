"""Edits chosen by row, where their vectors are frozen, where ids lie apart in memory, and where an edit is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import ARGUMENTS, OPERATIONS, WITH_NORM_BEHIND, Implementation, Tensors, arguments, fused, outputs_of
from torch import Tensor

import red_kernels as rk

ROWS = 5
ALL = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 2]])
LAYOUTS = {"apart": ALL[:, 0], "one for all": torch.tensor(2).expand(ROWS)}
CASES = [(operation, True) for operation in OPERATIONS] + [(operation, False) for operation in WITH_NORM_BEHIND]


def _gradients(operation: str, tensors: Tensors, frozen: bool, **options: Any) -> dict[str, Tensor]:
    given = {name: t.clone().requires_grad_(not (frozen and name in ("scale", "bias"))) for name, t in tensors.items()}
    results = outputs_of(fused(operation, given, **options))
    torch.autograd.backward(results, [torch.ones_like(t) for t in results])
    return {name: given[name].grad for name in ARGUMENTS[operation] if given[name].requires_grad}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("operation", "need_z"), CASES)
def test_ids_of_any_strides(
    operation: str, need_z: bool, layout: str, frozen: bool, implementation: Implementation
) -> None:
    tensors = arguments(operation, (ROWS, 6), edits=3)
    options = {} if need_z else {"need_z": False}
    found = _gradients(operation, tensors, frozen, edit_ids=LAYOUTS[layout], **options)
    plain = _gradients(operation, tensors, frozen, edit_ids=LAYOUTS[layout].contiguous(), **options)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("operation", "need_z"), CASES)
def test_an_edit_that_no_row_has_is_not_read(
    operation: str, need_z: bool, frozen: bool, implementation: Implementation
) -> None:
    """Edits without a row may hold anything: no gradient meets them, that of the norm's weight included."""
    tensors = arguments(operation, (ROWS, 6), edits=4)
    options: dict[str, Any] = {"edit_ids": torch.tensor([1, 1, 2, 2, 1])}
    if not need_z:
        options["need_z"] = False
    expected = _gradients(operation, tensors, frozen, **options)
    for edit in (0, 3):
        tensors["scale"][edit] = float("inf")
        tensors["bias"][edit] = float("nan")
    found = _gradients(operation, tensors, frozen, **options)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(bool(value.isfinite().all()) for value in found.values())


def test_reference_reads_no_other_edit() -> None:
    """What the other implementations are held to above is not NaN for both."""
    ids = torch.tensor([1, 1])
    with rk.backend("reference"):
        assert rk.edit(torch.ones(2, 3), torch.tensor([[float("nan")] * 3, [2.0] * 3]), edit_ids=ids).eq(2).all()
