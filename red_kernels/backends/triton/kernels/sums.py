"""The last step of column sums: one deterministic kernel adds the programs' lines, for all sums at once."""

import triton
import triton.language as tl

from .device import RUNTIME, load


@triton.jit
def _which(n, a, b, c, d):
    """The ``n``-th of up to four addresses; the rest are None."""
    found = a
    if b is not None:
        if n == 1:
            found = b
    if c is not None:
        if n == 2:
            found = c
    if d is not None:
        if n == 3:
            found = d
    return found


@triton.jit(do_not_specialize=RUNTIME)
def add_lines(
    first_in, second_in, third_in, fourth_in, first_out, second_out, third_out, fourth_out,
    lines: tl.int64,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Up to four buffers ``(lines, D)`` to as many vectors ``(D,)``. The grid is (slabs, buffers)."""
    sums = _which(tl.program_id(1), first_in, second_in, third_in, fourth_in)
    out = _which(tl.program_id(1), first_out, second_out, third_out, fourth_out)
    first = tl.program_id(0) * CHUNK
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(0, lines, ROWS):
        line = start + tl.arange(0, ROWS).to(tl.int64)
        total += load(sums, line, line < lines, first, D, CHUNK)
    cols = first + tl.arange(0, CHUNK)
    tl.store(out + cols, tl.sum(total, axis=0), mask=cols < D)


@triton.jit(do_not_specialize=RUNTIME)
def add_edits(
    first_in, second_in, owners, offsets, first_out, second_out,
    edits: tl.int64, length: tl.int64,
    D: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One or two buffers ``(lines, D)`` to as many ``(edits, D)``: each edit's line, or the lines that its workers
    share.

    See :mod:`.device`. ``offsets`` has each edit's first position in the order of rows. The grid is (edits, slabs,
    buffers).
    """
    sums = _which(tl.program_id(2), first_in, second_in, None, None)
    out = _which(tl.program_id(2), first_out, second_out, None, None)
    edit = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * CHUNK
    begin = tl.load(offsets + edit)
    end = tl.load(offsets + edit + 1)
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    found = tl.zeros([ROWS], tl.int32)
    # the lines of the workers from that of its first row to that of its last
    last = tl.where(end > begin, 2 * ((end - 1) // length) + 2, 0)
    for start in range(2 * (begin // length), last, ROWS):
        line = start + tl.arange(0, ROWS).to(tl.int64)
        own = tl.load(owners + line, mask=line < last, other=-1) == edit
        total += load(sums, edits + line, own, first, D, CHUNK)
        found += own.to(tl.int32)
    width = tl.where(end > begin, D, 0)
    width = tl.where(tl.sum(found, axis=0) > 0, 0, width)  # only an edit within one worker has its own line
    cols = first + tl.arange(0, CHUNK)
    direct = tl.load(sums + edit * D + cols, mask=cols < width, other=0.0)
    tl.store(out + edit * D + cols, tl.sum(total, axis=0) + direct, mask=cols < D)
