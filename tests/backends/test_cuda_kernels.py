"""Every path through the CUDA kernels: layouts of every kind, all kinds of backward, rows in the order of their edits.

Which kernel and layout a call gets follows from its width, its arguments and the device. In the emulator there are two
devices, one of which has clusters, with one multiprocessor each, so that few workers take many rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    ARGUMENTS,
    CUDA,
    DTYPES,
    EMULATED,
    EPS,
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
    exact,
    fused,
    kept_and_not,
    leaves,
    outputs_of,
    run,
    same_bits,
    step,
    upstream,
)
from torch import Tensor

from red_kernels.backends import cuda
from red_kernels.ops import checks

if not CUDA:
    pytest.skip(
        f"no CUDA kernels here, neither on a GPU nor in the emulator: {cuda.load_error()}", allow_module_level=True
    )

from cuda_cases import A100, DEVICES, H200, ODD_WIDTHS, emulating, held, rows_of, run_cuda, widths

pytestmark = pytest.mark.implementations
emulated_only = pytest.mark.skipif(not EMULATED, reason="needs the emulator: RED_KERNELS_CUDA_EMULATED")

EDIT_VECTORS = ("x", "residual", "scale", "bias")  # with no gradient of the norm's own vectors
# What a call asks for, which decides the kind of its backward: see BackwardKind in csrc/cuda/rules.h.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"asking": EDIT_VECTORS},
    "with dropout": {"asking": EDIT_VECTORS, "p": 0.25},
    "with edit_ids": {"asking": EDIT_VECTORS, "edits": 5},
    "z made again": {"asking": EDIT_VECTORS, "need_z": False},
    "all options": {"asking": EDIT_VECTORS, "need_z": False, "p": 0.25, "edits": 5},
    "full": {},
    "full with all options": {"need_z": False, "p": 0.25, "edits": 5},
}
CASES = [
    *itertools.product(WITH_NORM_BEHIND, KINDS),
    *itertools.product(("rms_norm_edit", "layer_norm_edit"), ("full", "with edit_ids")),
]
# Aligned with one warp or several, of the wide kernels, and on a device with clusters over several blocks.
FEW_WIDTHS = (72, 2304, 70, 8448)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each device there is, in use."""
    with emulating(DEVICES[request.param]):
        yield


def _dealt(rows: int, edits: int) -> Tensor:
    return torch.arange(rows) * 7 % edits


def _options(kind: str, rows: int, *, norm_behind: bool = True) -> tuple[dict[str, Any], int | None]:
    """Those of a call of a kind, and how many edits there are."""
    options = dict(KINDS[kind])
    edits = options.pop("edits", None)
    if edits is not None:
        options["edit_ids"] = _dealt(rows, edits)
    if not norm_behind:
        options.pop("asking", None)
    return options, edits


def _sweep() -> Iterator[tuple[str, str, str, torch.dtype, int]]:
    """Every width with every kind on every device; norms with a mean and without take turns."""
    for name, dtype in itertools.product(DEVICES, DTYPES):
        sweep = widths(dtype, name)[:: 4 if dtype == torch.float16 else 1]
        for place, d in enumerate((*sweep, *ODD_WIDTHS)):
            for kind in KINDS:
                if "edits" in KINDS[kind] and d > 20_000:
                    continue  # seconds for each, as every column of every edit is a thread's
                yield name, WITH_NORM_BEHIND[place % 2], kind, dtype, d
            for kind in ("full", "with edit_ids")[: 1 if d > 20_000 else 2]:
                yield name, ("layer_norm_edit", "rms_norm_edit")[place % 2], kind, dtype, d


@pytest.mark.parametrize(("name", "operation", "kind", "dtype", "d"), list(_sweep()), ids=str)
def test_every_layout(name: str, operation: str, kind: str, dtype: torch.dtype, d: int) -> None:
    rows = rows_of(d)
    options, edits = _options(kind, rows, norm_behind=operation in WITH_NORM_BEHIND)
    if operation in WITH_WEIGHT_OFFSET and edits is None:
        options["weight_offset"] = 1.0
    if d < 32:  # norms of few elements lose digits; an eps of the elements' size leaves some to compare
        options["eps"] = 1.0
    grads = upstream((rows, d), dtype, number=1 if "need_z" in options else 2)
    with emulating(DEVICES[name]):
        held(operation, arguments(operation, (rows, d), dtype, edits=edits), grads, **options)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("edits", [None, 5])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [*ODD_WIDTHS, 8, 72, 2304])
