"""The rows, columns and threads of a program of each kernel: frozen dataclasses made by named factories.

The factories reason from the register file; a table measured by ``red-kernels bench --tune`` overrides them
(:mod:`.tuned`). Only :func:`linear` depends on the number of rows, so other kernels are compiled once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tuned import blocks, slabs, tuned, whole_rows

VECTOR_BYTES = 16  # the widest access of a thread
MOST_WARPS = 16
MOST_SLABS = 65535  # the second size of a grid
SHARED_KIB = {"sm_75": 64, "sm_80": 163, "sm_87": 163, "sm_90": 227, "sm_100": 227, "sm_103": 227, "gfx950": 160}


@dataclass(frozen=True)
class Architecture:
    """The facts of a device for the factories: its name ('sm_90', 'gfx942'), threads of a warp, multiprocessors."""

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


@dataclass(frozen=True)
class LinearTile:
    """A block of a matrix product, ``block_k`` terms of its sums at a time, ``stages`` of these in flight.

    ``group`` rows of blocks are taken together. The operations behind the product run in ``2 ** splits`` pieces, side
    by side.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    splits: int
    warps: int
    stages: int


def power_of_two(n: int) -> int:
    """The least power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def _row_tile(width: int, itemsize: int, architecture: Architecture, most: int) -> tuple[int, int, int, int]:
    """rows, chunk, chunks and warps, with at most ``most`` elements of a row for each thread if 16 warps allow it."""
    vector = VECTOR_BYTES // itemsize
    along = 1
    while along < MOST_WARPS and _pieces(width, architecture.warp * along * vector) * vector > most:
        along *= 2
    return _rows_of(width, vector, architecture, along)


def _rows_of(width: int, vector: int, architecture: Architecture, along: int) -> tuple[int, int, int, int]:
    """rows, chunk, chunks and warps, with ``along`` warps side by side along a row."""
    chunk = min(architecture.warp * along * vector, power_of_two(width))
    warps = max(4, along)
    rows = max(1, min(warps * architecture.warp * vector // chunk, 64))
    return rows, chunk, _pieces(width, chunk), warps


def _pieces(width: int, chunk: int) -> int:
    return -(-width // chunk)


@tuned(RowTile, whole_rows(), optional=True)
def norm_forward(width: int, itemsize: int, architecture: Architecture) -> RowTile | None:
    """A row in fp32 and its loads; None if they exceed the registers of a program."""
    if width > 16384:
        return None
    return RowTile(*_row_tile(width, itemsize, architecture, 32))


@tuned(RowTile, whole_rows(persistent=True), optional=True)
def norm_backward(width: int, itemsize: int, architecture: Architecture, sums: int) -> RowTile | None:
    """A row of each of four inputs, and ``sums`` column sums; None if they exceed the registers of a program.

    Options that take as many registers count as a sum: dropout, recomputing z, and twice the edits of edit_ids. With 16
    elements and four sums a thread spills nothing, in up to 8 warps. Widths that would leave more than a quarter of the
    lanes idle take 24 elements, which allow three sums; 16 warps, which have 128 registers a thread, allow two.
    """
    vector, most = VECTOR_BYTES // itemsize, 4
    found = _fitting(width, vector, architecture, 16)
    if found is None:
        found, most = _fitting(width, vector, architecture, 24), 3
    if found is None and itemsize == 2 and width <= MOST_WARPS * 16 * 32 and architecture.warp == 32:
        found, most = _rows_of(width, vector, architecture, MOST_WARPS), 2
    if found is None or sums > most:
        return None
    rows, chunk, chunks, warps = found
    halves = itemsize == 2 and architecture.warp == 32
    whole = halves and rows == chunks == 2 and chunk * chunks > width
    if whole:  # d = 768: two pieces with as many lanes take more registers, so that fewer programs fit
        chunk, chunks = chunk * chunks, 1
    # as many programs as fit with the registers of the usual options
    together = 8 if most == 3 else 16 if halves and (rows == 1 or whole) else 12
    return RowTile(rows, chunk, chunks, warps, programs=max(1, together // warps))


def _fitting(width: int, vector: int, architecture: Architecture, most: int) -> tuple[int, int, int, int] | None:
    """rows, chunk, chunks and warps with at most ``most`` elements of a row for each thread, with at most 8 warps.

    None if there are none; with 16 elements, if more than a quarter of the lanes would be idle.
    """
    along = 1
    while along <= 8:
        chunk = architecture.warp * along * vector
        lanes = _pieces(width, chunk) * chunk
        if lanes <= most * architecture.warp * along and (most > 16 or along == 1 or 3 * lanes <= 4 * width):
            return _rows_of(width, vector, architecture, along)
        along *= 2
    return None


@tuned(SlabTile, slabs())
def edit_forward(width: int, itemsize: int, architecture: Architecture) -> SlabTile:
    """Two vectors of 16 bytes for each thread and input."""
    return _slab(width, itemsize, architecture, 16, 4, 0)


@tuned(SlabTile, slabs(persistent=True))
def edit_backward(width: int, itemsize: int, architecture: Architecture) -> SlabTile:
    """As forward, with two column sums for each element of the tile."""
    return _slab(width, itemsize, architecture, 16, 4, 4)


@tuned(SlabTile, slabs(persistent=True))
def wide_backward(width: int, itemsize: int, architecture: Architecture) -> SlabTile:
    """Rows too wide for registers: a kernel before computes their statistics.

    One vector of each input for a thread spills nothing under all options: four column sums, dropout, edit_ids and a
    recomputed z. More programs are better than more vectors.
    """
    return _slab(width, itemsize, architecture, VECTOR_BYTES // itemsize, 8, 2)


def _slab(width: int, itemsize: int, architecture: Architecture, held: int, warps: int, programs: int) -> SlabTile:
    chunk = min(architecture.warp * VECTOR_BYTES // itemsize, power_of_two(width))
    chunk = max(chunk, power_of_two(_pieces(width, MOST_SLABS)))
    rows = max(1, min(warps * architecture.warp * held // chunk, 64))
    return SlabTile(rows, chunk, warps, programs)


@tuned(RowTile, whole_rows(one_row=True))
def wide_norm(width: int, itemsize: int, architecture: Architecture) -> RowTile:
    """Rows too wide for registers, one for each program, piece by piece, with a whole vector for each warp."""
    vector = VECTOR_BYTES // itemsize
    warps = min(MOST_WARPS, power_of_two(_pieces(width, architecture.warp * vector)))
    chunk = min(architecture.warp * warps * vector, power_of_two(width))
    return RowTile(1, chunk, _pieces(width, chunk), warps)


@tuned(SlabTile, slabs())
def finish(width: int, architecture: Architecture) -> SlabTile:
    """The sum of the programs' few hundred lines: nearly all in flight at once, in many programs."""
    return SlabTile(256, min(32, power_of_two(width)), 8)


