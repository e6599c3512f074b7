"""HiWi: a small network computes a bias from the layer's own bias (arXiv 2305.16742, eq. 4)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from . import affine
from .kind import Family, Folded, Kind, Part, Vectors

HIDDEN = 16


def made(vectors: Vectors) -> Vectors:
    """`relu(b W_down) W_up`, of the layer's own bias `b`, as the bias to add."""
    down, up, bias = vectors.get("inward"), vectors.get("outward"), vectors.get("linear_bias")
    assert down is not None
    assert up is not None
    if bias is None:
        raise ValueError(
            "model: an edit of kind 'generated' is computed from the bias of its site's linear layer, but one site "
            "has no bias; choose sites with biases, or kind 'bias'"
        )
    return {"bias": (torch.relu(bias.to(down.dtype) @ down).unsqueeze(-2) @ up).squeeze(-2)}


def formula(h: Tensor, vectors: Vectors) -> Tensor:
    """`h + relu(b W_down) W_up`."""
    return affine.formula(h, made(vectors))


def fold(weight: Tensor, bias: Tensor | None, vectors: Vectors) -> Folded:
    """The bias plus the network's output."""
    return affine.fold(weight, bias, made({**vectors, "linear_bias": bias}))


def kind(hidden: int) -> Kind:
    """The kind with this number of hidden units."""
    return Kind(
        "generated" if hidden == HIDDEN else f"generated:{hidden}",
        (
            Part("inward", shape=lambda width: (width, hidden), draw=nn.init.kaiming_uniform_),
            Part("outward", shape=lambda width: (hidden, width)),
        ),
        partial(formula),
        "h + relu(b D) U, b the bias of the site's linear layer (HiWi)",
        kernel="affine",
        operands=made,
        fold=fold,
        identity=True,
        combines=False,
        context=("linear_bias",),
        requires=("linear_bias",),
        family="generated",
    )


GENERATED = Family(kind, HIDDEN, "the number of hidden units")
