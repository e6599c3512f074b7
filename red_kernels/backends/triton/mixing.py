"""Mixes on the kernels, with a norm behind them and without; see :mod:`.operations`.

If a row does not fit into a program, a forward with a norm is two kernels, the mix and then the norm of its result, and
a backward takes the averages of each row from a kernel before it. If a block does not fit either, another kernel
computes the dot products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import Mix, Norm, Statistics, edit_of
from ..reference import MixGrads, MixNormGrads
from . import mix_rules, operations, rules
from .dealing import dense, drop_numbers, finish, lines_of, maybe, no_sums, statistic, work_of
from .kernels import mix
from .launch import Kernel, architecture

_forward, _dots, _backward = Kernel(mix.mix_forward), Kernel(mix.mix_dots), Kernel(mix.mix_backward)

KERNELS = (_forward, _dots, _backward)


def mix_forward(x: Tensor, residual: Tensor | None, mix: Mix) -> Tensor:
    return _mixed(x, residual, mix, None)[1]


def mix_norm_forward(
    x: Tensor, residual: Tensor | None, mix: Mix, norm: Norm
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    y, z, mean, rstd = _mixed(x, residual, mix, norm)
    if y is None or rstd is None:
        y, _, mean, rstd = operations.edit_norm_forward(z, None, edit_of(None, None), norm, False)
    return y, z, mean, rstd


def mix_backward(dz: Tensor, x: Tensor | None, mix: Mix, n_edits: int, needs: tuple[bool, ...]) -> MixGrads:
    norm, all_needs = Norm(None, None, 0.0), (needs[0], False, *needs[1:], False, False)
    found = _gradients(dz, None, None, x, mix, norm, None, n_edits, all_needs)
    return MixGrads(found[0], *found[2:5])


def mix_norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    x: Tensor | None,
    mix: Mix,
    norm: Norm,
    statistics: Statistics,
    n_edits: int,
    needs: tuple[bool, ...],
) -> MixNormGrads:
    return MixNormGrads(*_gradients(dy, dz, z, x, mix, norm, statistics, n_edits, needs))


def _mixed(
    x: Tensor, residual: Tensor | None, mix: Mix, norm: Norm | None
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """``(y, z, mean, rstd)``; all None except ``z`` without a norm, and if a row does not fit into a program."""
    x, residual, ids = dense(x), maybe(residual), maybe(mix.ids)
    first, second, bias, blocks = dense(mix.first), maybe(mix.second), maybe(mix.bias), mix.blocks
    seed, p = mix.seed_and_p
    d, size, chip = x.shape[-1], x.element_size(), architecture(x)
    rows = x.numel() // d
    z = torch.empty_like(x)
    tile = mix_rules.forward(d, blocks, size, chip)
    slabs = tile.slabs(d, blocks)
    y = mean = rstd = None
    if norm is None or slabs > 1:
        norm = Norm(None, None, 0.0)
    else:
        y, rstd = torch.empty_like(x), statistic(x)
        mean = torch.empty_like(rstd) if norm.centered else None
    if rows:
        edits = 1 if ids is None else first.shape[0]
        along = None
        if blocks and tile.slabs_of_a_block(d, blocks) > 1:
            along = _along((x, None, None, None), first, second, None, ids, None, None, None, edits, blocks, 0.0, 0.0)
        _forward(
            (-(-rows // tile.rows), slabs, 1),
            (
                x, residual, first, second, bias, maybe(norm.weight), maybe(norm.bias), ids, seed, along,
                y, z, mean, rstd,
            ),
            (rows, edits, *drop_numbers(seed, p), norm.eps, norm.offset),
            (d, blocks, tile.rows, tile.together, tile.chunk, tile.chunks),
            tile.warps,
        )  # fmt: skip
    return y, z, mean, rstd


def _gradients(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor | None,
    x: Tensor | None,
    mix: Mix,
    norm: Norm,
    statistics: Statistics | None,
    n_edits: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, residual, first, second, bias, weight and norm_bias; without ``statistics`` there is no norm."""
    dy, dz, z, x = dense(dy), maybe(dz), maybe(z), maybe(x) if needs[2] or needs[3] else None
    first, second, blocks, weight = dense(mix.first), maybe(mix.second), mix.blocks, maybe(norm.weight)
    seed, p = mix.seed_and_p
    d, size, chip = dy.shape[-1], dy.element_size(), architecture(dy)
    rows = dy.numel() // d
    dx = torch.empty_like(dy) if needs[0] else None
    dresidual = torch.empty_like(dy) if needs[1] else None
    if not rows:
        return dx, dresidual, *no_sums(dy, needs[2:5], mix.ids, n_edits), *no_sums(dy, needs[5:], None, 1)
    by_edit = mix.ids is not None and any(needs[2:5])
    tile = None
    if statistics is not None:
        tile = mix_rules.norm_backward(d, blocks, size, chip, sum(needs[2:]) + (seed is not None) + 2 * by_edit)
    whole = tile is not None
    tile = tile or mix_rules.backward(d, blocks, size, chip)
    slabs = tile.slabs(d, blocks)
    work = work_of(dy, rows, tile, slabs, mix.ids, n_edits, needs[2:5])
    norm_lines = tuple(lines_of(dy, work.programs) if need else None for need in needs[5:])
    mean, rstd = (None, None) if statistics is None else statistics
    averages = along = None
    if rstd is not None and not whole:
        averages = _averages(dy, z, weight, mean, rstd, norm.offset)
    if blocks and tile.slabs_of_a_block(d, blocks) > 1 and any(needs[:4]):
        along = _along(
            (dy, dz, z, x), first, second, weight, maybe(mix.ids), seed, statistics, averages, n_edits, blocks, p,
            norm.offset,
        )  # fmt: skip
    _backward(
        (work.programs, slabs, 1),
        (
            dy, dz, z, x, first, second, weight, work.ids, work.order, work.owners, seed, mean, rstd, averages, along,
            dx, dresidual, *work.edit_lines, *norm_lines,
        ),
        (rows, n_edits, work.length, *drop_numbers(seed, p), norm.offset),
        (d, blocks, tile.rows, tile.together, tile.chunk, tile.chunks),
        tile.warps,
    )  # fmt: skip
    return dx, dresidual, *finish(work, norm_lines, dy, n_edits)


