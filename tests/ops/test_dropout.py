"""Dropout inside the operations: the mask is Philox's, the same on every backend, and made again rather than stored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from op_cases import (
    DTYPES,
    WITH_DROPOUT,
    WITH_NORM_BEHIND,
    Implementation,
    arguments,
    assert_as_good_as,
    call,
    drawn_factor,
    eager,
    exact,
    fused,
    leaves,
    outputs_of,
    run,
    same_bits,
    upstream,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import red_kernels as rk
from red_kernels.functional import EditAddFunction

SEED = 0x1234_5678_9ABC_DEF


def mask_of(shape: tuple[int, ...], p: float, seed: int = SEED, dtype: torch.dtype = torch.float32) -> Tensor:
    """The factors in use, from an edit that does nothing else."""
    x = torch.ones(shape, dtype=dtype)
    return call(EditAddFunction.apply, x, None, None, None, None, torch.tensor([seed]), p)


# Known answers of Philox4x32-10, published with Random123 (kat_vectors).
def test_philox_known_answer_of_zeros() -> None:
    found = rk.reference.philox_words(torch.tensor([0]), 1, 4)
    assert [f"{word:08x}" for word in found[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_philox_known_answer_with_all_bits_set() -> None:
    """The rounds themselves, on counters that no activation is large enough to reach."""
    ones = torch.full((1, 1), 0xFFFFFFFF)
    found = rk.reference.philox_rounds([ones] * 4, torch.tensor([-1]))
    assert [f"{int(word):08x}" for word in found] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_words_are_counted_by_row_and_column() -> None:
    """A part of a larger activation has the words of its rows and columns."""
    seed = torch.tensor([SEED])
    words = rk.reference.philox_words(seed, 9, 40)
    assert torch.equal(words[:5, :13], rk.reference.philox_words(seed, 5, 13))
    assert words.unique().numel() > 350
    assert int(words.min()) >= 0
    assert int(words.max()) < 2**32


@pytest.mark.parametrize("seed", [0, 1, SEED, -1, 2**62 - 1])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (70, 130), (5, 769)], ids=str)
def test_mask_is_that_of_the_reference(
    shape: tuple[int, int], p: float, seed: int, implementation: Implementation
) -> None:
    keep = rk.reference.philox_words(torch.tensor([seed]), *shape) >= round(p * 2**32)
    factor = torch.tensor(1.0 / (1.0 - p), dtype=torch.float64).float()
    assert torch.equal(mask_of(shape, p, seed), torch.where(keep, factor, torch.zeros(())))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_and_expectation(p: float, implementation: Implementation) -> None:
    """Within five standard deviations of a binomial count, which one seed in a million exceeds; the seed is fixed."""
    shape = (500, 769)
    count = math.prod(shape)
    kept = int(mask_of(shape, p).count_nonzero())
    deviation = math.sqrt(count * p * (1 - p))
    assert abs(kept - count * (1 - p)) <= 5 * deviation
    # so the mean of the factors is 1 within that deviation, scaled as they are
    assert abs(float(mask_of(shape, p).double().mean()) - 1.0) <= 5 * deviation / (count * (1 - p)) + 2.0**-24


def test_rows_and_seeds_are_independent(implementation: Implementation) -> None:
    """Of two masks at p = 1/2, half the elements agree."""
    bound = 5 * math.sqrt(769 * 0.25)
    first = mask_of((2, 769), 0.5) != 0
    for other in (first[1], mask_of((1, 769), 0.5, SEED + 1)[0] != 0, mask_of((1, 769), 0.5, SEED + 2**32)[0] != 0):
        assert abs(int((first[0] == other).sum()) - 769 / 2) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_error_at_most_that_of_eager(
    operation: str, edits: int | None, dtype: torch.dtype, implementation: Implementation
) -> None:
    """Against the composition that multiplies by the same mask."""
    shape, p = (65, 130), 0.25
    tensors, grads = arguments(operation, shape, dtype, edits=edits), upstream(shape, dtype)
    options: dict[str, Any] = {} if edits is None else {"edit_ids": torch.arange(65) % 3}
    draws = {"dropout_p": p, "training": True, **options}
    factor = drawn_factor(5, p, shape)
    found = run(fused, operation, tensors, grads, **draws)
    expected = exact(operation, tensors, grads, factor=factor, **options)
    assert_as_good_as(found, run(eager, operation, tensors, grads, factor=factor, **options), expected)


@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_the_mask_is_made_again_without_z(operation: str, implementation: Implementation) -> None:
    shape = (33, 130)
    tensors, grads = arguments(operation, shape), upstream(shape, torch.float32, number=1)
    draws = {"dropout_p": 0.5, "training": True, "need_z": False}
    factor = drawn_factor(5, 0.5, shape)
    found = run(fused, operation, tensors, grads, **draws)
    expected = exact(operation, tensors, grads, factor=factor, need_z=False)
    assert_as_good_as(found, run(eager, operation, tensors, grads, factor=factor, need_z=False), expected)


@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_reproducible_from_torchs_seed(operation: str, implementation: Implementation) -> None:
    tensors, grads = arguments(operation, (33, 130)), upstream((33, 130), torch.float32)

    def draw(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return run(fused, operation, tensors, grads, dropout_p=0.5, training=True)

    first = draw(3)
    assert same_bits(draw(3), first)
    assert not same_bits(draw(4), first)
    torch.manual_seed(3)
    draws = [outputs_of(fused(operation, tensors, dropout_p=0.5, training=True))[0] for _ in range(2)]
    assert not torch.equal(*draws), "each call draws anew"


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"dropout_p": 0.0, "training": True}], ids=str)
@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_no_dropout(operation: str, options: dict[str, Any], implementation: Implementation) -> None:
    """In evaluation, and with p = 0: no element is dropped and no random number is used up."""
    tensors, grads = arguments(operation, (33, 130)), upstream((33, 130), torch.float32)
    states = (torch.get_rng_state, torch.cuda.get_rng_state)[: 2 if implementation.device == "cuda" else 1]
    before = [state() for state in states]
    assert same_bits(run(fused, operation, tensors, grads, **options), run(fused, operation, tensors, grads))
    assert all(torch.equal(state(), value) for state, value in zip(states, before, strict=True))


@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_everything_dropped(operation: str, implementation: Implementation) -> None:
    tensors, grads = arguments(operation, (33, 130)), upstream((33, 130), torch.float32)
    found = run(fused, operation, tensors, grads, dropout_p=1.0, training=True)
    assert torch.equal(found["z" if "z" in found else "y"], tensors["residual"])
    for name in ("d x", "d scale", "d bias"):
        assert not found[name].any(), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_dropped_elements_do_not_hide_what_is_no_number(value: float, implementation: Implementation) -> None:
    """As in torch's own dropout, where a dropped element is one times zero."""
    x = torch.full((3, 37), value)
    dropped = call(rk.edit_add, x, torch.zeros(3, 37), dropout_p=1.0, training=True)
    assert torch.equal(dropped.isnan(), torch.nn.functional.dropout(x, 1.0).isnan())
    assert bool(dropped.isnan().all())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_activation_checkpointing_makes_the_same_mask(
    operation: str, reentrant: bool, implementation: Implementation
) -> None:
    device = implementation.device  # checkpointing keeps the generator's state of the devices of its arguments
    tensors = leaves(arguments(operation, (33, 130)), device=device)
    grads = tuple(g.to(device) for g in upstream((33, 130), torch.float32))
    calls = 0

    def block(*values: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return outputs_of(fused(operation, dict(zip(tensors, values, strict=True)), dropout_p=0.5, training=True))

    found = []
    for wrapped in (block, lambda *values: checkpoint(block, *values, use_reentrant=reentrant)):
        torch.manual_seed(3)
        asking = leaves(tensors)
        results = wrapped(*asking.values())
        torch.rand(5, device=device)  # the generator has gone on when the backward comes
        torch.autograd.backward(results, grads[: len(results)])
        found.append([*results, *(t.grad for t in asking.values())])
    assert calls == 3, "the checkpointed block ran again"
    assert all(map(torch.equal, *found))


def test_the_mask_is_not_stored(implementation: Implementation) -> None:
    tensors = leaves(arguments("edit_add", (33, 130)), device=implementation.device)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        fused("edit_add", tensors, dropout_p=0.5, training=True)
    assert sorted(sizes) == [1, 130, 33 * 130]  # the seed, scale and x
