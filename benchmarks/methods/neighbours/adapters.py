"""The neighbours in PEFT: RoAd, VeRA and HRA. Its code is under Apache-2.0."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..frame import Method, Prepared, with_peft
from ..known import RANK
from ..linears import QUERIES, VALUES, as_linears, block_linears, named, sizes, transposed

VERA_RANK = 256


def road(model: nn.Module) -> Prepared:
    """RoAd_1: the outputs of a linear layer in pairs, each pair rotated by an angle and scaled (arXiv 2409.00119).

    `y = R(theta, alpha) (W x + b)`, where a pair `(u, v)` becomes `alpha (u cos theta - v sin theta)` and
    `alpha (u sin theta + v cos theta)`.

    - Layers: all linear ones of the blocks, as in the paper.
    - Start: `theta = 0`, `alpha = 1`, the identity.
    - Parameters: an angle and a scale for each pair, so `out` for a layer with as many outputs.

    Raises ValueError if the layers have an odd number of outputs.
    """
    import peft

    linears = block_linears(model)
    # The choice of pairs does not matter to the method. PEFT needs groups that divide every layer's outputs.
    group = math.gcd(64, *(sizes(own)[1] for own in linears.values()))
    as_linears(model, linears)
    return with_peft(model, peft.RoadConfig(variant="road_1", group_size=group, target_modules=list(linears)))


def vera(model: nn.Module, rank: int = VERA_RANK) -> Prepared:
    """VeRA: two random matrices that all layers share, and the scales of their rows (arXiv 2310.11454, equation 2).

    `W x + diag(b) B diag(d) A x`, A of shape `(rank, in)` and B of shape `(out, rank)`, drawn once and frozen.

    - Layers: queries and values, as in the paper.
    - Start: `b = 0`, so nothing is added; `d = 0.1`.
    - Parameters: `out + rank` for each layer; the paper has `L_tuned (d_model + r)`.
    """
    import peft

    linears = block_linears(model)
    names = named(linears, QUERIES, VALUES)
    config = peft.VeraConfig(r=rank, target_modules=names, fan_in_fan_out=transposed(linears, names))
    prepared = with_peft(model, config)
    shared: Any = prepared.model.base_model
    prepared.fixed = [*shared.vera_A.values(), *shared.vera_B.values()]
    return prepared


def hra(model: nn.Module, rank: int = RANK, *, every: bool = False) -> Prepared:
    """HRA: weights multiplied by a chain of Householder reflections (arXiv 2405.17484, section 3.1).

    `W H_1 ... H_rank x` with `H_i = I - 2 u_i u_i^T / |u_i|^2`, u_i of shape `(in,)`. It omits the penalty that pulls
    the `u_i` towards orthogonality (lambda = 0), which would be a part of the loss.

    - Layers: queries and values; `every` takes all linear layers of the blocks. PEFT builds an `(in, in)` matrix for
      each layer in each step, which for an FFN's width dominates the time.
    - Start: equal neighbours in the chain, each of which cancels the other; `rank` must be even for that.
    - Parameters: `rank * in` for each layer.

    Raises ValueError for an odd rank.
    """
    import peft

    if rank % 2:
        raise ValueError(f"rank: got {rank}, expected an even number: an odd chain does not start as the frozen model")
    linears = block_linears(model)
    names = list(linears) if every else named(linears, QUERIES, VALUES)
    as_linears(model, names)
    return with_peft(model, peft.HRAConfig(r=rank, target_modules=names))


METHODS = (
    Method("road", "RoAd_1, all linear layers", road, "peft"),
    Method("vera", f"VeRA r={VERA_RANK}, queries and values", vera, "peft"),
    Method("hra", f"HRA r={RANK}, queries and values", hra, "peft"),
)
