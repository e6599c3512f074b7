"""GIFT: a linear layer's weight plus a product of itself with factors that all sites share (arXiv 2312.00700).

`W + (W Psi^T) Phi^T` is the layer after an edit of its input, `x + (x Phi) Psi`.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from .kind import Family, Folded, Kind, Part, Vectors
from .lowrank import own_columns

RANK = 16


def formula(h: Tensor, vectors: Vectors) -> Tensor:
    """`h + (h Phi) Psi`."""
    phi, psi = _both(vectors)
    if phi.dim() > 2:  # each row of h has its own tensors
        return h + (h.unsqueeze(-2) @ phi @ psi).squeeze(-2)
    return h + (h @ phi) @ psi


def by_row(h: Tensor, vectors: Vectors, ids: Tensor) -> Tensor:
    """For several edits: the thin products of all at once; each row keeps its own."""
    phi, psi = _both(vectors)
    inner = h @ phi.transpose(0, 1).flatten(1)
    return h + (inner * own_columns(ids, psi, h.dtype)) @ psi.flatten(0, 1)


def fold(weight: Tensor, bias: Tensor | None, vectors: Vectors) -> Folded:
    """`W + (W Psi^T) Phi^T`, of the layer whose input is edited."""
    phi, psi = _both(vectors)
    return weight + (weight @ psi.t()) @ phi.t(), bias


def _both(vectors: Vectors) -> tuple[Tensor, Tensor]:
    phi, psi = vectors.get("phi"), vectors.get("psi")
    assert phi is not None
    assert psi is not None
    return phi, psi


def _draw(phi: Tensor) -> None:
    """torch's initialisation of a linear layer with as many inputs as the site, as in the authors' code."""
    bound = 1 / math.sqrt(phi.shape[0])
    nn.init.uniform_(phi, -bound, bound)


def kind(rank: int) -> Kind:
    """The kind of this rank."""
    return Kind(
        "gift" if rank == RANK else f"gift:{rank}",
        (
            Part("phi", shape=lambda width: (width, rank), draw=_draw),
            Part("psi", shape=lambda width: (rank, width)),
        ),
        partial(formula),
        "h + (h Phi) Psi of a layer's input, one Phi and Psi for all sites of a width (GIFT)",
        fold=fold,
        identity=True,
        combines=False,
        by_row=by_row,
        fits=lambda width: f"needs at least {rank}, its rank" if width < rank else None,
        family="gift",
        on_input=True,
        shared=True,
    )


GIFT = Family(kind, RANK, "the rank")
