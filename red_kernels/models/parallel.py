"""Decoder layers that may run attention and FFN side by side, on one residual: GPT-NeoX, Falcon, Phi.

Where they do, no residual stream lies between the two, and there is no place for an edit behind attention's addition.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..fusion.compose import add, add_then_norm, edit_add_to_next, given, left_of_dropout
from ..fusion.deferral import call_unedited, edited_output
from .description import RES, TO_NEXT, Edits, Family, Layout, Point, attention_points

__all__ = ["FAMILIES"]

_NEOX, _FALCON = "9c304581bf6ab72f", "6011555badff3188"
_PHI = ("d85b20218ee74cbc", "191206386361a4e3")  # until transformers 5.23, and since


def _neox_attention(
    layer: Any,
    edits: Edits,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = False,
    layer_past: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    attended: Tensor = call_unedited(
        layer.attention,
        edits.attn,
        layer.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        layer_past=layer_past,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )[0]
    return attended


def _neox_parallel(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    attended = _neox_attention(layer, edits, hidden_states, *args, **kwargs)
    drop = layer.post_attention_dropout
    residual = add(attended, hidden_states, edits.attn, drop.p, drop.training)
    forwarded = call_unedited(layer.mlp, edits.ffn, layer.post_attention_layernorm(hidden_states))
    drop = layer.post_mlp_dropout
    output = edit_add_to_next(layer, forwarded, residual, edits.ffn, drop.p, drop.training, after=edits.res)
    return edited_output(edits.res, output)


def _neox_sequential(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    attended = _neox_attention(layer, edits, hidden_states, *args, **kwargs)
    attended, p, training = left_of_dropout(layer.post_attention_dropout, attended)
    normed, residual = add_then_norm(
        attended,
        hidden_states,
        layer.post_attention_layernorm,
        p,
        training,
        own=edits.attn,
        after=edits.attn_res,
    )
    forwarded = call_unedited(layer.mlp, edits.ffn, normed)
    forwarded, p, training = left_of_dropout(layer.post_mlp_dropout, forwarded)
    output = edit_add_to_next(layer, forwarded, residual, edits.ffn, p, training, after=edits.res)
    return edited_output(edits.res, output)


def _falcon(
    layer: Any,
    edits: Edits,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    config, residual = layer.config, hidden_states
    two_norms = config.new_decoder_architecture and config.num_ln_in_parallel_attn == 2
    normed = (layer.ln_attn if two_norms else layer.input_layernorm)(hidden_states)
    mlp_normed = layer.ln_mlp(hidden_states) if two_norms else normed
    attended, weights = call_unedited(
        layer.self_attention,
        edits.attn,
        normed,
        layer_past=layer_past,
        attention_mask=attention_mask,
        position_ids=position_ids,
        alibi=alibi,
        use_cache=use_cache,
        output_attentions=output_attentions,
        position_embeddings=position_embeddings,
    )
    p, training = config.hidden_dropout, layer.training
    own = edits.ffn
    if not config.new_decoder_architecture and not config.parallel_attn:
        mlp_normed, residual = add_then_norm(
            attended,
            residual,
            layer.post_attention_layernorm,
            config.attention_dropout,
            training,
            own=edits.attn,
            after=edits.attn_res,
        )
        forwarded = call_unedited(layer.mlp, own, mlp_normed)
    elif p and training:  # one dropout for the sum of both
        if edits.attn is not None:
            attended = edits.attn(attended)
        forwarded = add(call_unedited(layer.mlp, own, mlp_normed), attended, own)
        own = None
    else:
        residual = add(attended, residual, edits.attn)
        forwarded = call_unedited(layer.mlp, own, mlp_normed)
    output = edit_add_to_next(layer, forwarded, residual, own, p, training, after=edits.res)
    return edited_output(edits.res, output), weights


def _phi(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    residual = hidden_states
    handed_on = given(layer, args, kwargs)
    normed = layer.input_layernorm(hidden_states)
    attended, _ = call_unedited(layer.self_attn, edits.attn, hidden_states=normed, **handed_on)
    drop = layer.resid_dropout
    residual = add(attended, residual, edits.attn, drop.p, drop.training)
    forwarded = call_unedited(layer.mlp, edits.ffn, normed)
    output = edit_add_to_next(layer, forwarded, residual, edits.ffn, drop.p, drop.training, after=edits.res)
    return edited_output(edits.res, output)


_NEOX_FFN = Point("ffn", "mlp.dense_4h_to_h", "mlp", known={"mlp": ("a13b1d581c6f9854",)}, **TO_NEXT)
_NEOX_ATTENTION = ("c3849d13e82cd27e",)
_FALCON_FFN = Point("ffn", "mlp.dense_4h_to_h", "mlp", known={"mlp": ("ae7c9da5e3e527d9",)}, **TO_NEXT)
_FALCON_ATTENTION = ("dc1cf7922d3fec1c",)
_NEOX_DROPOUTS = ("post_attention_dropout", "post_mlp_dropout")

FAMILIES = (
    Family(
        name="GPT-NeoX",
        layers=("GPTNeoXLayer",),
        sites={
            "ffn": ("mlp.dense_4h_to_h",),
            "attn": ("attention.dense",),
            "qkv": ("attention.query_key_value",),
            "res": ("",),
            "attn_res": ("attention",),
        },
        inside=("attn_res",),
        layouts=(
            Layout(
                key="neox_parallel",
                forward=_neox_parallel,
                known=(_NEOX,),
                points=(
                    _NEOX_FFN,
                    Point(
                        "attn",
                        "attention.dense",
                        "attention",
                        known={"attention": _NEOX_ATTENTION},
                        fuses="dropout + residual add",
                    ),
                    RES,
                ),
                dropouts=_NEOX_DROPOUTS,
                hands_on=True,
                when=("use_parallel_residual", True),
            ),
            Layout(
                key="neox_sequential",
                forward=_neox_sequential,
                known=(_NEOX,),
                points=(
                    _NEOX_FFN,
                    *attention_points("attention.dense", "attention", _NEOX_ATTENTION, "post_attention_layernorm"),
                    RES,
                ),
                dropouts=_NEOX_DROPOUTS,
                hands_on=True,
                when=("use_parallel_residual", False),
            ),
        ),
        first_norm=("", "input_layernorm"),
        known={"": (_NEOX,)},
        final_norm="final_layer_norm",
        bias_flags=dict.fromkeys(("attention.dense", "attention.query_key_value"), "attention_bias"),
    ),
    Family(
        name="Falcon",
        layers=("FalconDecoderLayer",),
        sites={
            "ffn": ("mlp.dense_4h_to_h",),
            "attn": ("self_attention.dense",),
            "qkv": ("self_attention.query_key_value",),
            "res": ("",),
            "attn_res": ("self_attention",),
        },
        inside=("attn_res",),
        layouts=(
            Layout(
                key="falcon_sequential",
                forward=_falcon,
                known=(_FALCON,),
                points=(
                    _FALCON_FFN,
                    *attention_points(
                        "self_attention.dense", "self_attention", _FALCON_ATTENTION, "post_attention_layernorm"
                    ),
                    RES,
                ),
                hands_on=True,
                when=("config.parallel_attn or config.new_decoder_architecture", False),
            ),
            Layout(
                key="falcon_parallel",
                forward=_falcon,
                known=(_FALCON,),
                points=(
                    _FALCON_FFN,
                    Point(
                        "attn",
                        "self_attention.dense",
                        "self_attention",
                        known={"self_attention": _FALCON_ATTENTION},
                        fuses="residual add, where hidden_dropout is off",
                    ),
                    RES,
                ),
                hands_on=True,
            ),
        ),
        first_norm=("", "input_layernorm|ln_attn"),
        known={"": (_FALCON,)},
        final_norm="ln_f",
        bias_flags=dict.fromkeys(
            ("mlp.dense_4h_to_h", "self_attention.dense", "self_attention.query_key_value"), "bias"
        ),
    ),
    Family(
        name="Phi",
        layers=("PhiDecoderLayer",),
        sites={
            "ffn": ("mlp.fc2",),
            "attn": ("self_attn.dense",),
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "res": ("",),
        },
        layouts=(
            Layout(
                key="phi",
                forward=_phi,
                known=_PHI,
                points=(
                    Point("ffn", "mlp.fc2", "mlp", known={"mlp": ("06f472a6a2c912ad",)}, **TO_NEXT),
                    Point(
                        "attn",
                        "self_attn.dense",
                        "self_attn",
                        known={"self_attn": ("f3140e3487ed78dc", "ad9a89734202d401")},
                        fuses="dropout + residual add",
                    ),
                    RES,
                ),
                dropouts=("resid_dropout",),
                hands_on=True,
            ),
        ),
        first_norm=("", "input_layernorm"),
        known={"": _PHI},
        final_norm="final_layernorm",
    ),
)
