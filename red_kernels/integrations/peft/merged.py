"""Folding an edit into the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.linears import linear_columns
from ...models.norms import norm_spec
from ...selection import Vectors

__all__ = ["mergeable", "merged_tensors"]


def mergeable(module: nn.Module, what: str) -> nn.Module:
    """The module, if an edit of its output can be folded into its weights.

    Raises:
        ValueError: it is quantised, sharded, or of a make whose arithmetic is not known.
    """
    kind = type(module)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and (type(weight.data) is not Tensor or not weight.is_floating_point()):
        found = f"{type(weight).__name__} of {weight.dtype}"
        raise ValueError(
            f"{what}: the edit cannot be merged into this {kind.__name__}, whose weight is {found}, expected a plain "
            "floating-point tensor: rounding to a quantised one would lose the edit"
        )
    # A subclass of an embedding may scale what it looks up.
    known = linear_columns(kind) is not None or norm_spec(kind) is not None or kind.forward is nn.Embedding.forward
    replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")  # accelerate's may stay
    if weight is None or not known or replaced:
        raise ValueError(f"{what}: a {kind.__name__} is of no known make, so that the edit cannot be merged into it")
    return module


def merged_tensors(base: nn.Module, original: dict[str, Tensor | None], vectors: Vectors) -> dict[str, Tensor]:
    """The weight and the bias of `base` with an edit folded in, in the weight's dtype.

    Args:
        base: a module that `mergeable` takes.
        original: its tensors by name. With None for all only the checks are made.
        vectors: the edit.

    Raises:
        ValueError: the edit ends in a norm, or has a bias and the module has no place for that.
    """
    spec = norm_spec(type(base))
    if vectors.norm_weight is not None:
        raise ValueError("adapter: its kind is 'ln', a LayerNorm behind the edit, which no weight can stand in for")
    if vectors.bias is not None and spec is not None and not spec.centered:
        raise ValueError(f"base_layer: a {type(base).__name__} has no bias that the edit's could be merged into")
    weight = original["weight"]
    if weight is None:
        return {}
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale, bias = (None if vector is None else vector.detach().to(weight.device, wide) for vector in vectors[:2])
    merged: dict[str, Tensor] = {}
    if isinstance(base, nn.Embedding):
        edited = weight.to(wide)
        edited = edited if scale is None else edited * scale
        return {"weight": (edited if bias is None else edited + bias).to(weight.dtype)}
    if scale is not None:
        offset = 0.0 if spec is None else spec.offset
        by_row = scale[:, None] if spec is None and not linear_columns(type(base)) else scale
        merged["weight"] = (by_row * (weight.to(wide) + offset) - offset).to(weight.dtype)
    own = original.get("bias")
    if own is not None or bias is not None:
        total = weight.new_zeros((), dtype=wide) if own is None else own.to(wide)
        total = total if scale is None else scale * total
        merged["bias"] = (total if bias is None else total + bias).to(weight.dtype if own is None else own.dtype)
    return merged
