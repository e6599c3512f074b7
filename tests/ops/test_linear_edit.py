"""`linear_edit` as one Triton kernel: what it computes, and where it is used in place of the composed form."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launch_tables import MEASURED, TABLE
from op_cases import DTYPES, HALVES, Tensors, assert_as_good_as, call, device_of, widened
from torch import Tensor
from torch.autograd import forward_ad

import red_kernels as rk

pytest.importorskip("triton", reason="Triton is not installed")

from red_kernels.backends.arguments import affine_edit
from red_kernels.backends.triton import launch, linear, tuned
from red_kernels.backends.triton.rules import Architecture

MISSING = rk.available_backends()["triton"]
OPTIONAL = ("linear_bias", "scale", "bias", "residual")


def runs_the_kernel(test: Any) -> Any:
    """Marks a test that needs the backend, in Triton's interpreter or on a GPU."""
    return pytest.mark.implementations(pytest.mark.skipif(MISSING is not None, reason=f"no Triton: {MISSING}")(test))


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the kernel was called with, each time."""
    found: list[tuple[Any, ...]] = []
    kernel = linear._linear_edit

    def counted(*arguments: Any) -> None:
        found.append(arguments)
        kernel(*arguments)

    monkeypatch.setattr(linear, "_linear_edit", counted)
    return found


def _tensors(
    lead: int | tuple[int, ...],
    d: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    *,
    vectors: torch.dtype = torch.float32,
    edits: int | None = None,
) -> Tensors:
    """Random tensors in the order of the arguments; the product is about 1."""
    draw = torch.Generator().manual_seed(0)
    lead = (lead,) if isinstance(lead, int) else lead
    size = (d,) if edits is None else (edits, d)
    return {
        "x": torch.randn(*lead, k, generator=draw).to(dtype),
        "weight": (torch.randn(d, k, generator=draw) / k**0.5).to(dtype),
        "linear_bias": torch.randn(d, generator=draw).to(dtype),
        "scale": (torch.randn(size, generator=draw) + 0.5).to(vectors),
        "bias": torch.randn(size, generator=draw).to(vectors),
        "residual": torch.randn(*lead, d, generator=draw).to(dtype),
    }


def _composed(tensors: Tensors, edit_ids: Tensor | None = None) -> Tensor:
    """What a user would write, each step rounded."""
    h = F.linear(tensors["x"], tensors["weight"], tensors["linear_bias"])
    dtype = h.dtype
    for name, step in (("scale", torch.mul), ("bias", torch.add)):
        vector = tensors[name]
        if vector is not None:
            h = step(h, vector if edit_ids is None else vector[edit_ids])
    h = h.to(dtype)
    return h if tensors["residual"] is None else tensors["residual"] + h


def _public(tensors: Tensors, **options: Any) -> Tensor:
    with rk.backend("triton"):
        return call(rk.linear_edit, *tensors.values(), **options)


def _assert_as_good_as_composed(tensors: Tensors, **options: Any) -> None:
    with linear.force(True):
        found = _public(tensors, **options)
    expected = _composed(widened(tensors), **options)
    assert_as_good_as({"z": found}, {"z": _composed(tensors, **options)}, {"z": expected})


@runs_the_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lead", "d", "k"),
    [
        (1, 40, 24), (3, 33, 70), (3, 1, 9), (16, 768, 264), (199, 130, 75), (199, 769, 64), ((2, 5), 96, 7),
        (40, 100, 256), (300, 64, 129), ((), 48, 32),
    ],
    ids=str,
)  # fmt: skip
def test_error_at_most_that_of_the_composition(
    lead: Any, d: int, k: int, dtype: torch.dtype, launches: list[tuple[Any, ...]]
) -> None:
    _assert_as_good_as_composed(_tensors(lead, d, k, dtype))
    assert len(launches) == 1


@runs_the_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "absent", [absent for n in range(1, 5) for absent in itertools.combinations(OPTIONAL, n)], ids="-".join
)
def test_any_argument_may_be_absent(
    absent: tuple[str, ...], dtype: torch.dtype, launches: list[tuple[Any, ...]]
) -> None:
    _assert_as_good_as_composed(_tensors(33, 70, 40, dtype) | dict.fromkeys(absent))
    assert len(launches) == 1


@runs_the_kernel
@pytest.mark.parametrize("vectors", [*HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_of_other_dtypes(dtype: torch.dtype, vectors: torch.dtype, launches: list[tuple[Any, ...]]) -> None:
    tensors = _tensors(33, 70, 40, dtype, vectors=vectors)
    if vectors == torch.float64:  # which the kernel reads as fp32
        tensors |= {name: tensors[name].float().double() for name in ("scale", "bias")}
    with linear.force(True):
        found = _public(tensors)
    assert len(launches) == 1
    # The composition in fp32 holds what comes in, and is rounded once.
    wide = {name: t.float() for name, t in tensors.items()}
    assert_as_good_as({"z": found}, {"z": _composed(wide).to(dtype)}, {"z": _composed(widened(tensors))})


@runs_the_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("absent", [(), ("scale",), ("bias",), ("residual", "linear_bias")], ids="-".join)
def test_rows_with_their_own_edits(
    absent: tuple[str, ...], dtype: torch.dtype, launches: list[tuple[Any, ...]]
) -> None:
    tensors = _tensors((5, 11), 70, 40, dtype, edits=9) | dict.fromkeys(absent)
    ids = torch.randint(0, 9, (5, 11), generator=torch.Generator().manual_seed(0))
    _assert_as_good_as_composed(tensors, edit_ids=ids)
    assert len(launches) == 1


@runs_the_kernel
@pytest.mark.parametrize("absent", [(), ("scale",), ("bias",)], ids="-".join)
def test_a_row_without_an_edit_is_nan(absent: tuple[str, ...]) -> None:
    """And no other: on a GPU nobody looks at the values of ``edit_ids`` before."""
    device = device_of("triton")
    tensors = _tensors(7, 70, 40, edits=3) | dict.fromkeys(absent)
    x, weight, linear_bias, scale, bias, residual = (None if t is None else t.to(device) for t in tensors.values())
    ids = torch.tensor([0, 3, 1, -1, 2, 2**40, 2], device=device)
    z = linear.run(x, weight, linear_bias, residual, affine_edit(scale, bias, ids))
    wrong = torch.tensor([1, 3, 5])
    assert bool(z[wrong].isnan().all())
    right = torch.tensor([0, 2, 4, 6])
    clamped = affine_edit(scale, bias, ids.clamp(0, 2))
    assert torch.equal(z[right], linear.run(x, weight, linear_bias, residual, clamped)[right])
    assert not z[right].isnan().any()


@runs_the_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype, launches: list[tuple[Any, ...]]) -> None:
    tensors = _tensors(33, 72, 48, dtype)
    layouts = {
        "transposed": lambda t: t.t().contiguous().t() if t.dim() == 2 else t,
        "every other": lambda t: t.repeat_interleave(2, -1)[..., ::2],
        "odd address": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
        "expanded": lambda t: t[:1].expand(t.shape),
    }
    for name, layout in layouts.items():
        laid = {key: layout(t) for key, t in tensors.items()}
        assert any(not t.is_contiguous() or t.storage_offset() for t in laid.values()), name
        _assert_as_good_as_composed(laid)
    assert len(launches) == len(layouts)


@runs_the_kernel
@pytest.mark.parametrize("lead", [0, (3, 0)], ids=str)
def test_no_rows(lead: Any, launches: list[tuple[Any, ...]]) -> None:
    tensors = _tensors(lead, 40, 24, torch.bfloat16)
    with linear.force(True):
        z = _public(tensors)
    assert z.shape == tensors["residual"].shape
    assert z.dtype == torch.bfloat16
    assert not launches


@runs_the_kernel
@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize(
    ("m", "d", "k", "dtype"),
    [
        (300, 200, 24, torch.float32), (256, 320, 64, torch.bfloat16), (1300, 40, 16, torch.float16),
        (520, 448, 20, torch.bfloat16), (33, 1000, 24, torch.float32),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("edits", [None, 3])
def test_several_tiles_for_a_program(
    m: int,
    d: int,
    k: int,
    dtype: torch.dtype,
    edits: int | None,
    multiprocessors: int,
    launches: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And none left out or behind the last column, whatever order they are taken in."""
    few = replace(launch.architecture(torch.empty(0, device=device_of("triton"))), multiprocessors=multiprocessors)
    monkeypatch.setattr(linear, "architecture", lambda x: few)
    options = {} if edits is None else {"edit_ids": torch.arange(m) % edits}
    _assert_as_good_as_composed(_tensors(m, d, k, dtype, edits=edits), **options)
    ((grid, _, _, constants, *_),) = launches
    blocks = -(-m // constants[2]) * -(-d // constants[3])
    assert grid == (multiprocessors, 1, 1)
    assert blocks > multiprocessors


@runs_the_kernel
def test_whole_pieces_of_a_tile_behind_the_last_column(
    launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile is finished in pieces of 64 columns; of the second tile here one lies within and three behind."""
    one = replace(launch.architecture(torch.empty(0, device=device_of("triton"))), multiprocessors=1)
    monkeypatch.setattr(linear, "architecture", lambda x: replace(one, name="sm_90"))
    for edits in (None, 2):
        options = {} if edits is None else {"edit_ids": torch.arange(130) % edits}
        _assert_as_good_as_composed(_tensors(130, 320, 64, torch.bfloat16, edits=edits), **options)
        constants = launches[-1][3]
        assert (constants[3], constants[6]) == (256, 2)


@runs_the_kernel
def test_what_is_not_a_number_stays_in_its_row_and_column() -> None:
    """Rows and columns that fill up a tile repeat the first, and what lies behind the last term counts nothing."""
    tensors = _tensors(37, 41, 19, torch.bfloat16)
    tensors["x"][0] = float("nan")
    tensors["weight"][0] = float("inf")
    tensors["residual"][36, 40] = float("nan")
    with linear.force(True):
        z = _public(tensors)
    finite = torch.ones(37, 41, dtype=torch.bool)
    finite[0] = finite[:, 0] = False
    finite[36, 40] = False
    assert torch.equal(z.isfinite(), finite)


@runs_the_kernel
def test_the_product_is_not_rounded() -> None:
    """Nor does it overflow: the composed form rounds it to the activations' dtype."""
    x, weight = torch.full((3, 64), 40.0).half(), torch.full((16, 64), 40.0).half()
    vectors = {"linear_bias": torch.zeros(16).half(), "scale": torch.full((16,), 2.0**-10)}
    tensors = dict.fromkeys(_tensors(1, 1, 1)) | {"x": x, "weight": weight} | vectors
    with linear.force(True):
        z = _public(tensors)
    assert torch.equal(z, torch.full((3, 16), 100.0).half())
    with linear.force(False):
        assert bool(_public(tensors).isinf().all())


@runs_the_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    tensors = _tensors(70, 130, 75, dtype)
    with linear.force(True):
        assert torch.equal(_public(tensors), _public(tensors))


@runs_the_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_is_closed_by_default(dtype: torch.dtype, launches: list[tuple[Any, ...]]) -> None:
    t = _tensors(33, 72, 48, dtype)
    z = _public(t)
    assert not launches
    with rk.backend("triton"):
        h = call(F.linear, t["x"], t["weight"], t["linear_bias"])
        assert torch.equal(z, call(rk.edit_add, h, t["residual"], t["scale"], t["bias"]))


def _open(path: Path, monkeypatch: pytest.MonkeyPatch, *wins: tuple[str, int, int, int]) -> Architecture:
    """Use a table for this device that has these wins."""
    chip = launch.architecture(torch.empty(0, device=device_of("triton")))
    entries = [dict(zip(("dtype", "m", "n", "k"), win, strict=True)) for win in wins]
    entries = [entry | {"ratio": 1.1, "measured": [MEASURED]} for entry in entries]
    table = TABLE | {"architecture": chip.name, "warp": chip.warp, "entries": [], "linear_wins": entries}
    path.write_text(json.dumps(table))
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned.forget()
    return chip


@runs_the_kernel
def test_a_table_opens_the_gate_where_the_kernel_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: list[tuple[Any, ...]]
) -> None:
    _open(tmp_path / "table.json", monkeypatch, ("bfloat16", 32, 72, 48))
    for m, d, k, dtype, wins in (
        (32, 72, 48, torch.bfloat16, True), (17, 72, 48, torch.bfloat16, True), (16, 72, 48, torch.bfloat16, False),
        (33, 72, 48, torch.bfloat16, False), (32, 64, 48, torch.bfloat16, False), (32, 72, 64, torch.bfloat16, False),
        (32, 72, 48, torch.float16, False), (0, 72, 48, torch.bfloat16, False),
    ):  # fmt: skip
        before = len(launches)
        _public(_tensors(m, d, k, dtype))
        assert len(launches) - before == wins, (m, d, k, dtype)


@runs_the_kernel
def test_only_what_lies_in_memory_as_measured_goes_through_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launches: list[tuple[Any, ...]]
) -> None:
    _open(tmp_path / "table.json", monkeypatch, ("bfloat16", 32, 72, 48))
    given = _tensors(32, 72, 48, torch.bfloat16)
    for name, t in given.items():
        shifted = torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)
        for other in (shifted, t.repeat_interleave(2, -1)[..., ::2]):
            _public(given | {name: other})
            assert not launches, name
    with linear.force(False):
        _public(given)
    assert not launches
    _public(given)
    assert len(launches) == 1


