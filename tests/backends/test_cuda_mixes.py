"""Every path through the CUDA kernels of mixes: one pass or element by element, all options, edits dealt to rows.

As in test_cuda_kernels.py, which kernel and layout a call gets follows from its width, blocks, arguments and device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import CUDA, DTYPES, upstream

from red_kernels.backends import cuda
from red_kernels.ops import checks

if not CUDA:
    pytest.skip(
        f"no CUDA kernels here, neither on a GPU nor in the emulator: {cuda.load_error()}", allow_module_level=True
    )

from cuda_cases import DEVICES, emulating, held_mix
from mix_cases import OPERATIONS, arguments, fused, run

pytestmark = pytest.mark.implementations

# Width and blocks, of one pass: a part of a warp, whole warps, several; threads that share exactly and not; blocks of
# columns of some lanes, a warp, several warps; the widest. Then of the wide kernels, one way or both: blocks that do
# not begin on 16 bytes, of a single column, more than fit together, and wide ones.
ROTATED = [64, 192, 256, 768, 1088, 2112, 4096, 5120, 8192, 8256, 16448]
REFLECTED = [
    (24, 1), (72, 3), (768, 4), (768, 32), (1024, 1), (2304, 2), (2560, 32), (4096, 16), (5120, 2), (8192, 4),
    (8192, 1), (33, 33), (70, 10), (33, 1), (1000, 8), (1300, 2), (1600, 1600), (8448, 3), (6400, 10),
]  # fmt: skip
SHAPES = [*((d, 0) for d in ROTATED), *REFLECTED]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "with dropout": {"p": 0.25}, "with edit_ids": {"edits": 5}, "all": {"p": 0.25, "edits": 5},
}  # fmt: skip


def _rows_of(d: int) -> int:
    """Enough for a worker to take several, as in cuda_cases; of the wide kernels there are few workers."""
    return 67 if d <= 256 and d % 8 == 0 else 15 if d <= 2560 else 7


def _sweep() -> Iterator[tuple[str, str, str, torch.dtype, int, int]]:
    """Every shape with every kind on every device; operations, and but for the plain kind dtypes, take turns."""
    for (number, name), (place, shape) in itertools.product(enumerate(DEVICES), enumerate(SHAPES)):
        for turn, kind in enumerate(KINDS):
            operation = OPERATIONS[(turn + place + number) % 4]
            operation = "mix_add" if operation == "mix" and "p" in KINDS[kind] else operation
            if shape[0] == 1 and "norm" in operation:
                operation = "mix_add"
            for dtype in DTYPES if kind == "plain" else (DTYPES[(place + turn) % 3],):
                yield name, operation, kind, dtype, *shape


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize(("name", "operation", "kind", "dtype", "d", "blocks"), list(_sweep()), ids=str)
def test_every_path(name: str, operation: str, kind: str, dtype: torch.dtype, d: int, blocks: int) -> None:
    shape, options = (_rows_of(d), d), {"blocks": blocks} | KINDS[kind]
    edits = options.pop("edits", None)
    if edits is not None:
        options["edit_ids"] = torch.arange(shape[0]) * 7 % edits
    tensors = arguments(operation, shape, dtype, blocks=blocks, edits=edits)
    if blocks and (d + blocks) % 2:
        tensors["second"] = None
    with emulating(DEVICES[name]):
        found = held_mix(operation, tensors, upstream(shape, dtype), **options)
    assert all(bool(value.isfinite().all()) for value in found.values())


# How many edits, and the rows' ids: on one multiprocessor a worker of the wide kernel takes 16 rows or more.
DEALT = {
    "at random": (7, torch.randint(0, 7, (150,), generator=torch.Generator().manual_seed(2))),
    "one edit": (3, torch.full((150,), 1)),
    "whole workers": (3, torch.arange(150) // 75),
    "a row each": (150, torch.arange(150).flip(0)),
    "one row": (3, torch.tensor([1])),
}


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("dealt", DEALT)
@pytest.mark.parametrize(("d", "blocks"), [(64, 0), (24, 3), (33, 3)])
@pytest.mark.parametrize("operation", ["mix", "mix_add_layer_norm"])
def test_edits_dealt_to_rows(operation: str, d: int, blocks: int, dealt: str, name: str) -> None:
    edits, ids = DEALT[dealt]
    shape = (len(ids), d)
    tensors = arguments(operation, shape, blocks=blocks, edits=edits)
    with emulating(DEVICES[name]):
        found = held_mix(operation, tensors, upstream(shape, torch.float32), blocks=blocks, edit_ids=ids)
    unused = torch.ones(edits, dtype=torch.bool)
    unused[ids] = False
    assert not any(bool(found[f"d {vector}"][unused].any()) for vector in ("first", "second", "bias"))


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize(("d", "blocks"), [(64, 0), (24, 3), (33, 3)])
@pytest.mark.parametrize("operation", ["mix_add", "mix_add_rms_norm"])
def test_edits_that_do_not_exist(operation: str, d: int, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's host does not look at them. Their rows are NaN; no other row and no edit's gradient has any of it."""
    monkeypatch.setattr(checks, "_edit_ids", lambda *_: None)
    ids = torch.arange(40) * 3 % 5
    bad = torch.arange(40) % 4 == 1
    ids[bad] = torch.tensor([-1, 5, 2**31, 2**62, -(2**62)] * 2)
    tensors, grads = arguments(operation, (40, d), blocks=blocks, edits=5), upstream((40, d), torch.float32)
    with CUDA[0].in_use():
        found = run(fused, operation, tensors, grads, blocks=blocks, edit_ids=ids)
        good = {name: t[~bad] if name in ("x", "residual") else t for name, t in tensors.items()}
        expected = run(fused, operation, good, tuple(g[~bad] for g in grads), blocks=blocks, edit_ids=ids[~bad])
    for name in set(found) & {"y", "z", "d x"}:
        assert bool(found[name][bad].isnan().all()), name
        assert torch.equal(found[name][~bad], expected[name]), name
    assert all(bool(found[f"d {vector}"].isfinite().all()) for vector in ("first", "second", "bias"))


def test_blocks_that_do_not_fit() -> None:
    """The operators themselves look, too: they would read past a row."""
    x = torch.ones(3, 96)
    with CUDA[0].in_use():
        forward = getattr(torch.ops, cuda.NAMESPACE).mix_forward
        x = x.to(CUDA[0].device)
        for second, blocks in ((x[0], 0), (x[0], 7), (x[0], -1), (None, 0)):
            with pytest.raises(RuntimeError, match="blocks must divide the width of x"):
                forward(x, None, x[0], second, None, None, None, 0.0, blocks)