@pytest.mark.parametrize("operation", ["edit", "edit_add"])
def test_edits_without_a_norm(operation: str, d: int, dtype: torch.dtype, p: float, edits: int | None) -> None:
    if p and operation not in WITH_DROPOUT:
        return  # no such option
    rows = rows_of(d)
    options = {} if edits is None else {"edit_ids": _dealt(rows, edits)}
    held(operation, arguments(operation, (rows, d), dtype, edits=edits), upstream((rows, d), dtype), p=p, **options)


@emulated_only
@pytest.mark.parametrize("multiprocessors", [3, 132])
@pytest.mark.parametrize("model", [A100, H200], ids=lambda model: f"sm_{model.capability}")
@pytest.mark.parametrize("shape", [(1, 72), (2, 72), (18, 72), (300, 72), (37, 2304), (40, 70), (19, 8448)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "all options", "full"])
def test_any_number_of_multiprocessors(kind: str, shape: tuple[int, int], model: Any, multiprocessors: int) -> None:
    """From all rows in one block to more blocks than there are rows; with fewer multiprocessors than a cluster has
    blocks; and with so many that blocks have fewer groups."""
    options, edits = _options(kind, shape[0])
    grads = upstream(shape, torch.bfloat16, number=1 if "need_z" in options else 2)
    with emulating(model._replace(multiprocessors=multiprocessors)):
        operation = "edit_add_layer_norm"
        held(operation, arguments(operation, shape, torch.bfloat16, edits=edits), grads, **options)
        tensors = arguments("edit_add", shape, edits=edits)
        held("edit_add", tensors, upstream(shape, torch.float32), edit_ids=options.get("edit_ids"))


@emulated_only
@pytest.mark.parametrize("shared", [8 << 10, 24 << 10, 99 << 10, 163 << 10])
@pytest.mark.parametrize("d", [256, 1024, 4096])
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_any_amount_of_shared_memory(operation: str, d: int, shared: int) -> None:
    """Two rows ahead or three, several blocks for a row that one has no room for, or the wide kernels."""
    with emulating(H200._replace(multiprocessors=1, shared=shared)):
        held(operation, arguments(operation, (31, d)), upstream((31, d), torch.float32))


ABSENT = [
    (operation, absent)
    for operation in OPERATIONS
    for count in (1, len(ARGUMENTS[operation]) - 1)
    for absent in itertools.combinations(ARGUMENTS[operation][1:], count)
]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("operation", "absent"), ABSENT, ids=lambda v: v if isinstance(v, str) else "without-" + "-".join(v)
)
@pytest.mark.parametrize("d", FEW_WIDTHS)
def test_absent_arguments(d: int, operation: str, absent: tuple[str, ...]) -> None:
    """Also where ``z`` is made again in the backward from what there is."""
    shape = (7, d)
    tensors = arguments(operation, shape, torch.bfloat16) | dict.fromkeys(absent)
    held(operation, tensors, upstream(shape, torch.bfloat16))
    if operation in WITH_NORM_BEHIND:
        held(operation, tensors, upstream(shape, torch.bfloat16, number=1), need_z=False)


@pytest.mark.usefixtures("device", "empty_is_nan")
@pytest.mark.parametrize("need_z", [True, False])
@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_only_for_what_asks(operation: str, d: int, edits: int | None, need_z: bool) -> None:
    """For each argument alone, and for all but it."""
    if not (need_z or operation in WITH_NORM_BEHIND):
        return  # no such option
    shape = (7, d)
    tensors, grads = arguments(operation, shape, edits=edits), upstream(shape, torch.float32, number=1 + need_z)
    options: dict[str, Any] = {} if edits is None else {"edit_ids": torch.arange(7) % 2}
    options |= {} if need_z else {"need_z": False}
    peer, expected = (of(operation, tensors, grads, **options) for of in (partial(run, eager), exact))
    names = ARGUMENTS[operation]
    for name in names:
        for asking in {(name,), tuple(other for other in names if other != name)}:
            found = run_cuda(operation, tensors, grads, asking, **options)
            assert {key[2:] for key in found if key.startswith("d ")} == set(asking)
            assert_as_good_as(found, *({key: of[key] for key in found} for of in (peer, expected)))