@runs_the_kernel
def test_only_without_gradients(launches: list[tuple[Any, ...]]) -> None:
    for name in _tensors(1, 1, 1):
        given = _tensors(9, 40, 24)
        given[name].requires_grad_()
        results = []
        for use in (True, False):
            with linear.force(use):
                z = _public(given)
            (gradient,) = torch.autograd.grad(z.sum(), given[name])
            results.append((z, gradient))
        assert not launches, name
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name
        for context in (torch.no_grad(), torch.inference_mode()):
            with context, linear.force(True):
                assert not _public(given).requires_grad
            assert len(launches) == 1, name
            launches.clear()


@runs_the_kernel
def test_under_autocast_the_kernel_takes_the_autocast_dtype(launches: list[tuple[Any, ...]]) -> None:
    tensors = _tensors(9, 40, 24)
    half = {name: t.bfloat16() if name in ("x", "weight", "linear_bias") else t for name, t in tensors.items()}
    half["residual"] = None
    with torch.autocast(device_of("triton"), torch.bfloat16), linear.force(True):
        z = _public(tensors | {"residual": None})
    assert len(launches) == 1
    with linear.force(True):
        assert torch.equal(z, _public(half))
    assert z.dtype == torch.bfloat16


@runs_the_kernel
def test_a_residual_of_another_dtype_takes_the_composed_form(launches: list[tuple[Any, ...]]) -> None:
    tensors = _tensors(9, 40, 24, torch.bfloat16)
    tensors["residual"] = tensors["residual"].float()
    with linear.force(True):
        z = _public(tensors)
    assert not launches
    assert z.dtype == torch.float32


