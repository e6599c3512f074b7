"""LoRTA: the updates of all attentions as one tensor of low CP rank (arXiv 2410.04060)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frame import Method, Prepared
from ..known import ALPHA, RANK
from ..linears import KEYS, QUERIES, VALUES, block_linears, sizes
from ..red import edited_sites
from .attach import beside

QUERY, KEY, VALUE, OUTPUT = range(4)
_SIDE_BY_SIDE = ("c_attn", "qkv_proj")  # the outputs are all queries, then all keys, then all values


class CpTensor(nn.Module):
    """The factors of the tensor, which has the modes width, head dimension, head, layer and matrix.

    Its entry is `sum over s of width[i, s] inner[j, s] heads[h, s] layers[l, s] kinds[m, s]`.

    Attributes:
        width: A of the paper, of shape `(width, rank)`, initialised like LoRA's A.
        inner: B, of shape `(head dimension, rank)`, zeros at the start.
        heads, layers, kinds: C_H, C_L and C_M, of shapes `(heads, rank)`, `(layers, rank)` and `(4, rank)`, with
            entries of mean 0 and variance 1 at the start.
    """

    def __init__(self, width: int, inner: int, heads: int, layers: int, rank: int, device: torch.device) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.width = nn.Parameter(torch.empty(width, rank, device=device).uniform_(-bound, bound))
        self.inner = nn.Parameter(torch.zeros(inner, rank, device=device))
        self.heads, self.layers, self.kinds = (
            nn.Parameter(torch.randn(count, rank, device=device)) for count in (heads, layers, 4)
        )

    def of_heads(self, layer: int, kind: int, heads: int) -> Tensor:
        """The product of all factors but the width's, for the first `heads` heads: `(heads * head dimension, rank)`."""
        weights = self.heads[:heads] * (self.layers[layer] * self.kinds[kind])
        return (weights[:, None] * self.inner).flatten(0, 1)


class Slice(nn.Module):
    """One linear layer's part of the tensor: `scale * M_h A^T x`, or for an output projection `scale * A M_h^T x`.

    Args:
        tensor: the factors, shared by all layers.
        layer: the number of its attention.
        kinds: its matrices, side by side, each with its number of heads.
        scale: of the update.
    """

    def __init__(self, tensor: CpTensor, layer: int, kinds: tuple[tuple[int, int], ...], scale: float) -> None:
        super().__init__()
        self.tensor = tensor
        self._layer, self._kinds, self._scale = layer, kinds, scale

    def forward(self, x: Tensor) -> Tensor:
        """See the class; x has shape `(..., into)`, the result `(..., out)`."""
        own = torch.cat([self.tensor.of_heads(self._layer, kind, heads) for kind, heads in self._kinds])
        if self._kinds[0][0] == OUTPUT:
            return self._scale * F.linear(F.linear(x, own.t()), self.tensor.width)
        return self._scale * F.linear(F.linear(x, self.tensor.width.t()), own)


@dataclass(frozen=True)
class Attention:
    """One attention's linear layers: the input ones, with their matrices, and the last one."""

    into: tuple[tuple[str, tuple[int, ...]], ...]
    out: str


def attentions(model: nn.Module) -> list[Attention]:
    """A model's attentions in its order, a decoder's two in a layer one by one.

    Raises ValueError if the names do not identify queries, keys and values.
    """
    linears = block_linears(model)
    found: list[tuple[tuple[str, tuple[int, ...]], ...]] = []
    for name in linears:
        parent, _, last = name.rpartition(".")
        if last in _SIDE_BY_SIDE:
            found.append(((name, (QUERY, KEY, VALUE)),))
        elif last in QUERIES:
            others = [next((f"{parent}.{own}" for own in group if f"{parent}.{own}" in linears), None)
                      for group in (KEYS, VALUES)]  # fmt: skip
            if None not in others:
                found.append(tuple((str(own), (kind,)) for kind, own in enumerate((name, *others))))
    outs = list(edited_sites(model, "attn"))
    if not found or len(found) != len(outs):
        raise ValueError(
            f"model: its names identify the queries, keys and values of {len(found)} of its {len(outs)} attentions"
        )
    return [Attention(into, out) for into, out in zip(found, outs, strict=True)]


def lorta(model: nn.Module, rank: int = RANK) -> Prepared:
    """LoRTA: one tensor holds the updates of all queries, keys, values and output projections.

    The update of head h in layer l is `A diag(C_H[h] * C_L[l] * C_M[m]) B^T`, of shape `(width, head dimension)`, with
    m the matrix: transposed it adds to the head's rows of the query, key or value weight, as it is to the head's
    columns of the output projection. All of it is scaled as LoRA is here.

    - Layers: queries, keys, values and output projections of all attentions, as in the paper. With fewer heads of keys
      and values than of queries, those use the first heads' factors. A decoder's attention to an encoder counts as a
      separate layer.
    - Start: `B = 0`.
    - Parameters: `rank * (width + head dimension + heads + layers + 4)`, for the whole model.

    Raises ValueError if the names do not identify queries, keys and values, or if attentions differ in size.
    """
    linears = block_linears(model)
    found = attentions(model)
    config: Any = model.config
    heads = config.num_attention_heads
    width = sizes(linears[found[0].into[0][0]])[0]
    inner, rest = divmod(sizes(linears[found[0].out])[0], heads)
    for attention in found:
        outer = sizes(linears[attention.out])
        if rest or outer != (heads * inner, width) or any(sizes(linears[n])[0] != width for n, _ in attention.into):
            raise ValueError(
                f"model: {attention.out!r} of {outer} differs from the first attention, or has not {heads} heads"
            )
    model.requires_grad_(False)
    device = next(model.parameters()).device
    tensor = CpTensor(width, inner, heads, len(found), rank, device)
    for number, attention in enumerate(found):
        for name, kinds in attention.into:
            many = sizes(linears[name])[1] // inner  # heads of all its matrices
            fewer = (many - heads) // 2 if len(kinds) > 1 else many  # of keys, and of values
            held = tuple((kind, heads if kind == QUERY else fewer) for kind in kinds)
            beside(linears[name], Slice(tensor, number, held, ALPHA / RANK))
        beside(linears[attention.out], Slice(tensor, number, ((OUTPUT, heads),), ALPHA / RANK))
    return Prepared(model, list(tensor.parameters()))


METHOD = Method("lorta", f"LoRTA r={RANK}", lorta)
