"""RED's edit with a trained LayerNorm behind it, `LayerNorm(scale * h + bias)` (the authors' kind "ln")."""

from __future__ import annotations

from torch import Tensor, nn

from . import affine
from .kind import FORMULAS, Kind, Part, Vectors

NORM_EPS = 1e-5  # torch's default


def formula(h: Tensor, vectors: Vectors) -> Tensor:
    """`LayerNorm(scale * h + bias)`, which no vectors make the identity."""
    weight, bias = vectors.get("norm_weight"), vectors.get("norm_bias")
    h = affine.formula(h, vectors)
    if weight is not None:
        h = h.to(weight.dtype)
    width = h.shape[-1:]
    if weight is None or weight.dim() == 1:
        return nn.functional.layer_norm(h, width, weight, bias, NORM_EPS)
    return affine.formula(nn.functional.layer_norm(h, width, eps=NORM_EPS), {"scale": weight, "bias": bias})


LN = Kind(
    "ln",
    (
        affine.SCALE,
        affine.SHIFT,
        Part("norm_weight", 1.0, key="activation_ln.weight"),
        Part("norm_bias", 0.0, key="activation_ln.bias"),
    ),
    formula,
    "LayerNorm(scale * h + bias) with a trained LayerNorm",
    kernel="affine_layer_norm",
    neutral=False,
)
FORMULAS["affine_layer_norm"] = lambda kind: formula
