"""Every path through the Triton kernels: tiles of every kind, loops of several tiles, rows in the order of their edits.

Which tile a kernel takes follows from the width and the device. Here small activations are given the tiles that wide
ones would get, so that a part of each run meets each path.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    ARGUMENTS,
    DTYPES,
    EPS,
    HALVES,
    INTERPRETED,
    OPERATIONS,
    TRITON,
    WITH_DROPOUT,
    WITH_NORM_BEHIND,
    WITH_WEIGHT_OFFSET,
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
    upstream,
)
from torch import Tensor

from red_kernels.ops import checks

if not TRITON:
    pytest.skip("no Triton backend here: neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from red_kernels.backends.triton import launch, tuned
from red_kernels.backends.triton.rules import Architecture, RowTile, SlabTile

if INTERPRETED:
    import interpreter

pytestmark = pytest.mark.implementations
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")

ROWS, D = 13, 70  # of activations: with pieces of 32 columns two, and one that has six
KINDS = ("own", "whole", "pieces", "even pieces", "wide")


def _width(kind: str) -> int:
    return 64 if kind == "even pieces" else D


@contextmanager
def _tiles(kind: str) -> Iterator[None]:
    """The kernels in use, with tiles of a kind: those of the rules, or small ones, of which a program has several."""
    with TRITON[0].in_use():
        if kind == "own":
            yield
            return
        d = _width(kind)
        chunk, rows = {"whole": (128, 2), "pieces": (32, 2), "even pieces": (32, 1), "wide": (32, 2)}[kind]
        chunks = -(-d // chunk)
        forward, backward = (RowTile(rows, chunk, chunks, 4, programs) for programs in (0, 1))
        one, many = (SlabTile(rows, chunk, 4, programs) for programs in (0, chunks))
        tiles: dict[str, Any] = {
            "norm_forward": None if kind == "wide" else forward,
            "norm_backward": None if kind == "wide" else backward,
            "wide_norm": RowTile(1, chunk, chunks, 4),
            "wide_backward": many,
            "edit_forward": one,
            "edit_backward": many,
            "finish": SlabTile(2, 32, 4),
            "finish_edits": SlabTile(2, 64, 4),
        }
        with tuned.forcing(tiles):
            yield


def _held(
    kind: str, operation: str, tensors: Tensors, grads: tuple[Tensor, ...], p: float = 0.0, **options: Any
) -> None:
    """The error is at most eager's and a step, with tiles of a kind."""
    with _tiles(kind):
        factor = {"factor": drawn_factor(5, p, tensors["x"].shape)} if p else {}
        drawn = {"dropout_p": p, "training": True} if p else {}
        found = run(fused, operation, tensors, grads, **drawn, **options)
    assert_as_good_as(
        found,
        run(eager, operation, tensors, grads, **factor, **options),
        exact(operation, tensors, grads, **factor, **options),
    )


