"""Every path through the Triton kernels of mixes, with small tiles: slabs of blocks or pairs, and blocks in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from mix_cases import VECTORS, arguments, eager, exact, fused, run
from op_cases import INTERPRETED, TRITON, Tensors, assert_as_good_as, drawn_factor, same_bits, upstream

from red_kernels.ops import checks

if not TRITON:
    pytest.skip("no Triton backend here: neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

from red_kernels.backends.triton import mix_rules
from red_kernels.backends.triton.mix_rules import MixTile
from red_kernels.backends.triton.rules import MOST_WARPS, Architecture

if INTERPRETED:
    import interpreter

pytestmark = pytest.mark.implementations

ROWS = 7
BOTH = ("mix_add", "mix_add_layer_norm")
# Width and blocks, with a tile forward and one backward: some blocks of three, a last slab of one; blocks that need two
# pieces and half of a third; these pieces side by side; pairs.
KINDS: dict[str, tuple[int, int, MixTile, MixTile]] = {
    "slabs": (60, 3, MixTile(2, 2, 32, 1, 4), MixTile(2, 2, 32, 1, 4, 4)),
    "pieces": (40, 1, MixTile(2, 1, 16, 3, 4), MixTile(1, 1, 16, 3, 4, 2)),
    "wide": (69, 3, MixTile(2, 1, 8, 1, 4), MixTile(2, 1, 16, 1, 4, 8)),
    "pairs": (192, 0, MixTile(2, 1, 32, 2, 4), MixTile(2, 1, 64, 2, 4, 4)),
}


@contextmanager
def _tiles(kind: str) -> Iterator[None]:
    """The kernels in use, with the tiles of a kind, and no program that holds a row."""
    _, _, forward, backward = KINDS[kind]
    with pytest.MonkeyPatch.context() as patch, TRITON[0].in_use():
        patch.setattr(mix_rules, "forward", lambda *_: forward)
        patch.setattr(mix_rules, "backward", lambda *_: backward)
        patch.setattr(mix_rules, "norm_backward", lambda *_: None)
        yield


def _arguments(operation: str, kind: str, dtype: torch.dtype, edits: int | None) -> tuple[Tensors, dict[str, Any]]:
    width, blocks, _, _ = KINDS[kind]
    options: dict[str, Any] = {"blocks": blocks}
    if edits is not None:
        options["edit_ids"] = torch.arange(ROWS) * 5 % edits
    return arguments(operation, (ROWS, width), dtype, blocks=blocks, edits=edits), options


@pytest.mark.parametrize("edits", [None, 4])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", BOTH)
@pytest.mark.usefixtures("empty_is_nan")
def test_every_kind_of_tile(
    operation: str, kind: str, dtype: torch.dtype, single: bool, p: float, edits: int | None
) -> None:
    tensors, options = _arguments(operation, kind, dtype, edits)
    if single:
        if not options["blocks"]:
            return
        tensors["second"] = None
    grads = upstream(tensors["x"].shape, dtype)
    factor = {"factor": drawn_factor(5, p, tensors["x"].shape)} if p else {}
    drawn = {"dropout_p": p, "training": True} if p else {}
    with _tiles(kind):
        found = run(fused, operation, tensors, grads, **drawn, **options)
    peer, expected = (of(operation, tensors, grads, **factor, **options) for of in (_run_eager, exact))
    assert_as_good_as(found, peer, expected)


def _run_eager(*arguments: Any, **options: Any) -> Any:
    return run(eager, *arguments, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_each_gradient_alone(kind: str) -> None:
    operation = "mix_add_layer_norm"
    tensors, options = _arguments(operation, kind, torch.float32, None)
    grads = upstream(tensors["x"].shape, torch.float32)
    with _tiles(kind):
        every = run(fused, operation, tensors, grads, **options)
        for name in tensors:
            given = {key: t.detach().requires_grad_(key == name) for key, t in tensors.items()}
            results = fused(operation, given, **options)
            results = results if isinstance(results, tuple) else (results,)
            (found,) = torch.autograd.grad(results, [given[name]], grads[: len(results)])
            assert torch.equal(found, every[f"d {name}"]), name


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter: TRITON_INTERPRET=1")
@pytest.mark.parametrize("edits", [None, 4])
@pytest.mark.parametrize("kind", [*KINDS, "own"])
@pytest.mark.parametrize("operation", BOTH)
def test_programs_in_any_order(operation: str, kind: str, edits: int | None) -> None:
    """The same bits: no program reads what another of the same launch writes, and no two write to one place."""
    tensors, options = _arguments(operation, "wide" if kind == "own" else kind, torch.bfloat16, edits)
    grads = upstream(tensors["x"].shape, torch.bfloat16)
    with TRITON[0].in_use() if kind == "own" else _tiles(kind):
        forwards = run(fused, operation, tensors, grads, **options)
        with interpreter.programs_backwards():
            assert same_bits(run(fused, operation, tensors, grads, **options), forwards)


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("kind", [*KINDS, "own"])
@pytest.mark.parametrize("operation", BOTH)
def test_edits_that_do_not_exist(operation: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's host does not look at them. Their rows are NaN; no other row and no edit's gradient has any of it."""
    monkeypatch.setattr(checks, "_edit_ids", lambda *_: None)
    tensors, options = _arguments(operation, "slabs" if kind == "own" else kind, torch.float32, 4)
    ids = options["edit_ids"]
    bad = torch.zeros(ROWS, dtype=torch.bool)
    for row, value in ((0, -1), (3, 4), (6, 2**62)):
        ids[row], bad[row] = value, True
    grads = upstream(tensors["x"].shape, torch.float32)
    with TRITON[0].in_use() if kind == "own" else _tiles(kind):
        found = run(fused, operation, tensors, grads, **options)
        other = run(fused, operation, tensors, grads, **options | {"edit_ids": ids.where(~bad, 0)})
    for name in set(found) & {"y", "z", "d x"}:
        assert bool(found[name][bad].isnan().all()), name
        assert torch.equal(found[name][~bad], other[name][~bad]), name
    assert all(bool(found[f"d {name}"].isfinite().all()) for name in VECTORS)


