"""T5 blocks: each sublayer is a module with a norm of its own, in the encoder and in the decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..fusion.compose import edit_add_to_next, given
from ..fusion.deferral import call_unedited, edited_output
from .description import RES, TO_NEXT, Edits, Family, Layout, Point

__all__ = ["FAMILIES"]

# Of each the one until transformers 5.23 and the one since, where it has changed.
_BLOCK = ("667788cd056b5d74", "eb0fe1196f6f6d02")
_SELF = ("281276e33d2b555b", "f1d300b269053b20")
_CROSS = ("4570fd114bce44f4", "10db9159069ef156")
_FEED_FORWARD = ("e101fb6f37b8321d",)
_ATTENTION = ("f7ea60ea0208c6cd", "db6962a3c5dfdf5f")
_STREAM = Point("attn_res", "", "", fuses="{next} behind the residual add")


def _feed_forward(module: Any, edits: Edits, hidden_states: Tensor) -> Tensor:
    forwarded = call_unedited(module.DenseReluDense, edits.ffn, module.layer_norm(hidden_states))
    return _ending(module, edits.ffn, edits.res, forwarded, hidden_states)


def _self_attention(module: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return _attention(module, module.SelfAttention, edits, hidden_states, args, kwargs)


def _cross_attention(module: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return _attention(module, module.EncDecAttention, edits, hidden_states, args, kwargs)


def _attention(
    module: Any,
    attention: Any,
    edits: Edits,
    hidden_states: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, ...]:
    """Both hand on what they get, the mask under another name."""
    handed_on = given(module, args, kwargs)
    mask = handed_on.pop("attention_mask", None)
    attended, *others = call_unedited(attention, edits.attn, module.layer_norm(hidden_states), mask=mask, **handed_on)
    return _ending(module, edits.attn, edits.attn_res, attended, hidden_states), *others


def _ending(module: Any, own: Any, after: Any, hidden_states: Tensor, residual: Tensor) -> Tensor:
    drop = module.dropout
    return edited_output(
        after, edit_add_to_next(module, hidden_states, residual, own, drop.p, drop.training, after=after)
    )


FAMILIES = (
    Family(
        name="T5",
        layers=("T5Block",),
        sites={
            "ffn": ("layer.-1.DenseReluDense.wo",),
            "attn": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o?"),
            "qkv": (
                *(f"layer.0.SelfAttention.{name}" for name in "qkv"),
                *(f"layer.1.EncDecAttention.{name}?" for name in "qkv"),
            ),
            "res": ("layer.-1",),
            "attn_res": ("layer.0", "layer.1 with EncDecAttention?"),
        },
        layouts=(
            Layout(
                key="t5_feed_forward",
                block="layer.-1",
                forward=_feed_forward,
                known=_FEED_FORWARD,
                points=(
                    Point(
                        "ffn",
                        "DenseReluDense.wo",
                        "DenseReluDense",
                        known={"DenseReluDense": ("b2d5a1266ac5ac9a", "5d673be012debc9b")},
                        **TO_NEXT,
                    ),
                    RES,
                ),
                dropouts=("dropout",),
                hands_on=True,
                clamps_half=True,
            ),
            Layout(
                key="t5_self_attention",
                block="layer.0",
                forward=_self_attention,
                known=_SELF,
                points=(
                    Point("attn", "SelfAttention.o", "SelfAttention", known={"SelfAttention": _ATTENTION}, **TO_NEXT),
                    _STREAM,
                ),
                dropouts=("dropout",),
                then=("layer.1", "layer.1.layer_norm"),
                hands_on=True,
                clamps_half=True,
            ),
            Layout(
                key="t5_cross_attention",
                block="layer.1",
                forward=_cross_attention,
                known=_CROSS,
                points=(
                    Point(
                        "attn", "EncDecAttention.o", "EncDecAttention", known={"EncDecAttention": _ATTENTION}, **TO_NEXT
                    ),
                    _STREAM,
                ),
                dropouts=("dropout",),
                then=("layer.2", "layer.2.layer_norm"),
                hands_on=True,
                clamps_half=True,
            ),
        ),
        first_norm=("", "layer.0", "layer.0.layer_norm"),
        known={"": _BLOCK, "layer.0": _SELF, "layer.1": (*_CROSS, *_FEED_FORWARD), "layer.2": _FEED_FORWARD},
        final_norm="final_layer_norm",
    ),
)
