"""LoRETTA: adapters, and LoRA's factors, as tensor trains (arXiv 2402.11417; written from the paper alone)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frame import Method, Prepared
from ..known import ALPHA, RANK
from ..linears import QUERIES, VALUES, block_linears, named, sizes
from ..red import edited_sites
from .attach import behind, beside

TRAIN_RANK, BOTTLENECK = 5, 64


def factors(size: int, count: int) -> tuple[int, ...]:
    """This many factors of a number, as close as its divisors allow, rising: 768 in three is 8 x 8 x 12."""
    if count == 1:
        return (size,)
    first = next(own for own in range(math.floor(size ** (1 / count) + 1e-9), 0, -1) if size % own == 0)
    return (first, *factors(size // first, count - 1))


def _falling(size: int) -> tuple[int, ...]:
    """Three factors, the greatest first: at an end of a train, its core is smallest."""
    return factors(size, 3)[::-1]


class TensorTrain(nn.Module):
    """A matrix of shape `(rows, columns)` as a train of cores.

    Its entries in row-major order are a tensor of the shape `modes`, whose entry `(i_1, ..., i_d)` is the product of
    the matrices `G_1[i_1] ... G_d[i_d]`. The core `G_k` has shape `(r, modes[k], r')`; r and r' are the train's rank,
    and 1 at its ends. So it has `sum of r * modes[k] * r'` parameters.

    At the start the matrix has entries of variance `1 / columns`, or is zero: then the last core is zero.
    """

    def __init__(
        self, rows: Sequence[int], columns: Sequence[int], rank: int, *, zero: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.shape = (math.prod(rows), math.prod(columns))
        modes = (*rows, *columns)
        ends = (1, *[rank] * (len(modes) - 1), 1)
        # An entry is a sum of rank^(d - 1) products of d numbers.
        spread = (1 / (self.shape[1] * rank ** (len(modes) - 1))) ** (1 / (2 * len(modes)))
        self.cores = nn.ParameterList(
            nn.Parameter(torch.randn(ends[k], mode, ends[k + 1], device=device) * spread)
            for k, mode in enumerate(modes)
        )
        if zero:
            nn.init.zeros_(self.cores[-1])

    def matrix(self) -> Tensor:
        """The matrix, of shape `(rows, columns)`."""
        found = torch.ones(1, 1, device=self.cores[0].device)
        for core in self.cores:
            found = (found @ core.flatten(1)).view(-1, core.shape[-1])
        return found.view(self.shape)


class Reparametrised(nn.Module):
    """`scale * B A x` for x of shape `(..., into)`, A and B being tensor trains; the result has shape `(..., out)`."""

    def __init__(self, into: int, out: int, rank: int, train_rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        self.scale = scale
        self.first = TensorTrain((rank,), factors(into, 3), train_rank, zero=False, device=device)
        self.second = TensorTrain(_falling(out), (rank,), train_rank, zero=True, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.scale * F.linear(F.linear(x, self.first.matrix()), self.second.matrix())


class TrainAdapter(nn.Module):
    """`U gelu(D x + c) + b` for x of shape `(..., width)`, D and U being tensor trains through a bottleneck."""

    def __init__(self, width: int, bottleneck: int, train_rank: int, device: torch.device) -> None:
        super().__init__()
        narrow = factors(bottleneck, 2)
        self.down = TensorTrain(narrow, factors(width, 3), train_rank, zero=False, device=device)
        self.down_bias = nn.Parameter(torch.zeros(bottleneck, device=device))
        self.up = TensorTrain(_falling(width), narrow, train_rank, zero=True, device=device)
        self.up_bias = nn.Parameter(torch.zeros(width, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.linear(F.gelu(F.linear(x, self.down.matrix(), self.down_bias)), self.up.matrix(), self.up_bias)


def loretta_rep(model: nn.Module, rank: int = RANK, train_rank: int = TRAIN_RANK) -> Prepared:
    """LoRETTA_rep: a LoRA whose two factors are tensor trains.

    `(W + scale * B A) x`, with A of shape `(rank, in)` and B of shape `(out, rank)` as `TensorTrain`s: three modes for
    `in` or `out`, one for the rank.

    - Layers: queries and values.
    - Start: the last core of B is 0. The paper draws all cores at random and reduces their noise.
    - Parameters: those of two `TensorTrain`s for each layer. Norms stay frozen.
    """
    model.requires_grad_(False)
    linears = block_linears(model)
    trained: list[nn.Parameter] = []
    for name in named(linears, QUERIES, VALUES):
        device = next(linears[name].parameters()).device
        delta = Reparametrised(*sizes(linears[name]), rank, train_rank, ALPHA / RANK, device)
        beside(linears[name], delta)
        trained += delta.parameters()
    return Prepared(model, trained)


def loretta_adp(model: nn.Module, bottleneck: int = BOTTLENECK, train_rank: int = TRAIN_RANK) -> Prepared:
    """LoRETTA_adp: bottleneck adapters of tensor trains, behind each attention and each FFN.

    `y + U gelu(D y + c) + b` with y the output of an attention's or an FFN's last projection, D of shape
    `(bottleneck, width)` and U of shape `(width, bottleneck)` as `TensorTrain`s: three modes for the width, two for the
    bottleneck.

    - Places: those of RED's position `ffn_attn`.
    - Start: the last core of U and b are 0.
    - Parameters: those of two `TensorTrain`s, `bottleneck` and `width` for each place. Norms stay frozen, and so does
      the head, which the paper can make a tensor train for classification.
    """
    sites = edited_sites(model, "ffn_attn")
    model.requires_grad_(False)
    device = next(model.parameters()).device
    trained: list[nn.Parameter] = []
    for site, width in sites.items():
        adapter = TrainAdapter(width, bottleneck, train_rank, device)
        behind(model.get_submodule(site), adapter)
        trained += adapter.parameters()
    return Prepared(model, trained)


METHODS = (
    Method("loretta-adp", f"LoRETTA_adp {BOTTLENECK}, TT rank {TRAIN_RANK}", loretta_adp),
    Method("loretta-rep", f"LoRETTA_rep r={RANK}, TT rank {TRAIN_RANK}", loretta_rep),
)