# How rows use their edits. Sorted, they are dealt to workers of 16 rows or so.
ROWS = 200
DEALT: dict[str, tuple[int, Tensor]] = {
    "one for all": (1, torch.zeros(ROWS)),
    "the last for all": (4, torch.full((ROWS,), 3)),
    "the first and the last": (50, torch.arange(ROWS) % 2 * 49),
    "sorted": (7, torch.arange(ROWS) * 7 // ROWS),
    "reversed": (7, torch.arange(ROWS).flip(0) * 7 // ROWS),
    "one each": (ROWS, torch.arange(ROWS).flip(0)),
    "more than rows": (450, torch.arange(ROWS) * 7 % 450),
    "longer and longer": (20, torch.arange(20).repeat_interleave(torch.arange(1, 21))[:ROWS]),
    "whole workers": (13, torch.arange(208) // 16),
    "alternating": (2, torch.arange(ROWS) % 2),
    "at random": (9, torch.randint(0, 9, (ROWS,), generator=torch.Generator().manual_seed(3))),
    "one row": (3, torch.tensor([1])),
    "two rows": (3, torch.tensor([2, 0])),
}


@pytest.mark.usefixtures("device", "empty_is_nan")
@pytest.mark.parametrize("dealt", DEALT)
@pytest.mark.parametrize("d", [24, 70, 520, 8448])
@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("edit", ""),
        ("edit_add_layer_norm", "with edit_ids"),
        ("edit_add_layer_norm", "full"),
        ("rms_norm_edit", "with edit_ids"),
    ],
)
def test_edits_dealt_to_rows(operation: str, kind: str, d: int, dealt: str) -> None:
    edits, ids = DEALT[dealt]
    if d == 8448 and dealt not in ("at random", "whole workers", "one row"):
        return  # it would take seconds, as every column of every edit is a thread's
    shape, dtype = (len(ids), d), torch.float32 if d == 24 else torch.bfloat16
    asking = KINDS[kind].get("asking") if kind else None
    tensors = arguments(operation, shape, dtype, edits=edits)
    found = held(operation, tensors, upstream(shape, dtype), asking, edit_ids=ids.long())
    unused = torch.ones(edits, dtype=torch.bool)
    unused[ids.long()] = False
    assert not found["d scale"][unused].any()
    assert not found["d bias"][unused].any()


@pytest.mark.usefixtures("device", "empty_is_nan")
@pytest.mark.parametrize("edits", [None, 5])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_whether_z_is_kept_changes_no_bit(
    operation: str, d: int, dtype: torch.dtype, p: float, edits: int | None
) -> None:
    """Where all gradients are asked for, and so the layout is the same: that of a kFull backward of as many arrays."""
    rows = rows_of(d)
    options: dict[str, Any] = {} if edits is None else {"edit_ids": _dealt(rows, edits)}
    options |= {"dropout_p": p, "training": True} if p else {}
    tensors, (dy,) = arguments(operation, (rows, d), dtype, edits=edits), upstream((rows, d), dtype, number=1)
    with CUDA[0].in_use():
        kept, made_again = kept_and_not(operation, tensors, dy, **options)
    assert same_bits(made_again, kept)


UNKNOWN = [-1, 5, -(2**31) - 1, 2**31, 2**62, -(2**62)]


@pytest.mark.usefixtures("device", "empty_is_nan")
@pytest.mark.parametrize(("p", "need_z"), [(0.0, True), (0.25, False)])
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_edits_that_do_not_exist(
    operation: str, d: int, p: float, need_z: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's host does not look at them. Their rows are NaN; no other row and no edit's gradient has any of it."""
    if (p and operation not in WITH_DROPOUT) or not (need_z or operation in WITH_NORM_BEHIND):
        return  # no such option
    monkeypatch.setattr(checks, "_edit_ids", lambda *_: None)
    rows, edits = 49, 5
    ids = torch.arange(rows) * 3 % edits
    bad = torch.zeros(rows, dtype=torch.bool)
    for place, value in enumerate(UNKNOWN * 2):
        ids[place * 4 + 1] = value
        bad[place * 4 + 1] = True
    tensors, grads = arguments(operation, (rows, d), edits=edits), upstream((rows, d), torch.float32)
    drawn: dict[str, Any] = {"dropout_p": p, "training": True} if p else {}
    drawn |= {} if need_z else {"need_z": False}
    with CUDA[0].in_use():
        factor = drawn_factor(5, p, (rows, d)) if p else None
    found = run_cuda(operation, tensors, grads, edit_ids=ids, **drawn)
    torch.manual_seed(5)
    other = run_cuda(operation, tensors, grads, edit_ids=ids.where(~bad, 0), **drawn)
    for name in set(found) & {"y", "z", "d x", "d residual"}:
        if (operation, name) == ("edit_add", "d residual"):
            assert torch.equal(found[name], other[name]), "the gradient from above, which no edit has a part in"
            continue
        assert bool(found[name][bad].isnan().all()), name
        assert torch.equal(found[name][~bad], other[name][~bad]), name
    left = {name: t[~bad] if name in ("x", "residual") else t for name, t in tensors.items()}
    options: dict[str, Any] = {"edit_ids": ids[~bad]} | ({"factor": factor[~bad]} if factor is not None else {})
    options |= {} if need_z else {"need_z": False}
    trial = (operation, left, tuple(g[~bad] for g in grads))
    peer, expected = run(eager, *trial, **options), exact(*trial, **options)
    assert_as_good_as(*({name: of[name] for name in ("d scale", "d bias")} for of in (found, peer, expected)))


@pytest.mark.usefixtures("device", "empty_is_nan")
@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize(("operation", "kind"), [*CASES, ("edit", "full"), ("edit_add", "full")])
def test_every_element_is_written(operation: str, kind: str, d: int, rows: int) -> None:
    """Of every output and of every sum on the way: what was there before is NaN, and none of it comes out."""
    options, edits = _options(kind, rows)
    if "p" in options:
        options |= {"dropout_p": options.pop("p"), "training": True}
    for dtype in (torch.float32, torch.bfloat16):
        tensors, grads = arguments(operation, (rows, d), dtype, edits=edits), upstream((rows, d), dtype)
        found = run_cuda(operation, tensors, grads, **options)
        assert all(bool(value.isfinite().all()) for value in found.values())


def _laid_out(t: Tensor, how: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    rows, d = t.shape
    if how == "row-strided":
        return torch.full((rows, d + 8), torch.nan, dtype=t.dtype)[:, :d].copy_(t)
    if how == "row-strided by an odd number":
        return torch.full((rows, d + 3), torch.nan, dtype=t.dtype)[:, :d].copy_(t)
    if how == "at an odd address":
        return torch.full((rows * d + 1,), torch.nan, dtype=t.dtype)[1:].view(rows, d).copy_(t)
    assert how == "transposed"
    return t.t().contiguous().t()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "how", ["twice", "row-strided", "row-strided by an odd number", "at an odd address", "transposed"]
)
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "full with all options"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits(operation: str, kind: str, dtype: torch.dtype, d: int, how: str) -> None:
    """Whenever it is run, and wherever the tensors lie."""
    rows = 23
    options, edits = _options(kind, rows, norm_behind=operation in WITH_NORM_BEHIND)
    if options.pop("p", 0.0) and operation in WITH_DROPOUT:
        options |= {"dropout_p": 0.25, "training": True}
    if operation not in WITH_NORM_BEHIND:
        options.pop("need_z", None)
    tensors = arguments(operation, (rows, d), dtype, edits=edits)
    grads = upstream((rows, d), dtype, number=1 if "need_z" in options else 2)
    found: list[Results] = []
    for again in (False, True):
        given: Tensors = dict(tensors)
        if again and how != "twice":
            given |= {name: _laid_out(t, how) for name, t in tensors.items() if t.dim() == 2 and len(t) == rows}
            grads = tuple(_laid_out(g, how) for g in grads)
            if how == "at an odd address":
                given |= {name: _laid_out(t.view(1, d), how).view(d) for name, t in tensors.items() if t.dim() == 1}
        torch.manual_seed(7)
        asking = tuple(name for name in options.get("asking", ARGUMENTS[operation]) if name in given)
        found.append(_run_as_it_lies(operation, given, grads, asking, options))
    assert same_bits(*found)


def _run_as_it_lies(
    operation: str, tensors: Tensors, grads: tuple[Tensor, ...], asking: tuple[str, ...], options: dict[str, Any]
) -> Results:
    options = {name: value for name, value in options.items() if name != "asking"}
    given = {name: t.detach().requires_grad_(name in asking) for name, t in tensors.items()}
    with CUDA[0].in_use():
        results = outputs_of(fused(operation, given, **options))
        found = torch.autograd.grad(results, [given[name] for name in asking], grads[: len(results)])
    return {str(place): t.detach().contiguous() for place, t in enumerate((*results, *found))}


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_expanded_gradients(operation: str, d: int) -> None:
    """As that of a sum is: every element in one place."""
    shape = (9, d)
    tensors = arguments(operation, shape)
    found = run_cuda(operation, tensors, tuple(torch.tensor(0.5).expand(shape) for _ in range(2)))
    assert same_bits(found, run_cuda(operation, tensors, tuple(torch.full(shape, 0.5) for _ in range(2))))
    row = upstream((1, d), torch.float32)
    found = run_cuda(operation, tensors, tuple(g.expand(shape) for g in row))
    assert same_bits(found, run_cuda(operation, tensors, tuple(g.repeat(9, 1) for g in row)))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("need_z", [True, False])
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if "norm" in o])
def test_large_mean(operation: str, d: int, need_z: bool) -> None:
    """Its digits are not lost: fp32, where the rounding of ``z`` hides no error if it is not kept."""
    if need_z == (operation in WITH_NORM_BEHIND):
        return  # an edit behind the norm keeps nothing, and otherwise each side rounds z by itself
    options = {} if need_z else {"need_z": False}
    held(operation, arguments(operation, (7, d), mean=1000.0), upstream((7, d), torch.float32, number=1), **options)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_y_is_the_norm_of_the_z_returned(operation: str, d: int, dtype: torch.dtype) -> None:
    """Of ``z`` as it is rounded, which shows where its mean is large."""
    tensors = arguments(operation, (13, d), dtype, mean=100.0) | {"weight": None, "norm_bias": None}
    with CUDA[0].in_use():
        y, z = fused(operation, tensors)
    norm = F.layer_norm if "layer" in operation else F.rms_norm
    of_z = [norm(t, (d,), eps=EPS) for t in (z, z.double())]
    assert_as_good_as({"y": y}, {"y": of_z[0]}, {"y": of_z[1]})


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 31, 33, 128, 2304, 16388])
@pytest.mark.parametrize("operation", ["edit_add", "edit_add_layer_norm"])
def test_dropout_of_every_width(operation: str, width: int, p: float) -> None:
    """Words come by fours, and the mask is that of the reference, bit for bit: what is dropped is not there."""
    shape = (11, width)
    with CUDA[0].in_use():
        factor = drawn_factor(5, p, shape)
        tensors = leaves(arguments(operation, shape) | {"residual": None, "bias": None})
        z = outputs_of(fused(operation, tensors, dropout_p=p, training=True))[-1]
        expected = (tensors["x"] * tensors["scale"]).detach() * factor.float()
        assert torch.equal(z.detach(), expected)
        (dx,) = torch.autograd.grad(z, tensors["x"], torch.ones(shape))
    assert torch.equal(dx, tensors["scale"].detach() * factor.float())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("edits", [None, 4])
@pytest.mark.parametrize("d", FEW_WIDTHS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_rows(operation: str, d: int, edits: int | None) -> None:
    """Sums over none are zeros."""
    options = {} if edits is None else {"edit_ids": torch.zeros(0, dtype=torch.int64)}
    found = run_cuda(operation, arguments(operation, (0, d), edits=edits), upstream((0, d), torch.float32), **options)
    for name in ("d scale", "d bias"):
        assert found[name].shape == ((d,) if edits is None else (edits, d))
    assert not any(value.any() for value in found.values())


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_sums_over_many_rows_lose_little(operation: str) -> None:
    """Of equal terms: sums in one long line would lose more than a rounding for each worker's rows."""
    rows, d = 4096, 8
    tensors = arguments(operation, (rows, d))
    found = run_cuda(operation, tensors, (torch.full((rows, d), 0.1),) * 2, ("x", "norm_bias", "weight"))
    if "norm_bias" in ARGUMENTS[operation]:
        expected = torch.full((d,), 0.1).double() * rows
        # a worker of a block of 8 groups on one multiprocessor adds 512 terms, each sum rounded to half a step at most
        assert bool(((found["d norm_bias"].double() - expected).abs() <= 512 * step(expected, torch.float32)).all())