@tuned(SlabTile, slabs())
def finish_edits(width: int, architecture: Architecture) -> SlabTile:
    """The same for each of many edits, most of which have a few lines."""
    chunk = max(min(128, power_of_two(width)), power_of_two(_pieces(width, MOST_SLABS)))
    return SlabTile(32, chunk, 4)


@tuned(LinearTile, blocks)
def linear(rows: int, width: int, depth: int, itemsize: int, precision: str, architecture: Architecture) -> LinearTile:
    """``(rows, depth) @ (width, depth).T``; it depends on the rows, so it takes a power of two of them.

    Few rows take few lanes and long pieces: they wait for the weight. The number of columns minimises the loads of a
    multiprocessor: a block loads ``block_m + block_n`` numbers for each term of its sums, and the busiest
    multiprocessor runs one block after another. Blocks are small if registers run short: in fp32 without TF32, which
    has no tensor cores on NVIDIA, and if rows do not start at vectors.
    """
    exact = itemsize == 4 and precision == "ieee"
    small = exact or bool(width * itemsize % VECTOR_BYTES or depth * itemsize % VECTOR_BYTES)
    block_m = max(16, min(rows, 128)) if not small else 16 if rows <= 16 else 64
    along = 128 if block_m > 16 or small else 512  # bytes
    block_k = max(16, min(along // itemsize, power_of_two(depth)))
    nvidia = not architecture.name.startswith("gfx")
    room = SHARED_KIB.get(architecture.name, 99 if nvidia else 64) * 1024 // (block_k * itemsize)
    stages = 3 if nvidia else 1  # at least; AMD's first stage waits in registers

    def loads(block_n: int) -> int:
        count = _pieces(rows, block_m) * _pieces(width, block_n)
        return _pieces(count, architecture.multiprocessors) * (block_m + block_n)

    most = 64 if small else 256 if block_m == 128 and itemsize == 2 else min(128, block_m * 4)
    fit = [n for n in (256, 128, 64, 32, 16) if n <= most and (block_m + n) * stages <= room]
    block_n = min(fit, key=loads)  # the largest of the best
    return LinearTile(
        block_m,
        block_n,
        block_k,
        group=8,
        splits=max(0, block_n.bit_length() - 7),  # at least 64 columns to a piece
        warps=8 if block_m == 128 else 4,
        stages=min(4, room // (block_m + block_n)) if nvidia else 2,
    )
