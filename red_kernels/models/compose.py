"""What the fused forwards are made of: each takes the fused operation where it may and the plain composition elsewhere.

`own` is the site's `RedEdit`, or None where only the residual add and the norm are fused; `dropout` is the layer's
dropout module, or None.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..edit_module import RedEdit
from ..functional import edit_add, edit_add_layer_norm, edit_add_rms_norm
from .handoff import NextNorm, leave_note
from .norms import NormArguments, norm_arguments, unobserved

__all__ = ["LINK", "add_then_norm", "edit_add_to_next", "edit_then_norm", "may_defer"]

LINK = "_red_kernels_next"  # the attribute of a fused layer that holds its `NextNorm`
_PLAIN = (Tensor, nn.Parameter)


def may_defer(outer: nn.Module, site: nn.Module, own: RedEdit) -> bool:
    """Whether the caller of `outer` may apply the edit of `site` itself, and nobody could tell."""
    if (
        len(site._forward_hooks) != 1  # our own
        or site._backward_hooks
        or site._backward_pre_hooks
        or site._compiled_call_impl is not None
        or not unobserved(own)
    ):
        return False
    return outer is site or unobserved(outer)


def add_then_norm(
    x: Tensor, residual: Tensor, norm: nn.Module, p: float = 0.0, training: bool = False
) -> tuple[Tensor, Tensor]:
    """`z = residual + dropout(x)` and `norm(z)`, as `(norm(z), z)`."""
    found = norm_arguments(norm, x, residual)
    if found is None:
        z = residual + (nn.functional.dropout(x, p, training) if training and p else x)
        return norm(z), z
    normed, summed = _edit_add_norm(x, residual, None, found, p, training, True)
    assert summed is not None
    return normed, summed


def edit_then_norm(
    x: Tensor, residual: Tensor | None, own: RedEdit | None, norm: nn.Module, p: float = 0.0, training: bool = False
) -> Tensor:
    """`norm(residual + dropout(edit(x)))`, for norms right behind the site's own residual add, or without one."""
    found = norm_arguments(norm, x, residual) if own is None or _vectors_fit(own, x) else None
    if found is not None:
        return _edit_add_norm(x, residual, own, found, p, training, False)[0]
    if residual is not None:
        return norm(_edit_add(x, residual, own, p, training))
    return norm(x if own is None else own(x))


def edit_add_to_next(
    layer: nn.Module, x: Tensor, residual: Tensor, own: RedEdit | None, p: float = 0.0, training: bool = False
) -> Tensor:
    """`z = residual + dropout(edit(x))`, with `norm(z)` for the next layer as a note on it where that may be."""
    link: NextNorm | None = layer.__dict__.get(LINK)
    if link is not None and (own is None or _vectors_fit(own, x)):
        found = link.arguments(layer, x, residual)
        if found is not None:
            norm, arguments = found
            normed, z = _edit_add_norm(x, residual, own, arguments, p, training, True)
            assert z is not None
            leave_note(z, normed, norm)
            return z
    return _edit_add(x, residual, own, p, training)


def _edit_add(x: Tensor, residual: Tensor, own: RedEdit | None, p: float, training: bool) -> Tensor:
    if own is not None and type(residual) is Tensor and _vectors_fit(own, x):
        scale, bias = own._parameters["scale"], own._parameters["bias"]
        return edit_add(x, residual, scale, bias, dropout_p=p, training=training)
    hidden = x if own is None else own(x)
    return residual + (nn.functional.dropout(hidden, p, training) if training and p else hidden)


def _edit_add_norm(
    x: Tensor,
    residual: Tensor | None,
    own: RedEdit | None,
    norm: NormArguments,
    p: float,
    training: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor | None]:
    scale = bias = None
    if own is not None:
        scale, bias = own._parameters["scale"], own._parameters["bias"]
    (centered, _, offset), weight, norm_bias, eps = norm
    if centered:
        return edit_add_layer_norm(
            x, residual, scale, bias, weight, norm_bias, eps, dropout_p=p, training=training, need_z=need_z
        )
    return edit_add_rms_norm(
        x, residual, scale, bias, weight, eps, weight_offset=offset, dropout_p=p, training=training, need_z=need_z
    )


def _vectors_fit(own: RedEdit, x: Tensor) -> bool:
    """Whether the vectors and `x` are plain tensors: not sharded, nor out of the module for now, as in FSDP 1."""
    if type(x) is not Tensor:
        return False
    vectors = own._parameters
    for name in ("scale", "bias"):
        vector = vectors.get(name, own)  # `own` stands for one that is missing
        if vector is not None and type(vector) not in _PLAIN:
            return False
    return True