def _averages(
    dy: Tensor, z: Tensor | None, weight: Tensor | None, mean: Tensor | None, rstd: Tensor, offset: float
) -> Tensor:
    """The two averages of each row for the gradient of a norm."""
    d = dy.shape[-1]
    rows = dy.numel() // d
    tile = rules.wide_norm(d, dy.element_size(), architecture(dy))
    found = torch.empty((2, rows), dtype=torch.float32, device=dy.device)
    operations.wide_averages(
        (rows, 1, 1),
        (dy, z, None, None, None, None, weight, None, None, mean, rstd, found),
        (rows, 1, *drop_numbers(None, 0.0), offset),
        (d, tile.chunk, False),
        tile.warps,
    )
    return found


def _along(
    activations: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    ids: Tensor | None,
    seed: Tensor | None,
    statistics: Statistics | None,
    averages: Tensor | None,
    edits: int,
    blocks: int,
    p: float,
    offset: float,
) -> Tensor:
    """The dot products of each block with ``first`` and ``second``; see :func:`.kernels.mix.mix_dots`."""
    like = activations[0]
    d = like.shape[-1]
    rows = like.numel() // d
    chunk, warps = mix_rules.dots(d, blocks, like.element_size(), architecture(like))
    found = torch.empty((4, rows, blocks), dtype=torch.float32, device=like.device)
    mean, rstd = (None, None) if statistics is None else statistics
    _dots(
        (rows, blocks, 1),
        (*activations, first, second, weight, ids, seed, mean, rstd, averages, found),
        (rows, edits, *drop_numbers(seed, p), offset),
        (d, blocks, chunk),
        warps,
    )
    return found
