"""The CPU kernels for AArch64: NEON, and NEON with bf16 instructions, cross-compiled and run under qemu-user.

Nothing here runs on real hardware: see docs/aarch64.md. On a machine of that architecture the tests of all
implementations run its own kernels.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulated_cpu
import machine_code
import mix_cases
import pytest
import torch
from emulated_cpu import OBJECTS, PROCESSORS, Processor
from halves import EVERY_HALF, assert_same_numbers, between, rows_of
from machine_code import Function, Loop
from op_cases import (
    ARGUMENTS,
    DTYPES,
    HALVES,
    OPERATIONS,
    WITH_DROPOUT,
    WITH_NORM_BEHIND,
    WITH_WEIGHT_OFFSET,
    Results,
    Tensors,
    arguments,
    assert_as_good_as,
    drawn_factor,
    eager,
    fused,
    kept_and_not,
    run,
    same_bits,
    truth,
    upstream,
)
from torch import Tensor

import red_kernels as rk
from red_kernels import backends
from red_kernels.backends.arguments import Norm, affine_edit

pytestmark = pytest.mark.skipif(emulated_cpu.why_not() is not None, reason=str(emulated_cpu.why_not()))

# Whole vectors and tails, more columns than are swept at a time, rows in several chunks. Tails of every length are in
# `case_of_tails`.
SHAPES = [(3, 1), (3, 576), (3, 769), (3, 1760), (2, 5, 96), (199, 7), (1, 8192), (70, 130)]
TAILS = range(1, 36)


@pytest.fixture(scope="session")
def program() -> Path:
    return emulated_cpu.build_program()


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request: pytest.FixtureRequest, program: Path) -> Iterator[Processor]:
    found = Processor(program, request.param)
    assert found.use().split()[0] == PROCESSORS[request.param]
    yield found
    found.close()


@pytest.fixture
def emulated(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> Iterator[Processor]:
    """The public operations run on the emulated processor."""
    monkeypatch.setitem(backends._known.by_name, "cpu", processor.backend)
    with rk.backend("cpu"):
        yield processor


# ---- which instruction set is used


@pytest.mark.parametrize(
    ("cpu", "setting", "answer"),
    [
        ("cortex-a72", "", "neon neon"),
        ("max", "", "neon_bf16 neon neon_bf16"),
        ("max", "neon", "neon neon neon_bf16"),
        (
            "cortex-a72",
            "neon_bf16",
            "RED_KERNELS_CPU is 'neon_bf16', expected one that this processor can run: neon",
        ),
        ("max", "avx2", "RED_KERNELS_CPU is 'avx2', expected one that this processor can run: neon, neon_bf16"),
    ],
)
def test_the_set_that_is_used(cpu: str, setting: str, answer: str, program: Path) -> None:
    found = Processor(program, cpu, RED_KERNELS_CPU=setting)
    assert found.use() == answer
    found.close()


def test_another_set_may_be_used(program: Path) -> None:
    found = Processor(program, "max")
    assert [found.use(name) for name in ("neon", "neon_bf16")] == ["neon neon neon_bf16", "neon_bf16 neon neon_bf16"]
    assert found.use("base").startswith("RED_KERNELS_CPU is 'base', expected")
    assert found.use() == "neon_bf16 neon neon_bf16"
    found.close()


def test_memory_is_kept_and_given_back(processor: Processor) -> None:
    for size in (1 << 17, 3 << 20):
        assert processor.pool(size) >= size


# ---- conversions

by_eights = pytest.mark.parametrize("by_eights", [False, True], ids=["fours", "eights"])


@by_eights
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_widened_exactly(dtype: torch.dtype, by_eights: bool, processor: Processor) -> None:
    assert_same_numbers(processor.widen(EVERY_HALF.view(dtype), by_eights), EVERY_HALF.view(dtype).float())


@by_eights
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fp32_is_narrowed_to_the_nearest_and_even(dtype: torch.dtype, by_eights: bool, processor: Processor) -> None:
    values = between(dtype)
    assert_same_numbers(processor.narrow(values, dtype, by_eights), values.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernels_round_to_the_nearest_and_even(dtype: torch.dtype, emulated: Processor) -> None:
    for bias in rows_of(between(dtype)[::7]):
        found = rk.edit(torch.zeros(1, len(bias), dtype=dtype), torch.ones(len(bias)), bias)
        assert_same_numbers(found[0], (bias + 0.0).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_kernels_widen_exactly(dtype: torch.dtype, emulated: Processor) -> None:
    for halves in rows_of(EVERY_HALF.view(dtype)):
        d = len(halves)
        found = emulated.edit_backward(halves[None], None, None, None, None, 0.0, 1, (False, False, True))
        assert_same_numbers(found[2], halves.float() + 0.0)
        norm = emulated.norm_edit_forward(halves[None, :5], None, None, None, None, None, 1e-5, 0.0, True)
        assert d >= 5
        expected = rk.reference.norm_edit_forward(halves[None, :5], Norm(None, None, 1e-5, 0.0, True), affine_edit())
        assert torch.equal(norm[0].isnan(), expected[0].isnan())


# ---- operations


Trial = tuple[Tensors, tuple[Tensor, ...]]
MixedCase = tuple[Tensors, tuple[Tensor, ...], Results, Results]


@dataclass(frozen=True)
class Case:
    """What an operation is called with, several times, what eager PyTorch makes of it, and what is right."""

    operation: str
    trials: list[Trial]
    options: dict[str, Any]
    peer: Results
    expected: Results

    def hold(self) -> None:
        """As test_operations.py holds every other implementation."""
        found = joined([run(fused, self.operation, *trial, **self.options) for trial in self.trials])
        try:
            assert_as_good_as(found, self.peer, self.expected)
        except AssertionError as error:
            raise AssertionError(f"{tuple(self.trials[0][0]['x'].shape)}: {error}") from error


def joined(trials: list[Results]) -> Results:
    """The results of several trials, of whatever shapes, as one."""
    return {name: torch.cat([trial[name].flatten() for trial in trials]) for name in trials[0]}


def case(operation: str, trials: list[Trial], **options: Any) -> Case:
    peer = joined([run(eager, operation, *trial, **options) for trial in trials])
    expected = joined([truth(operation, *trial, **options) for trial in trials])
    return Case(operation, trials, options, peer, expected)


@functools.cache  # for both processors
def cases_of_widths(operation: str, dtype: torch.dtype) -> list[Case]:
    found = []
    for shape in SHAPES:
        # One number has no mean error: many trials have.
        trials = [
            (arguments(operation, shape, dtype, seed=seed), upstream(shape, dtype, seed=seed))
            for seed in range(32 if shape[-1] == 1 else 1)
        ]
        # RMSNorm of one number is its sign, and the gradient a difference of equals. An eps of the numbers' size leaves
        # digits to compare.
        options = {"eps": 1.0} if operation in WITH_WEIGHT_OFFSET and shape[-1] == 1 else {}
        found.append(case(operation, trials, **options))
    return found


@functools.cache
def case_of_tails(operation: str, dtype: torch.dtype) -> Case:
    """Rows of few numbers of every count: one case, as each by itself has too few for a mean error."""
    trials = [(arguments(operation, (5, d), dtype, seed=d), upstream((5, d), dtype, seed=d)) for d in TAILS]
    return case(operation, trials, **({"eps": 1.0} if "norm" in operation else {}))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_error_at_most_that_of_eager(operation: str, dtype: torch.dtype, emulated: Processor) -> None:
    for of_width in cases_of_widths(operation, dtype):
        of_width.hold()
    case_of_tails(operation, dtype).hold()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_WEIGHT_OFFSET)
def test_weight_offset(operation: str, dtype: torch.dtype, emulated: Processor) -> None:
    trial = (arguments(operation, (65, 130), dtype), upstream((65, 130), dtype))
    case(operation, [trial], weight_offset=1.0).hold()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_stores_past_the_cache(operation: str, dtype: torch.dtype, emulated: Processor) -> None:
    """For large outputs; the results are the same."""
    tensors, grads = arguments(operation, (9, 147), dtype), upstream((9, 147), dtype)
    found = run(fused, operation, tensors, grads)
    assert same_bits(found, run(fused, operation, tensors, grads))
    emulated.stream = True
    try:
        assert same_bits(found, run(fused, operation, tensors, grads))
    finally:
        emulated.stream = False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_dropout(operation: str, dtype: torch.dtype, emulated: Processor) -> None:
    shape = (37, 150)
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype)
    factor = drawn_factor(5, 0.3, shape)
    kept = (factor != 0).double().mean()
    assert 0.6 < kept < 0.8
    torch.manual_seed(5)
    found = run(fused, operation, tensors, grads, dropout_p=0.3, training=True)
    options = {"z_as": found["z"]} if operation in WITH_NORM_BEHIND else {}
    peer = run(eager, operation, tensors, grads, factor=factor, **options)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    expected = run(eager, operation, wide, tuple(g.double() for g in grads), factor=factor, **options)
    assert_as_good_as(found, peer, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_edits_of_their_own_for_rows(operation: str, dtype: torch.dtype, emulated: Processor) -> None:
    shape = (150, 45)
    tensors, grads = arguments(operation, shape, dtype, edits=3), upstream(shape, dtype)
    ids = torch.randint(3, shape[:1], generator=torch.Generator().manual_seed(1))
    case(operation, [(tensors, grads)], edit_ids=ids).hold()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_argument_may_be_absent(operation: str, emulated: Processor) -> None:
    names = ARGUMENTS[operation][1:]
    for count in range(1, len(names) + 1):
        for absent in itertools.combinations(names, count):
            tensors = arguments(operation, (33, 70), torch.bfloat16) | dict.fromkeys(absent)
            case(operation, [(tensors, upstream((33, 70), torch.bfloat16))]).hold()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_without_z(operation: str, dtype: torch.dtype, emulated: Processor) -> None:
    tensors, grads = arguments(operation, (70, 130), dtype), upstream((70, 130), dtype, number=1)
    case(operation, [(tensors, grads)], need_z=False).hold()
    for shape in ((70, 130), (5, 77)):
        for absent in ((), ("residual",), ("scale", "bias")):
            for drawn in ({}, {"dropout_p": 0.25, "training": True}):
                tensors = arguments(operation, shape, dtype) | dict.fromkeys(absent)
                kept, made_again = kept_and_not(operation, tensors, upstream(shape, dtype)[0], **drawn)
                assert same_bits(made_again, kept), (shape, absent, drawn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["edit_add_layer_norm", "layer_norm_edit"])
def test_rows_of_equal_values(operation: str, dtype: torch.dtype, emulated: Processor) -> None:
    """Their variance is zero, of which a plain sum of squares leaves something."""
    tensors = dict.fromkeys(ARGUMENTS[operation]) | {"x": torch.full((2, 5003), -63968.0, dtype=dtype)}
    found = fused(operation, tensors)
    assert not (found[0] if isinstance(found, tuple) else found).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_not_finite(operation: str, dtype: torch.dtype, value: float, emulated: Processor) -> None:
    """It comes out where the reference has it, in whole vectors and in the tail, and nowhere else."""
    for column in (5, 38):
        tensors, grads = arguments(operation, (3, 39), dtype), upstream((3, 39), dtype)
        tensors["x"][1, column] = value
        found = run(fused, operation, tensors, grads)
        with rk.backend("reference"):
            expected = run(fused, operation, tensors, grads)
        for name in expected:
            assert torch.equal(found[name].isnan(), expected[name].isnan()), name
            assert torch.equal(found[name].isinf(), expected[name].isinf()), name


# ---- mixes: rotations, and reflections of blocks with whole vectors, tails, and single columns

MIXED = [
    ((3, 64), 0), ((70, 192), 0), ((2, 5, 1024), 0), ((70, 130), 1), ((3, 1760), 4), ((5, 769), 1), ((9, 102), 3),
]  # fmt: skip


@functools.cache  # for both processors
def mixed(operation: str, shape: tuple[int, ...], blocks: int, dtype: torch.dtype, single: bool) -> MixedCase:
    tensors = mix_cases.arguments(operation, shape, dtype, blocks=blocks)
    if single:
        tensors["second"] = None
    grads = upstream(shape, dtype)
    results = (each(operation, tensors, grads, blocks=blocks) for each in (_eager_mix, mix_cases.truth))
    return tensors, grads, *results


def _eager_mix(operation: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> Results:
    return mix_cases.run(mix_cases.eager, operation, tensors, grads, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", mix_cases.OPERATIONS)
def test_error_of_mixes(operation: str, dtype: torch.dtype, emulated: Processor) -> None:
    for shape, blocks in MIXED:
        for single in (False, True)[: 1 + (blocks > 0)]:
            tensors, grads, peer, expected = mixed(operation, shape, blocks, dtype, single)
            found = mix_cases.run(mix_cases.fused, operation, tensors, grads, blocks=blocks)
            emulated.stream = True
            try:
                assert same_bits(found, mix_cases.run(mix_cases.fused, operation, tensors, grads, blocks=blocks))
            finally:
                emulated.stream = False
            try:
                assert_as_good_as(found, peer, expected)
            except AssertionError as error:
                raise AssertionError(f"{shape}, {blocks} blocks, single: {single}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks", [0, 4])
@pytest.mark.parametrize("operation", mix_cases.OPERATIONS)
def test_edits_and_dropout_of_mixes(operation: str, blocks: int, dtype: torch.dtype, emulated: Processor) -> None:
    shape = (70, 192)
    tensors, grads = mix_cases.arguments(operation, shape, dtype, blocks=blocks, edits=3), upstream(shape, dtype)
    ids = torch.randint(3, shape[:1], generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"blocks": blocks, "edit_ids": ids}
    drawn: dict[str, Any] = {}
    if operation != "mix":
        drawn = {"dropout_p": 0.3, "training": True}
        given["factor"] = drawn_factor(5, 0.3, shape)
    torch.manual_seed(5)
    found = mix_cases.run(mix_cases.fused, operation, tensors, grads, blocks=blocks, edit_ids=ids, **drawn)
    peer = mix_cases.run(mix_cases.eager, operation, tensors, grads, **given)
    assert_as_good_as(found, peer, mix_cases.exact(operation, tensors, grads, **given))


def test_writes_outside_of_an_output_are_seen(program: Path) -> None:
    found = Processor(program, "max")
    values = [1, 0, 1, 12, 1, *[0] * 8]
    x = torch.zeros(12)  # no multiple of 8: the last store has four too many
    with pytest.raises(AssertionError, match="a kernel wrote outside of its output"):
        found.call("narrow", 1, values, {"x": torch.cat([x, x])})


# ---- machine code


@pytest.fixture(scope="module", params=list(PROCESSORS.values()))
def rows(request: pytest.FixtureRequest, program: Path) -> list[Function]:
    """The functions of an instruction set that go over rows."""
    if machine_code.find_objdump("aarch64") is None:
        pytest.skip("aarch64-linux-gnu-objdump was not found")
    objects = (OBJECTS / f"{prefix}{request.param}.o" for prefix in ("", "mix_"))
    functions = itertools.chain.from_iterable(machine_code.disassembled(path, "aarch64") for path in objects)
    found = [function for function in functions if "_rows<" in function.name]
    assert all(f"red::{request.param}::" in function.name for function in found)
    return found


def kernel(function: Function) -> str:
    """'edit_norm_forward<red::BFloat16' for a function of that kernel and type."""
    name = function.name.partition("(")[0].rpartition("::")[2] if "<float" in function.name else function.name
    return (
        name.partition("_rows<")[0].rpartition("::")[2] + "<" + function.name.partition("_rows<")[2].partition(",")[0]
    )


def test_every_kernel_has_row_loops(rows: list[Function]) -> None:
    loops = Counter({kernel(function): sum(loop.computes() for loop in function.loops()) for function in rows})
    kinds = ("edit", "edit_norm", "norm_edit", "mix", "mix_norm")
    names = {f"{kind}_{way}" for kind in kinds for way in ("forward", "backward")}
    # A set for bf16 has the other types' kernels of the set before it.
    more = () if "red::neon_bf16::" in rows[0].name else ("float", "red::Float16")
    assert set(loops) == {f"{name}<{dtype}" for name in names for dtype in ("red::BFloat16", *more)}
    assert min(loops.values()) >= 1
    assert all(count >= 2 for name, count in loops.items() if "norm" in name), loops


@pytest.mark.parametrize(
    "check",
    [Loop.vector_spills, Loop.scalar_conversions, Loop.single_elements, Loop.calls],
    ids=lambda check: check.__name__,
)
def test_row_loops_have_no(check: Callable[[Loop], list[str]], rows: list[Function]) -> None:
    assert machine_code.faults(rows, check) == []


def test_row_loops_read_few_pointers_again(rows: list[Function]) -> None:
    """With dropout, or for a backward without z, there are more places to read than registers.

    One load in a loop, or one in sixteen instructions, is no loss. What a loop itself changes is never put aside, but
    by the backward of a mix behind a norm where it looks at its flags in each column.
    """
    for function in rows:
        for loop in function.loops():
            if loop.computes():
                spills = loop.general_spills()
                assert len(spills) <= max(1, len(loop.instructions) // 16), f"{function.name}: {spills}"
                put_aside = [text for text in spills if ": st" in text]
                assert not put_aside or "mix_norm_backward" in function.name, f"{function.name}: {spills}"


def test_row_loops_convert_by_the_instructions_of_their_set(rows: list[Function]) -> None:
    for function in rows:
        used = Counter(i.operation for loop in function.loops() if loop.computes() for i in loop.instructions)
        bf16, fp16 = "red::BFloat16" in function.name, "red::Float16" in function.name
        native_bf16 = "red::neon_bf16::" in function.name
        to_bf16 = {operation for operation in used if operation.startswith("bfcvt")}
        assert to_bf16 <= ({"bfcvtn", "bfcvtn2"} if bf16 and native_bf16 else set()), function.name
        writes = "forward" in function.name
        if bf16 and writes:
            assert used["bfcvtn" if native_bf16 else "raddhn"], function.name
        if fp16:
            assert used["fcvtl"], function.name
            assert used["fcvtn"] or not writes, function.name
