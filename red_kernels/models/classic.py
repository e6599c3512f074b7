"""GPT-2 and OPT layers, and ViT: pre-norm layers with biases and dropout; OPT has a post-norm form too."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..fusion.compose import CACHES, add_then_norm, behind, edit_add_to_next, edit_then_norm, given, left_of_dropout
from ..fusion.deferral import call_unedited, edited_output
from .description import RES, TO_NEXT, Edits, Family, Layout, Point, attention_points

__all__ = ["FAMILIES"]

# Of the first two the one until transformers 5.23 and the one since.
_GPT2, _OPT = ("9bbe2073f8394bdd", "05abbdd39647ce78"), ("e713efe33a94e16f", "d03de2e09c1ace24")
_VIT = "04639e1c57979b6e"


def _gpt2(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    residual = hidden_states
    drop = layer.attn.resid_dropout
    handed_on = given(layer, args, kwargs)
    encoder_hidden_states = handed_on.pop("encoder_hidden_states", None)
    encoder_attention_mask = handed_on.pop("encoder_attention_mask", None)
    hidden_states, _ = call_unedited(layer.attn, edits.attn, layer.ln_1(hidden_states), without=drop, **handed_on)
    p, training = behind(edits.attn, drop)
    own, after = edits.attn, edits.attn_res
    if encoder_hidden_states is not None:
        if not hasattr(layer, "crossattention"):
            raise ValueError(
                "encoder_hidden_states was given to a layer without cross-attention (config.add_cross_attention)"
            )
        hidden_states, residual = add_then_norm(
            hidden_states, residual, layer.ln_cross_attn, p, training, own=own, after=after
        )
        hidden_states, _ = layer.crossattention(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **{name: value for name, value in handed_on.items() if name in (*CACHES, "attention_mask")},
        )
        own, after, p, training = None, None, 0.0, False
    hidden_states, residual = add_then_norm(hidden_states, residual, layer.ln_2, p, training, own=own, after=after)
    drop = layer.mlp.dropout
    hidden_states = call_unedited(layer.mlp, edits.ffn, hidden_states, without=drop)
    p, training = behind(edits.ffn, drop)
    output = edit_add_to_next(layer, hidden_states, residual, edits.ffn, p, training, after=edits.res)
    return edited_output(edits.res, output)


def _opt_pre_norm(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    residual = hidden_states
    handed_on = given(layer, args, kwargs)
    handed_on.pop("use_cache", None)
    hidden_states = layer.self_attn_layer_norm(hidden_states)
    hidden_states, _ = call_unedited(layer.self_attn, edits.attn, hidden_states=hidden_states, **handed_on)
    p, training = layer.dropout, layer.training
    hidden_states, residual = add_then_norm(
        hidden_states, residual, layer.final_layer_norm, p, training, own=edits.attn, after=edits.attn_res
    )
    hidden_states = _opt_feed_forward(layer, edits, hidden_states)
    output = edit_add_to_next(layer, hidden_states, residual, edits.ffn, p, training, after=edits.res)
    return edited_output(edits.res, output)


def _opt_post_norm(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    residual = hidden_states
    handed_on = given(layer, args, kwargs)
    handed_on.pop("use_cache", None)
    hidden_states, _ = call_unedited(layer.self_attn, edits.attn, hidden_states=hidden_states, **handed_on)
    p, training = layer.dropout, layer.training
    residual = edit_then_norm(
        hidden_states, residual, edits.attn, layer.self_attn_layer_norm, p, training, after=edits.attn_res
    )
    hidden_states = _opt_feed_forward(layer, edits, residual)
    output = edit_then_norm(hidden_states, residual, edits.ffn, layer.final_layer_norm, p, training, after=edits.res)
    return edited_output(edits.res, output)


def _opt_feed_forward(layer: Any, edits: Edits, hidden_states: Tensor) -> Tensor:
    # The library runs its FFN on rows; so do hooks on these modules find them.
    rows = layer.activation_fn(layer.fc1(hidden_states.reshape(-1, hidden_states.size(-1))))
    forwarded: Tensor = call_unedited(layer.fc2, edits.ffn, rows)
    return forwarded.view(hidden_states.shape)


def _vit(
    layer: Any, edits: Edits, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    residual = hidden_states
    hidden_states = layer.layernorm_before(hidden_states)
    hidden_states, _ = call_unedited(layer.attention, edits.attn, hidden_states, attention_mask, **kwargs)
    hidden_states, p, training = left_of_dropout(layer.dropout, hidden_states)
    hidden_states, residual = add_then_norm(
        hidden_states, residual, layer.layernorm_after, p, training, own=edits.attn, after=edits.attn_res
    )
    hidden_states, p, training = left_of_dropout(layer.dropout, call_unedited(layer.mlp, edits.ffn, hidden_states))
    output = edit_add_to_next(layer, hidden_states, residual, edits.ffn, p, training, after=edits.res)
    return edited_output(edits.res, output)


_GPT2_ATTENTION = ("89ad8c3a6092d1cd", "d1beb71679368415")
_OPT_ATTENTION = ("b302cb513c7595a0", "397d2983033a5024")
_OPT_OWN_NORM: dict[str, Any] = {"fuses": "dropout + residual add + LayerNorm", "bare": "dropout + residual add"}
FAMILIES = (
    Family(
        name="GPT-2",
        layers=("GPT2Block",),
        sites={
            "ffn": ("mlp.c_proj",),
            "attn": ("attn.c_proj", "crossattention.c_proj?"),
            "qkv": ("attn.c_attn", "crossattention.q_attn?", "crossattention.c_attn?"),
            "res": ("",),
            "attn_res": ("attn",),
        },
        inside=("attn_res",),
        layouts=(
            Layout(
                key="gpt2",
                forward=_gpt2,
                known=_GPT2,
                points=(
                    Point(
                        "ffn",
                        "mlp.c_proj",
                        "mlp",
                        known={"mlp": ("793bcfd566f7f8b4",)},
                        dropout="mlp.dropout",
                        **TO_NEXT,
                    ),
                    *attention_points("attn.c_proj", "attn", _GPT2_ATTENTION, "ln_2", dropout="attn.resid_dropout"),
                    RES,
                ),
                hands_on=True,
            ),
        ),
        first_norm=("", "ln_1"),
        known={"": _GPT2},
        final_norm="ln_f",
    ),
    Family(
        name="OPT",
        layers=("OPTDecoderLayer",),
        sites={
            "ffn": ("fc2",),
            "attn": ("self_attn.out_proj",),
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "res": ("",),
            "attn_res": ("self_attn",),
        },
        inside=("attn_res",),
        layouts=(
            Layout(
                key="opt_pre_norm",
                forward=_opt_pre_norm,
                known=_OPT,
                points=(
                    Point("ffn", "fc2", "fc2", **TO_NEXT),
                    *attention_points("self_attn.out_proj", "self_attn", _OPT_ATTENTION, "final_layer_norm"),
                    RES,
                ),
                hands_on=True,
                when=("do_layer_norm_before", True),
            ),
            Layout(
                key="opt_post_norm",
                forward=_opt_post_norm,
                known=_OPT,
                points=(
                    Point("ffn", "fc2", "fc2", norm="final_layer_norm", **_OPT_OWN_NORM),
                    Point(
                        "attn",
                        "self_attn.out_proj",
                        "self_attn",
                        known={"self_attn": _OPT_ATTENTION},
                        norm="self_attn_layer_norm",
                        **_OPT_OWN_NORM,
                    ),
                    Point("attn_res", "self_attn", "", fuses="LayerNorm", norm="self_attn_layer_norm", inside=True),
                    Point("res", "", "", fuses="LayerNorm", norm="final_layer_norm"),
                ),
                when=("do_layer_norm_before", False),
            ),
        ),
        first_norm=("", "self_attn_layer_norm"),
        known={"": _OPT},
        final_norm="final_layer_norm",
        bias_flags=dict.fromkeys(
            ("fc2", "self_attn.out_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "enable_bias"
        ),
    ),
    Family(
        name="ViT",
        layers=("ViTLayer",),
        sites={
            "ffn": ("mlp.fc2",),
            "attn": ("attention.o_proj",),
            "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "res": ("",),
            "attn_res": ("attention",),
        },
        inside=("attn_res",),
        layouts=(
            Layout(
                key="vit",
                forward=_vit,
                known=(_VIT,),
                points=(
                    Point("ffn", "mlp.fc2", "mlp", known={"mlp": ("06f472a6a2c912ad",)}, **TO_NEXT),
                    *attention_points("attention.o_proj", "attention", ("b403d2f5588e6a34",), "layernorm_after"),
                    RES,
                ),
                dropouts=("dropout",),
                hands_on=True,
            ),
        ),
        first_norm=("", "layernorm_before"),
        known={"": (_VIT,)},
        final_norm="layernorm",
    ),
)
