"""What the operations read and write: nothing beside their tensors, and the same bits with any number of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import (
    DTYPES,
    OPERATIONS,
    WITH_DROPOUT,
    Implementation,
    Tensors,
    arguments,
    fused,
    leaves,
    outputs_of,
    run,
    same_bits,
    upstream,
)
from torch import Tensor

import red_kernels as rk
from red_kernels.backends import cpu

# Small outputs; several tiles of kernels; outputs that end within a vector and take pooled memory; outputs large enough
# to go past the cache.
SIZES = [
    (3, 37),
    (33, 577),
    pytest.param((600, 577), marks=pytest.mark.nightly),
    pytest.param((1100, 2048), marks=pytest.mark.not_interpreted),
]
compiled_only = pytest.mark.skipif(cpu.load_error() is not None, reason=f"no CPU kernels: {cpu.load_error()}")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _options(operation: str, rows: int) -> dict[str, Any]:
    return {"dropout_p": 0.25, "training": True} if operation in WITH_DROPOUT and rows % 2 else {}


def _seeded(operation: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return run(fused, operation, tensors, grads, **options)


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_element_is_written(operation: str, shape: tuple[int, int], implementation: Implementation) -> None:
    assert torch.empty(1000).isnan().all()
    tensors, grads = arguments(operation, shape), upstream(shape, torch.float32)
    first = run(fused, operation, tensors, tuple(g.clone() for g in grads))
    kept = {name: value.clone() for name, value in first.items()}
    for value in first.values():
        value.fill_(float("nan"))  # what the pool keeps is NaN from here on
    del first, value
    assert same_bits(run(fused, operation, tensors, grads), kept)
    assert all(bool(value.isfinite().all()) for value in kept.values())


@compiled_only
def test_nothing_is_written_behind_an_output(implementation: Implementation) -> None:
    if implementation.variant is None:
        return
    size = 1 << 20
    whole = rk.edit(torch.randn(1, size))
    address = whole.data_ptr()
    whole.fill_(float("nan"))
    del whole
    for missing in (31, 17, 15, 5, 3, 2, 1):
        x = torch.randn(1, size - missing)
        y = rk.edit(x, torch.ones(size - missing))
        assert y.data_ptr() == address, "the pool gives the same block again for an output of nearly the same size"
        assert torch.equal(x, y)
        behind = (ctypes.c_float * missing).from_address(address + 4 * (size - missing))
        assert all(value != value for value in behind)
        del y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 7, 130])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_is_read_beside_the_inputs(
    operation: str, d: int, dtype: torch.dtype, implementation: Implementation
) -> None:
    """Inputs in the midst of NaNs, and at an odd address."""
    tensors, grads = arguments(operation, (5, d), dtype), upstream((5, d), dtype)

    def amid(t: Tensor) -> Tensor:
        wide = t.new_full((*t.shape[:-1], d + 2), float("nan"))
        wide[..., 1:-1] = t
        return wide[..., 1:-1]

    inside = {name: amid(t) for name, t in tensors.items()}
    asking = {name: t.requires_grad_() for name, t in inside.items()}
    results = outputs_of(fused(operation, asking))
    found = torch.autograd.grad(results, list(asking.values()), [amid(g) for g in grads[: len(results)]])
    plain = run(fused, operation, tensors, grads)
    expected = list(plain.values())
    for value, other in zip((*results, *found), expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_inputs_are_never_written(operation: str, shape: tuple[int, int], implementation: Implementation) -> None:
    tensors, grads = arguments(operation, shape), upstream(shape, torch.float32)
    asking = leaves(tensors, device=implementation.device)
    grads = tuple(g.to(implementation.device) for g in grads)
    before = {name: t.detach().clone() for name, t in asking.items()}
    results = outputs_of(fused(operation, asking, **_options(operation, shape[0])))
    saved = [t.detach().clone() for t in results]
    upstream_before = [g.clone() for g in grads]
    torch.autograd.grad(results, list(asking.values()), grads[: len(results)])
    assert all(torch.equal(t, before[name]) for name, t in asking.items())
    assert all(map(torch.equal, results, saved))
    assert all(map(torch.equal, grads, upstream_before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "shape",
    [
        (33, 130),
        pytest.param((199, 769), marks=pytest.mark.nightly),
        pytest.param((700, 1024), marks=pytest.mark.not_interpreted),
    ],
    ids=str,
)
def test_same_bits_twice_and_for_any_number_of_threads(
    shape: tuple[int, int], operation: str, dtype: torch.dtype, implementation: Implementation, threads: None
) -> None:
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype)
    options = _options(operation, shape[0])
    torch.set_num_threads(1)
    first = _seeded(operation, tensors, grads, **options)
    assert same_bits(_seeded(operation, tensors, grads, **options), first)
    if implementation.variant is None:
        return  # PyTorch's own sums depend on the number of threads
    for count in (2, 3):
        torch.set_num_threads(count)
        assert same_bits(_seeded(operation, tensors, grads, **options), first), count


@compiled_only
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_for_any_number_of_threads_with_edit_ids(operation: str, threads: None) -> None:
    shape = (700, 769)
    tensors, grads = arguments(operation, shape, torch.bfloat16, edits=5), upstream(shape, torch.bfloat16)
    ids = torch.randint(0, 4, shape[:1])
    torch.set_num_threads(1)
    with rk.backend("cpu"):
        first = run(fused, operation, tensors, grads, edit_ids=ids)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert same_bits(run(fused, operation, tensors, grads, edit_ids=ids), first), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_share_no_memory(operation: str, dtype: torch.dtype, implementation: Implementation) -> None:
    tensors = {name: t.to(implementation.device) for name, t in arguments(operation, (6, 4, 37), dtype).items()}
    for given in (tensors, {name: t if name == "x" else None for name, t in tensors.items()}):
        results = outputs_of(fused(operation, given))
        present = [t for t in given.values() if t is not None]
        memory = {t.untyped_storage().data_ptr() for t in (*results, *present)}
        assert len(memory) == len(results) + len(present)


@compiled_only
def test_pool_keeps_and_gives_back() -> None:
    cpu.trim_memory()
    with rk.backend("cpu"):
        y = rk.edit(torch.randn(1024, 1024))
        assert cpu.kept_memory() < 4 << 20
        del y
        assert cpu.kept_memory() >= 4 << 20
        assert cpu.trim_memory() >= 4 << 20
    assert cpu.kept_memory() == 0


@compiled_only
def test_without_the_pool_memory_is_torchs_own() -> None:
    cpu.trim_memory()
    with rk.backend("cpu"):
        with cpu.without_pool():
            y = rk.edit(torch.randn(1024, 1024))
            with cpu.without_pool():
                pass
            rk.edit(torch.randn(1024, 1024))
        assert cpu.kept_memory() == 0
        z = rk.edit(torch.randn(1024, 1024))
        del y
        assert cpu.kept_memory() == 0
        del z
        assert cpu.kept_memory() >= 4 << 20


@compiled_only
def test_a_view_keeps_pooled_memory_alive() -> None:
    with rk.backend("cpu"):
        row = rk.edit(torch.ones(1024, 1024))[5]
        rk.edit(torch.zeros(1024, 1024))
        assert bool((row == 1).all())
