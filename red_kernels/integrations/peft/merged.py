"""Folding an edit into the layer before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...edits.kinds import Edit
from ...fusion.norms import norm_spec
from ...merging.fold import adds_bias, folded, folded_input, why_not
from ...merging.linears import linear_columns

__all__ = ["mergeable", "merged_tensors"]


def mergeable(module: nn.Module, what: str) -> nn.Module:
    """The module, if an edit of its output can be folded into its weights.

    Raises:
        ValueError: it is quantised, sharded, or of a type with unknown arithmetic.
    """
    kind = type(module)
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and (type(weight.data) is not Tensor or not weight.is_floating_point()):
        found = f"{type(weight).__name__} of {weight.dtype}"
        raise ValueError(
            f"{what}: the edit cannot be merged into this {kind.__name__}, whose weight is {found}, expected a plain "
            "floating-point tensor: rounding to a quantised one would lose the edit"
        )
    # A subclass of an embedding may scale its rows.
    known = linear_columns(kind) is not None or norm_spec(module) is not None or kind.forward is nn.Embedding.forward
    replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")  # accelerate's may stay
    if weight is None or not known or replaced:
        raise ValueError(f"{what}: a {kind.__name__} is not a known layer type, so the edit cannot be merged into it")
    return module


def merged_tensors(
    base: nn.Module, original: dict[str, Tensor | None], edit: Edit, on_input: bool
) -> dict[str, Tensor]:
    """The weight and the bias of `base` with an edit folded in, in the weight's dtype.

    Args:
        base: a module that `mergeable` takes.
        original: its tensors by name. If all are None, only the checks run.
        edit: the edit to fold in.
        on_input: whether it is of the input of `base`, a linear layer, instead of its output.

    Raises:
        ValueError: no weights can express the edit, or it has a bias and the module has no place for one.
    """
    spec = norm_spec(base)
    reason = why_not(edit.kind, spec)
    if reason is not None:
        raise ValueError(f"adapter: the edit cannot be merged: {reason}")
    if spec is not None and not spec.centered and adds_bias(edit):
        raise ValueError(f"base_layer: a {type(base).__name__} has no bias, which the merge of this edit needs")
    weight = original["weight"]
    if weight is None:
        return {}
    held = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if isinstance(base, nn.Embedding):  # its rows are the outputs, to which a bias is added
        made, shift = folded(edit, held, None, None, True)
        return {"weight": (made if shift is None else made + shift).to(weight.dtype)}
    own = original.get("bias")
    given = None if own is None else own.to(held.dtype)
    columns = spec is None and bool(linear_columns(type(base)))
    if on_input:
        made, bias = folded_input(edit, held, given, columns)
    else:
        made, bias = folded(edit, held, given, spec, columns)
    merged = {} if made is held else {"weight": made.to(weight.dtype)}
    if bias is not None:
        merged["bias"] = bias.to(weight.dtype if own is None else own.dtype)
    return merged