@pytest.mark.parametrize("edits", [None, 5])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("need_z", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_kind_of_tile(
    operation: str, kind: str, dtype: torch.dtype, need_z: bool, p: float, edits: int | None
) -> None:
    if (p and operation not in WITH_DROPOUT) or not (need_z or operation in WITH_NORM_BEHIND):
        return  # no such option
    shape = (ROWS, _width(kind))
    options: dict[str, Any] = {} if need_z else {"need_z": False}
    if edits is not None:
        options["edit_ids"] = torch.arange(ROWS) * 7 % edits
    if operation in WITH_WEIGHT_OFFSET and edits is None:
        options["weight_offset"] = 1.0
    grads = upstream(shape, dtype, number=2 if need_z else 1)
    _held(kind, operation, arguments(operation, shape, dtype, edits=edits), grads, p, **options)


ABSENT = [
    (operation, absent)
    for operation in OPERATIONS
    for count in range(1, len(ARGUMENTS[operation]))
    for absent in itertools.combinations(ARGUMENTS[operation][1:], count)
]


@pytest.mark.parametrize(
    ("operation", "absent"),
    [
        case if len(case[1]) in (1, len(ARGUMENTS[case[0]]) - 1) else pytest.param(*case, marks=pytest.mark.nightly)
        for case in ABSENT
    ],
    ids=lambda v: v if isinstance(v, str) else "without-" + "-".join(v),
)
@pytest.mark.parametrize("kind", ["pieces", "wide"])
def test_absent_arguments(kind: str, operation: str, absent: tuple[str, ...]) -> None:
    """Also where ``z`` is made again in the backward from what there is."""
    shape = (7, D)
    tensors = arguments(operation, shape, torch.bfloat16) | dict.fromkeys(absent)
    _held(kind, operation, tensors, upstream(shape, torch.bfloat16))
    if operation in WITH_NORM_BEHIND:
        _held(kind, operation, tensors, upstream(shape, torch.bfloat16, number=1), need_z=False)


@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("kind", ["pieces", "wide"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_only_for_what_asks(operation: str, kind: str, edits: int | None) -> None:
    """For each argument alone, and for all but it."""
    shape = (7, D)
    tensors, grads = arguments(operation, shape, edits=edits), upstream(shape, torch.float32)
    options = {} if edits is None else {"edit_ids": torch.arange(7) % 2}
    peer, expected = (of(operation, tensors, grads, **options) for of in (partial(run, eager), exact))
    names = ARGUMENTS[operation]
    for name in names:
        for asking in {(name,), tuple(other for other in names if other != name)}:
            given = {other: t.clone().requires_grad_(other in asking) for other, t in tensors.items()}
            with _tiles(kind):
                results = outputs_of(fused(operation, given, **options))
                torch.autograd.backward(results, grads[: len(results)])
            assert {other for other, t in given.items() if t.grad is not None} == set(asking)
            found = {f"d {other}": given[other].grad for other in asking}
            assert_as_good_as(found, *({key: of[key] for key in found} for of in (peer, expected)))


# How rows use their edits, which four workers and more share out in the order of the edits.
DEALT: dict[str, tuple[int, Tensor]] = {
    "one for all": (1, torch.zeros(23)),
    "the last for all": (4, torch.full((23,), 3)),
    "the first and the last": (50, torch.arange(23) % 2 * 49),
    "one each": (23, torch.arange(23).flip(0)),
    "more than rows": (50, torch.arange(23) * 7 % 50),
    "within a worker": (9, torch.tensor([0] * 4 + [1] + [2] * 2 + [5] * 6 + [7] + [8] * 9)),
    "alternating": (2, torch.arange(23) % 2),
    "at random": (6, torch.randint(0, 6, (23,), generator=torch.Generator().manual_seed(3))),
    "one row": (3, torch.tensor([1])),
}


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dealt", DEALT)
@pytest.mark.parametrize("kind", ["own", "pieces", "wide"])
@pytest.mark.parametrize("operation", ["edit_add", "edit_add_layer_norm", "rms_norm_edit"])
def test_edits_dealt_to_rows(operation: str, kind: str, dealt: str, dtype: torch.dtype) -> None:
    edits, ids = DEALT[dealt]
    shape = (len(ids), D)
    tensors = arguments(operation, shape, dtype, edits=edits)
    _held(kind, operation, tensors, upstream(shape, dtype), edit_ids=ids.long())


UNKNOWN = [-1, 5, -(2**31) - 1, 2**31, 2**62, -(2**62)]


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["own", "pieces", "wide"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_edits_that_do_not_exist(operation: str, kind: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's host does not look at them. Their rows are NaN; no other row and no edit's gradient has any of it."""
    if p and operation not in WITH_DROPOUT:
        return  # no such option
    monkeypatch.setattr(checks, "_edit_ids", lambda *_: None)
    rows, edits = 19, 5
    ids = torch.arange(rows) * 3 % edits
    bad = torch.zeros(rows, dtype=torch.bool)
    for place, value in enumerate(UNKNOWN):
        ids[place * 3 + 1] = value
        bad[place * 3 + 1] = True
    tensors = arguments(operation, (rows, D), edits=edits)
    grads = upstream((rows, D), torch.float32)
    drawn = {"dropout_p": p, "training": True} if p else {}
    with _tiles(kind):
        factor = drawn_factor(5, p, (rows, D)) if p else None
        found = run(fused, operation, tensors, grads, edit_ids=ids, **drawn)
        torch.manual_seed(5)
        other = run(fused, operation, tensors, grads, edit_ids=ids.where(~bad, 0), **drawn)
    for name in set(found) & {"y", "z", "d x", "d residual"}:
        if (operation, name) == ("edit_add", "d residual"):
            assert torch.equal(found[name], other[name]), "the gradient from above, which no edit has a part in"
            continue
        assert bool(found[name][bad].isnan().all()), name
        assert torch.equal(found[name][~bad], other[name][~bad]), name
    left = {name: t[~bad] if name in ("x", "residual") else t for name, t in tensors.items()}
    options: dict[str, Any] = {"edit_ids": ids[~bad]} | ({"factor": factor[~bad]} if factor is not None else {})
    trial = (operation, left, tuple(g[~bad] for g in grads))
    peer, expected = run(eager, *trial, **options), exact(*trial, **options)
    assert_as_good_as(*({name: of[name] for name in ("d scale", "d bias")} for of in (found, peer, expected)))


@interpreted_only
@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
@pytest.mark.parametrize("shape", [(ROWS, 33), (ROWS, 300)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_number_of_multiprocessors(operation: str, shape: tuple[int, int], multiprocessors: int) -> None:
    """From all tiles in one program to more programs than there are tiles."""
    with launch.pretending(Architecture("interpreter", 32, multiprocessors)):
        _held("own", operation, arguments(operation, shape), upstream(shape, torch.float32))
        tensors, ids = arguments(operation, shape, edits=4), torch.arange(shape[0]) * 5 % 3
        _held("own", operation, tensors, upstream(shape, torch.float32), edit_ids=ids)


@interpreted_only
@pytest.mark.parametrize("edits", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_programs_in_any_order(operation: str, kind: str, edits: int | None) -> None:
    """The same bits: no program reads what another of the same launch writes, and no two write to one place."""
    shape = (ROWS, _width(kind))
    tensors, grads = arguments(operation, shape, torch.bfloat16, edits=edits), upstream(shape, torch.bfloat16)
    options = {} if edits is None else {"edit_ids": torch.arange(ROWS) * 7 % edits}
    with _tiles(kind):
        forwards = run(fused, operation, tensors, grads, **options)
        with interpreter.programs_backwards():
            assert same_bits(run(fused, operation, tensors, grads, **options), forwards)
        assert same_bits(run(fused, operation, tensors, grads, **options), forwards)


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("edits", [None, 20])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_element_is_written(operation: str, kind: str, edits: int | None) -> None:
    """Of every output and of every sum on the way: what was there before is NaN, and none of it comes out."""
    shape = (ROWS, _width(kind))
    options = {} if edits is None else {"edit_ids": torch.arange(ROWS) * 7 % edits}
    with _tiles(kind):
        found = run(
            fused, operation, arguments(operation, shape, edits=edits), upstream(shape, torch.float32), **options
        )
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize("kind", ["pieces", "wide"])
@pytest.mark.parametrize("operation", [o for o in OPERATIONS if "norm" in o])
def test_large_mean(operation: str, kind: str) -> None:
    """The digits of the mean are not lost in pieces either: fp32, where the rounding of ``z`` hides no error."""
    shape = (7, D)
    tensors = arguments(operation, shape, mean=1000.0)
    options = {"need_z": False} if operation in WITH_NORM_BEHIND else {}
    _held(kind, operation, tensors, upstream(shape, torch.float32, number=1), **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", ["pieces", "wide"])
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_y_is_the_norm_of_the_z_returned(operation: str, kind: str, dtype: torch.dtype) -> None:
    """Of ``z`` as it is rounded, which shows where its mean is large."""
    tensors = arguments(operation, (ROWS, D), dtype, mean=100.0) | {"weight": None, "norm_bias": None}
    with _tiles(kind):
        y, z = fused(operation, tensors)
    norm = F.layer_norm if "layer" in operation else F.rms_norm
    of_z = [norm(t, (D,), eps=EPS) for t in (z, z.double())]
    assert_as_good_as({"y": y}, {"y": of_z[0]}, {"y": of_z[1]})


@pytest.mark.parametrize("edits", [None, 5])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_whether_z_is_kept_changes_no_bit(
    operation: str, kind: str, dtype: torch.dtype, p: float, edits: int | None
) -> None:
    """With the same tiles: those of the rules have fewer rows where ``z`` is made again, and so other sums."""
    shape = (ROWS, _width(kind))
    options: dict[str, Any] = {} if edits is None else {"edit_ids": torch.arange(ROWS) * 7 % edits}
    options |= {"dropout_p": p, "training": True} if p else {}
    tensors, (dy,) = arguments(operation, shape, dtype, edits=edits), upstream(shape, dtype, number=1)
    with _tiles(kind):
        for absent in ((), ("residual",)):
            kept, made_again = kept_and_not(operation, tensors | dict.fromkeys(absent), dy, **options)
            assert same_bits(made_again, kept)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129])
@pytest.mark.parametrize("operation", ["edit_add", "edit_add_layer_norm"])
def test_dropout_of_every_width(operation: str, width: int) -> None:
    """Words come by fours, and the mask is that of the reference, bit for bit: what is dropped is not there."""
    shape = (11, width)
    with _tiles("own"):
        factor = drawn_factor(5, 0.5, shape)
        tensors = leaves(arguments(operation, shape) | {"residual": None, "bias": None})
        z = outputs_of(fused(operation, tensors, dropout_p=0.5, training=True))[-1]
        expected = (tensors["x"] * tensors["scale"]).detach() * factor.float()
        assert torch.equal(z.detach(), expected)
        (dx,) = torch.autograd.grad(z, tensors["x"], torch.ones(shape))
    assert torch.equal(dx, tensors["scale"].detach() * factor.float())
