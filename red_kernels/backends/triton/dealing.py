"""Common code of all operations on the kernels: the distribution of a backward's rows, and its column sums.

See :mod:`.kernels.device` for the lines of the programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import rules
from .kernels import sums
from .launch import Kernel, architecture

_add_lines, _add_edits = Kernel(sums.add_lines), Kernel(sums.add_edits)

KERNELS = (_add_lines, _add_edits)

_LEAST_STRETCH = 16  # rows of a worker, except the last ones


class Tile(Protocol):
    """The relevant facts of a persistent kernel's tile."""

    @property
    def rows(self) -> int:
        """Rows at a time."""

    @property
    def programs(self) -> int:
        """For each multiprocessor, all slabs together."""


class Work(NamedTuple):
    """The distribution of a backward's rows, and the buffers of its programs' sums."""

    programs: int  # for each slab
    ids: Tensor | None  # of each row, or sorted if there is an order
    order: Tensor | None  # the row at each position
    offsets: Tensor | None  # the position at which each edit starts
    owners: Tensor | None
    length: int  # rows of a worker, 0 without an order
    edit_lines: tuple[Tensor | None, ...]  # for the vectors of the edit


def work_of(
    like: Tensor,
    rows: int,
    tile: Tile,
    slabs: int,
    edit_ids: Tensor | None,
    n_edits: int,
    needs: tuple[bool, ...],
) -> Work:
    """Distribute ``rows`` rows over the programs of a kernel with ``slabs`` slabs; ``needs``: of the edit's vectors."""
    programs = max(1, min(tile.programs * architecture(like).multiprocessors // slabs, -(-rows // tile.rows)))
    ids = None if edit_ids is None else dense(edit_ids).reshape(-1)
    if ids is None or not any(needs):
        lines = tuple(lines_of(like, programs) if need else None for need in needs)
        return Work(programs, ids, None, None, None, 0, lines)
    # A worker has several rows, so that not every row writes and reads its own line.
    programs = min(programs, -(-rows // (tile.rows * _LEAST_STRETCH)))
    ids, order = torch.sort(ids, stable=True)
    offsets = torch.searchsorted(ids, torch.arange(n_edits + 1, dtype=ids.dtype, device=ids.device))
    workers = programs * tile.rows
    owners = torch.empty(2 * workers, dtype=torch.int64, device=ids.device)
    count = n_edits + 2 * workers
    lines = tuple(lines_of(like, count) if need else None for need in needs)
    return Work(programs, ids, order, offsets, owners, -(-rows // workers), lines)


def finish(work: Work, norm_lines: tuple[Tensor | None, ...], like: Tensor, n_edits: int) -> tuple[Tensor | None, ...]:
    """Add up the programs' lines: the gradients of the edit's vectors, and those of the norm's."""
    d, chip = like.shape[-1], architecture(like)
    edit_outs: tuple[Tensor | None, ...] = ()
    plain = (*work.edit_lines, *norm_lines)
    if work.order is not None:
        plain = norm_lines
        edit_outs = tuple(None if t is None else lines_of(like, n_edits) for t in work.edit_lines)
        edit_tile = rules.finish_edits(d, chip)
        for ins, outs, rest in _by(2, work.edit_lines, edit_outs):
            _add_edits(
                (n_edits, -(-d // edit_tile.chunk), len(ins)),
                (*ins, *rest, work.owners, work.offsets, *outs, *rest),
                (n_edits, work.length),
                (d, edit_tile.rows, edit_tile.chunk),
                edit_tile.warps,
            )
    plain_outs = tuple(None if t is None else torch.empty(d, dtype=torch.float32, device=like.device) for t in plain)
    tile = rules.finish(d, chip)
    for ins, outs, rest in _by(4, plain, plain_outs):
        _add_lines(
            (-(-d // tile.chunk), len(ins), 1),
            (*ins, *rest, *outs, *rest),
            (work.programs,),
            (d, tile.rows, tile.chunk),
            tile.warps,
        )
    return *edit_outs, *plain_outs


def _by(
    most: int, ins: tuple[Tensor | None, ...], outs: tuple[Tensor | None, ...]
) -> Iterator[tuple[list[Tensor], list[Tensor], list[None]]]:
    """The present sums, as many at a time as a kernel takes, and placeholders for the rest."""
    some, found = [t for t in ins if t is not None], [t for t in outs if t is not None]
    for start in range(0, len(some), most):
        chosen = some[start : start + most]
        yield chosen, found[start : start + most], [None] * (most - len(chosen))


def no_sums(like: Tensor, needs: tuple[bool, ...], edit_ids: Tensor | None, n_edits: int) -> tuple[Tensor | None, ...]:
    """The column sums of no rows."""
    shape = (like.shape[-1],) if edit_ids is None else (n_edits, like.shape[-1])
    return tuple(torch.zeros(shape, dtype=torch.float32, device=like.device) if need else None for need in needs)


def statistic(x: Tensor) -> Tensor:
    """A number for each row. Separate sizes take half the host time of a torch.Size."""
    sizes = x.shape[:-1]
    if not sizes:
        return torch.empty((), dtype=torch.float32, device=x.device)
    return torch.empty(*sizes, dtype=torch.float32, device=x.device)


def lines_of(like: Tensor, count: int) -> Tensor:
    """Lines of column sums, in fp32."""
    return torch.empty(count, like.shape[-1], dtype=torch.float32, device=like.device)


def dense(t: Tensor) -> Tensor:
    """The tensor, copied unless it is contiguous."""
    return t if t.is_contiguous() else t.contiguous()


def maybe(t: Tensor | None) -> Tensor | None:
    """:func:`dense` of a tensor, or None."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def drop_numbers(seed: Tensor | None, dropout_p: float) -> tuple[int, float]:
    """The least kept word, and the factor of kept elements."""
    if seed is None:
        return 0, 1.0
    threshold = round(dropout_p * 2**32)
    if threshold == 2**32:  # no element is kept, which no 32-bit word expresses
        return 0, 0.0
    return threshold, 1.0 / (1.0 - dropout_p)
