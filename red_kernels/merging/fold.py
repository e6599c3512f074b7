"""Folding an edit into the module before it, for `rk.merge` and for PEFT."""

from __future__ import annotations

import torch
from torch import Tensor

from ..edits.kinds import KINDS, Edit, Kind
from ..fusion.norms import NormSpec

__all__ = ["adds_bias", "biasless_kinds", "folded", "folded_input", "why_not"]

_COLUMNS = 1024  # of an edit's matrix at a time


def why_not(kind: Kind, norm: NormSpec | None) -> str | None:
    """Why no weights can express an edit of a kind, behind a norm or a linear layer; None if they can."""
    if kind.fold is None:
        return f"it is of kind {kind.name!r}, which no layer's weights can express"
    if norm is not None and kind.kernel != "affine":
        return f"it is of kind {kind.name!r}, but a norm's weights express only edits of single columns"
    return None


def folded(
    edit: Edit, weight: Tensor, bias: Tensor | None, norm: NormSpec | None, columns: bool
) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a module with an edit of its output folded in, in the dtype of `weight`.

    Args:
        edit: of a kind that `why_not` accepts.
        weight, bias: of a linear layer or of a norm, in the dtype to compute in.
        norm: the norm's formula; None for a linear layer.
        columns: whether the weight is `(in, out)` instead of `(out, in)`.
    """
    fold = edit.kind.fold
    assert fold is not None
    vectors = {
        name: None if vector is None else vector.detach().to(weight.device, weight.dtype)
        for name, vector in edit.vectors.items()
    }
    if norm is not None:
        # A norm has a column of weights. If the edit does not change them, their bits stay.
        given = (weight + norm.offset)[:, None]
        made, bias = fold(given, bias, vectors)
        return (weight if made is given else made[:, 0] - norm.offset), bias
    given = weight.t() if columns else weight
    made, bias = fold(given, bias, vectors)
    return (weight if made is given else made.t() if columns else made), bias


def folded_input(edit: Edit, weight: Tensor, bias: Tensor | None, columns: bool) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a linear layer with an edit of its input folded in, in the dtype of `weight`.

    An edit that folds is affine, `A x + c`: the layer becomes `(W A) x + (W c + b)`. Arguments: as in `folded`.
    """
    fold, kind = edit.kind.fold, edit.kind
    assert fold is not None
    vectors = {
        name: None if vector is None else vector.detach().to(weight.device, weight.dtype)
        for name, vector in edit.vectors.items()
    }
    given = weight.t() if columns else weight  # (out, in)
    shift: Tensor | None = None
    if kind.on_input:
        made, bias = fold(given, bias, vectors)
    elif kind.kernel == "affine":  # A is diagonal
        operands = vectors if kind.operands is None else kind.operands(vectors)
        scale, shift = operands.get("scale"), operands.get("bias")
        made = given if scale is None else given * scale
    else:
        width, parts, shift = given.shape[1], [], None
        for first in range(0, width, _COLUMNS):
            some = torch.zeros(width, min(_COLUMNS, width - first), dtype=given.dtype, device=given.device)
            some[first:].fill_diagonal_(1.0)
            some, shift = fold(some, None, vectors)  # columns of A, and c
            parts.append(given @ some)
        made = torch.cat(parts, 1)
    if shift is not None:
        moved = given @ shift
        bias = moved if bias is None else bias + moved
    return (weight if made is given else made.t() if columns else made), bias


def adds_bias(edit: Edit) -> bool:
    """Whether a module without a bias gets one when the edit is folded into it."""
    if edit.kind.fold is None or "linear_bias" in edit.kind.requires:
        return False
    vectors = {name: None if vector is None else vector.to("meta") for name, vector in edit.vectors.items()}
    width = next((vector.shape[-1] for vector in vectors.values() if vector is not None), 1)
    return edit.kind.fold(torch.empty(width, 1, device="meta"), None, vectors)[1] is not None


def biasless_kinds() -> str:
    """The kinds of edit that merge into a layer without a bias, for a message."""
    return " or ".join(
        repr(kind.name) for kind in KINDS.values() if kind.fold is not None and not kind.needs_bias(kind.least_width)
    )