@pytest.mark.parametrize(("width", "blocks"), [(20032, 0), (20000, 1)])
def test_rows_that_no_program_holds(width: int, blocks: int) -> None:
    """As they are in the kernels' own tiles: 10 to 30 s each in the interpreter."""
    operation, dtype = "mix_add_layer_norm", torch.bfloat16
    tensors, grads = arguments(operation, (2, width), dtype, blocks=blocks), upstream((2, width), dtype)
    with TRITON[0].in_use():
        found = run(fused, operation, tensors, grads, blocks=blocks)
    peer, expected = (of(operation, tensors, grads, blocks=blocks) for of in (_run_eager, exact))
    assert_as_good_as(found, peer, expected)


@pytest.mark.parametrize("warp", [32, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_hold_their_rows(itemsize: int, warp: int) -> None:
    """No piece lies beyond its block, whole blocks are whole, and every thread has something."""
    chip = Architecture("any", warp, 100)
    shapes = [(64 * n, 0) for n in (1, 2, 3, 12, 64, 128, 256, 313, 2000)]
    shapes += [(w * n, n) for w in (1, 2, 3, 24, 192, 769, 1024, 5000, 20000) for n in (1, 3, 4, 7, 32, 3000)]
    for width, blocks in shapes:
        inner, sides = (width // blocks, 1) if blocks else (width // 2, 2)
        tiles = [of(width, blocks, itemsize, chip) for of in (mix_rules.forward, mix_rules.backward)]
        tiles += [mix_rules.norm_backward(width, blocks, itemsize, chip, sums) for sums in range(9)]
        for number, tile in enumerate(tiles):
            if tile is None:
                continue
            powers = (tile.rows, tile.together, tile.chunk, tile.warps)
            assert all(n > 0 and not n & (n - 1) for n in powers)
            assert tile.warps <= MOST_WARPS
            assert tile.chunks % sides == 0
            assert (tile.chunks // sides - 1) * tile.chunk < inner
            if number > 1:
                assert tile.slabs(width, blocks) == 1
            if tile.slabs_of_a_block(width, blocks) > 1:
                assert (tile.together, tile.chunks) == (1, sides)
            assert tile.rows * tile.together * tile.chunk * tile.chunks <= 32 * tile.warps * warp
