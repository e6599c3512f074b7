"""How many rows, columns and threads a program of each kernel takes: frozen dataclasses made by named factories.

The factories reason from the register file; a table that ``red-kernels bench --tune`` measured goes before them
(:mod:`.tuned`). None of them looks at the number of rows, so a kernel is compiled once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tuned import slabs, tuned, whole_rows

VECTOR_BYTES = 16  # the widest access of a thread
MOST_WARPS = 16


@dataclass(frozen=True)
class Architecture:
    """What the factories must know of a device: its name ('sm_90', 'gfx942'), threads of a warp, multiprocessors."""

    name: str
    warp: int
    multiprocessors: int


@dataclass(frozen=True)
class RowTile:
    """Whole rows in registers: ``rows`` of them in ``chunks`` pieces of ``chunk`` columns each."""

    rows: int
    chunk: int
    chunks: int
    warps: int
    programs: int = 0  # for each multiprocessor, in a persistent grid; 0 for one program for each tile


@dataclass(frozen=True)
class SlabTile:
    """A slab of ``chunk`` columns, ``rows`` rows at a time."""

    rows: int
    chunk: int
    warps: int
    programs: int = 0  # for each multiprocessor, all slabs together; 0 for one program for each tile


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def _row_tile(width: int, itemsize: int, architecture: Architecture, most: int) -> tuple[int, int, int, int]:
    """rows, chunk, chunks and warps, with at most ``most`` elements of a row for each thread if 16 warps allow it."""
    vector = VECTOR_BYTES // itemsize
    along = 1
    while along < MOST_WARPS and _pieces(width, architecture.warp * along * vector) * vector > most:
        along *= 2
    chunk = min(architecture.warp * along * vector, power_of_two(width))
    warps = max(4, along)
    rows = max(1, min(warps * architecture.warp * vector // chunk, 64))
    return rows, chunk, _pieces(width, chunk), warps


def _pieces(width: int, chunk: int) -> int:
    return -(-width // chunk)


@tuned(RowTile, whole_rows(), optional=True)
def norm_forward(width: int, itemsize: int, architecture: Architecture) -> RowTile | None:
    """A row in fp32 and what is loaded for it; None where that exceeds the registers of a program."""
    if width > 16384:
        return None
    return RowTile(*_row_tile(width, itemsize, architecture, 32))


@tuned(RowTile, whole_rows(persistent=True), optional=True)
def norm_backward(width: int, itemsize: int, architecture: Architecture, sums: int) -> RowTile | None:
    """Beside a row of each of four inputs, ``sums`` column sums; None where they exceed the registers of a program."""
    rows, chunk, chunks, warps = _row_tile(width, itemsize, architecture, 24)
    held = chunks * chunk * rows // (warps * architecture.warp)  # elements of a tile for each thread
    if held > 24 or held * max(sums, 2) * warps * architecture.warp > 16384:
        return None
    return RowTile(rows, chunk, chunks, warps, programs=16 // warps if held <= 16 else 12 // warps)


@tuned(SlabTile, slabs())
def edit_forward(width: int, itemsize: int, architecture: Architecture) -> SlabTile:
    """Two vectors of 16 bytes for each thread and input."""
    return _slab(width, itemsize, architecture, 16, 0)


@tuned(SlabTile, slabs(persistent=True))
def edit_backward(width: int, itemsize: int, architecture: Architecture) -> SlabTile:
    """As forward, with two column sums for each element of the tile."""
    return _slab(width, itemsize, architecture, 16, 4)


@tuned(SlabTile, slabs(persistent=True))
def wide_backward(width: int, itemsize: int, architecture: Architecture) -> SlabTile:
    """Rows too wide to hold: their statistics come from a kernel before."""
    return _slab(width, itemsize, architecture, 16, 4)


def _slab(width: int, itemsize: int, architecture: Architecture, held: int, programs: int) -> SlabTile:
    vector, warps = VECTOR_BYTES // itemsize, 4
    chunk = min(architecture.warp * vector, power_of_two(width))
    rows = max(1, min(warps * architecture.warp * held // chunk, 64))
    return SlabTile(rows, chunk, warps, programs)


@tuned(RowTile, whole_rows(one_row=True))
def wide_norm(width: int, itemsize: int, architecture: Architecture) -> RowTile:
    """Rows too wide to hold, one for each program, piece by piece."""
    chunk = min(architecture.warp * MOST_WARPS * VECTOR_BYTES // itemsize, power_of_two(width))
    return RowTile(1, chunk, _pieces(width, chunk), MOST_WARPS)


@tuned(SlabTile, slabs())
def finish(width: int, architecture: Architecture) -> SlabTile:
    """The sum of the few hundred lines that programs left: nearly all of them in flight at once, in many programs."""
    return SlabTile(256, min(32, power_of_two(width)), 8)


@tuned(SlabTile, slabs())
def finish_edits(width: int, architecture: Architecture) -> SlabTile:
    """The same for each of many edits, most of which have a few lines."""
    return SlabTile(32, min(128, power_of_two(width)), 4)