@runs_the_kernel
def test_compiled_code_takes_the_composed_form(launches: list[tuple[Any, ...]]) -> None:
    tensors = {name: t.to(device_of("triton")) for name, t in _tensors(9, 40, 24, torch.bfloat16).items()}
    compiled = torch.compile(rk.linear_edit, backend="aot_eager", fullgraph=True)
    with rk.backend("triton"), torch.no_grad():
        with linear.force(True):
            z = compiled(*tensors.values())
        assert not launches
        assert torch.equal(z, rk.linear_edit(*tensors.values()))


@runs_the_kernel
def test_another_backend_takes_the_composed_form(launches: list[tuple[Any, ...]]) -> None:
    tensors = {name: t.to(device_of("triton")) for name, t in _tensors(9, 40, 24).items()}
    with rk.backend("reference"), linear.force(True):
        rk.linear_edit(*tensors.values())
    assert not launches


@runs_the_kernel
def test_a_weight_of_its_own_class_is_left_to_torch(
    launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Packed(torch.Tensor):
        def data_ptr(self) -> int:
            raise AssertionError("it has no memory of its own")

    x, weight, linear_bias = torch.randn(3, 24), torch.randn(40, 24), torch.randn(40)
    scale = torch.randn(40)
    monkeypatch.setattr(linear, "wins", lambda *place: True)
    for force in (linear.force(True), nullcontext()):
        with force:
            for w, b in ((weight.as_subclass(Packed), linear_bias), (weight, linear_bias.as_subclass(Packed))):
                assert linear.linear_edit_forward(x, w, b, None, affine_edit(scale)) is None
    assert not launches


@runs_the_kernel
def test_forward_mode_derivatives() -> None:
    """A kernel would drop them silently: plain PyTorch runs instead."""
    tensors = {name: t.to(device_of("triton")) for name, t in _tensors(9, 40, 24).items()}
    with rk.backend("triton"), linear.force(True), forward_ad.dual_level():
        tensors["x"] = forward_ad.make_dual(tensors["x"], torch.ones_like(tensors["x"]))
        found = forward_ad.unpack_dual(rk.linear_edit(*tensors.values())).tangent
    expected = tensors["scale"] * tensors["weight"].sum(1)
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-4)


@runs_the_kernel
def test_force_is_over_after_its_block(launches: list[tuple[Any, ...]]) -> None:
    """Also where it ends with an error; an inner block goes before an outer one."""
    tensors = _tensors(9, 40, 24)

    def fails() -> None:
        with linear.force(True), linear.force(False):
            _public(tensors)
            raise KeyError

    with linear.force(True):
        with pytest.raises(KeyError):
            fails()
        assert not launches
        _public(tensors)
    assert len(launches) == 1
    _public(tensors)
    assert len(launches) == 1
