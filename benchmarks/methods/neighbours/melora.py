"""MELoRA: small LoRAs side by side on the diagonal (arXiv 2402.17263)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..frame import Method, Prepared
from ..known import ALPHA, RANK
from ..linears import QUERIES, VALUES, block_linears, named, sizes
from .attach import beside

PARTS = 8


class BlockDiagonal(nn.Module):
    """`scale * diag(B_1 A_1, ..., B_n A_n) x` for x of shape `(..., into)`; the result has shape `(..., out)`.

    Attributes:
        first: the `A_i`, of shape `(parts, into / parts, rank)`, initialised like LoRA's A.
        second: the `B_i`, of shape `(parts, rank, out / parts)`, zeros at the start.

    Raises ValueError if `parts` does not divide both sizes.
    """

    def __init__(self, into: int, out: int, parts: int, rank: int, scale: float, device: torch.device) -> None:
        super().__init__()
        if into % parts or out % parts:
            raise ValueError(f"parts: got {parts}, expected a divisor of {into} and of {out}")
        self.parts, self.scale = parts, scale
        bound = math.sqrt(parts / into)
        self.first = nn.Parameter(torch.empty(parts, into // parts, rank, device=device).uniform_(-bound, bound))
        self.second = nn.Parameter(torch.zeros(parts, rank, out // parts, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        low = torch.einsum("...ni,nir->...nr", x.unflatten(-1, (self.parts, -1)), self.first)
        return self.scale * torch.einsum("...nr,nro->...no", low, self.second).flatten(-2)


def melora(model: nn.Module, parts: int = PARTS, rank: int = RANK // PARTS) -> Prepared:
    """MELoRA with `parts` LoRAs of a rank each, each of its own part of the inputs and outputs.

    `(W + scale * diag(B_1 A_1, ..., B_n A_n)) x`. All of them together have the rank `parts * rank`, equal to LoRA's
    here; the scale is LoRA's too.

    - Layers: queries and values, as in the paper.
    - Start: `B_i = 0`.
    - Parameters: `rank * (in + out)` for each layer, a LoRA of the same rank having `parts` times as many.

    Raises ValueError if `parts` does not divide a layer's sizes.
    """
    model.requires_grad_(False)
    linears = block_linears(model)
    made = {}
    for name in named(linears, QUERIES, VALUES):
        device = next(linears[name].parameters()).device
        made[name] = BlockDiagonal(*sizes(linears[name]), parts, rank, ALPHA / RANK, device)
    for name, delta in made.items():
        beside(linears[name], delta)
    return Prepared(model, [own for delta in made.values() for own in delta.parameters()])


METHOD = Method("melora", f"MELoRA {PARTS} x r={RANK // PARTS}, queries and values", melora)
