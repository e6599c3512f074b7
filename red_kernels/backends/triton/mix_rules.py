"""The tiles of the kernels of mixes; see :mod:`.rules`. There are no measured tables for them.

Unless registers run out, no rule depends on the requested gradients: a gradient has the same bits whatever others are
requested.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from .rules import MOST_SLABS, MOST_WARPS, VECTOR_BYTES, Architecture, power_of_two

RUN_BYTES = 64  # of adjacent columns in a piece, at least, if a block has that many


@dataclass(frozen=True)
class MixTile:
    """``rows`` rows of ``together`` blocks in ``chunks`` pieces, of ``chunk`` columns of each block; ``programs`` as in
    :class:`.rules.SlabTile`. In a rotation, which is one block, every other piece has the partners of the piece before.

    A tile has whole blocks, or as few pieces as possible: with a larger one a piece could be beyond its block.
    """

    rows: int
    together: int
    chunk: int
    chunks: int
    warps: int
    programs: int = 0

    def slabs(self, width: int, blocks: int) -> int:
        """The number of tiles along a row."""
        return -(-max(1, blocks) // self.together) * self.slabs_of_a_block(width, blocks)

    def slabs_of_a_block(self, width: int, blocks: int) -> int:
        """The number of tiles that share a block; the pairs of a rotation are one."""
        inner, sides = _inner(width, blocks)
        return -(-inner * sides // (self.chunk * self.chunks))


@lru_cache(None)
def forward(width: int, blocks: int, itemsize: int, architecture: Architecture) -> MixTile:
    """With a norm and without, so that ``z`` has the same bits: whole rows if they fit into a program, else a slab."""
    whole = power_of_two(max(1, blocks))
    found = _held(width, blocks, whole, itemsize, architecture, 32, MOST_WARPS)
    return found or _slab(width, blocks, itemsize, architecture, ((32, MOST_WARPS),))


@lru_cache(None)
def backward(width: int, blocks: int, itemsize: int, architecture: Architecture) -> MixTile:
    """Slabs of whole blocks or pairs, with or without a norm's averages, and any column sums."""
    tile = _slab(width, blocks, itemsize, architecture, ((8, 8), (16, 8)))
    return _persistent(tile)


@lru_cache(None)
def norm_backward(width: int, blocks: int, itemsize: int, architecture: Architecture, sums: int) -> MixTile | None:
    """Whole rows; None if they and ``sums`` column sums exceed the registers of a program.

    Options that take as many registers count as a sum: dropout, and twice the edits of edit_ids. With 8 elements a
    thread spills nothing with any number of sums in up to 8 warps, and with five in 16 warps, which have 128 registers
    a thread. With 16 elements, the minimum of a rotation, two to a vector, these are all (in fp32 three) and two.
    """
    whole = power_of_two(max(1, blocks))
    choices = [(8, 8, 8), (16, 8, (8 if itemsize == 2 else 3) if blocks == 0 else 3)]
    if architecture.warp == 32:
        choices.insert(1, (8, MOST_WARPS, 5))
        if itemsize == 2:
            choices.append((16, MOST_WARPS, 2))
    for held, widest, most in choices:
        tile = _held(width, blocks, whole, itemsize, architecture, held, widest)
        if tile is not None and sums <= most:
            return _persistent(tile)
    return None


@lru_cache(None)
def dots(width: int, blocks: int, itemsize: int, architecture: Architecture) -> tuple[int, int]:
    """Columns of a piece and warps, for one block of a row."""
    vector = VECTOR_BYTES // itemsize
    warps = min(MOST_WARPS, power_of_two(-(-(width // blocks) // (architecture.warp * vector))))
    return min(architecture.warp * warps * vector, power_of_two(width // blocks)), warps


def _held(
    width: int, blocks: int, together: int, itemsize: int, architecture: Architecture, most: int, widest: int
) -> MixTile | None:
    """A number of whole blocks, with at most ``most`` elements for each thread of at most ``widest`` warps."""
    inner, sides = _inner(width, blocks)
    vector, warp = VECTOR_BYTES // itemsize, architecture.warp
    along = 1
    while along <= widest:
        chunk = min(max(warp * along * vector // together, RUN_BYTES // itemsize), power_of_two(inner))
        chunks = -(-inner // chunk) * sides
        if along > 1 and together * chunk < warp * along * vector:  # less than a vector for each thread
            return None
        if together * chunk * chunks <= most * warp * along:
            warps = max(4, along)
            rows = max(1, min(warps * warp * vector // (together * chunk), 64))
            return MixTile(rows, together, chunk, chunks, warps)
        along *= 2
    return None


def _slab(
    width: int, blocks: int, itemsize: int, architecture: Architecture, choices: tuple[tuple[int, int], ...]
) -> MixTile:
    """Some blocks, whole if one fits into a program by one of ``choices``, as :func:`_held`; pairs of a rotation."""
    inner, sides = _inner(width, blocks)
    vector, warp = VECTOR_BYTES // itemsize, architecture.warp
    chunk = min(warp * vector, power_of_two(inner))
    if blocks:
        together = min(max(1, warp * vector // chunk), power_of_two(blocks))
        together = max(together, power_of_two(-(-blocks // MOST_SLABS)))
        for held, widest in choices:
            found = _held(width, blocks, together, itemsize, architecture, held, widest)
            if found is not None:
                return found
    chunk = max(chunk, power_of_two(-(-width // MOST_SLABS)))
    return MixTile(max(1, min(4 * warp * vector // chunk, 64)), 1, chunk, sides, 4)


def _persistent(tile: MixTile) -> MixTile:
    return replace(tile, programs=max(1, 12 // tile.warps))


def _inner(width: int, blocks: int) -> tuple[int, int]:
    """Columns of a block, and the number of pieces at the same place in it: in a rotation, both of a pair."""
    return (width // blocks, 1) if blocks else (width // 2, 2)
