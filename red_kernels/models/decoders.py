"""Decoder layers with a norm before each sublayer and an FFN that ends in `down_proj`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..fusion.compose import add_then_norm, edit_add_to_next, edit_then_norm, given, left_of_dropout
from ..fusion.deferral import call_unedited, edited_output
from .description import RES, Edits, Family, Layout, Point

__all__ = ["FAMILIES"]

_GATED_MLP = ("10d6ac161076c54c", "d5657bd0bab71c68")  # the library's, and Liger's in its place
# Of each the one until transformers 5.23 and the one since.
_PRE_NORM = ("77b982daba84680c", "a95e458253fcadeb")
_WITH_DROPOUT = ("0d441bd29df6766c", "b274e54a290f8bb0")
_NORMS_AROUND = ("420e1c6a99e20e50", "b2f933e1ba81e7a2")
_MIXTURE = ("fdd799853333706e", "52e030c9aa60f87f")
_ATTENTION = (
    "ab428cb97146feb6",
    "89d1b6cb31180c35",
    "e5c4ad3482773958",
    "5c2c7b6c13abc371",
    "bea845841b9e9d1a",
    "03b9fca807486ea6",
    "a9ce947798a7c80c",
    # since 5.24
    "202bc9a767fd9c00",
    "d586233f37b6468a",
    "ea3288a3f975bd8d",
    "dc80b50015eff948",
    "865d6a48095f2a20",
    "0df42db567ae8529",
    "c57bffc3a155cff8",
)


def _pre_norm(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _pre_norm_ffn(layer, edits, _attended(layer, edits, hidden_states, args, kwargs), hidden_states)


def _attended(layer: Any, edits: Edits, hidden_states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The output of attention: the library hands it all that the layer gets."""
    attended: Tensor
    attended, _ = call_unedited(
        layer.self_attn,
        edits.attn,
        hidden_states=layer.input_layernorm(hidden_states),
        **given(layer, args, kwargs),
    )
    return attended


def _pre_norm_ffn(layer: Any, edits: Edits, attended: Tensor, residual: Tensor) -> Tensor:
    hidden_states, residual = add_then_norm(
        attended, residual, layer.post_attention_layernorm, own=edits.attn, after=edits.attn_res
    )
    hidden_states = call_unedited(layer.mlp, edits.ffn, hidden_states)
    output = edit_add_to_next(layer, hidden_states, residual, edits.ffn, after=edits.res)
    return edited_output(edits.res, output)


def _pre_norm_with_dropout(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    residual = hidden_states
    hidden_states = _attended(layer, edits, hidden_states, args, kwargs)
    hidden_states, p, training = left_of_dropout(layer.resid_attn_dropout, hidden_states)
    hidden_states, residual = add_then_norm(
        hidden_states, residual, layer.post_attention_layernorm, p, training, own=edits.attn, after=edits.attn_res
    )
    hidden_states = call_unedited(layer.mlp, edits.ffn, hidden_states)
    hidden_states, p, training = left_of_dropout(layer.resid_mlp_dropout, hidden_states)
    output = edit_add_to_next(layer, hidden_states, residual, edits.ffn, p, training, after=edits.res)
    return edited_output(edits.res, output)


def _norms_around(layer: Any, edits: Edits, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    residual = hidden_states
    hidden_states = _attended(layer, edits, hidden_states, args, kwargs)
    hidden_states = edit_then_norm(hidden_states, None, edits.attn, layer.post_attention_layernorm)
    hidden_states, residual = add_then_norm(
        hidden_states, residual, layer.pre_feedforward_layernorm, after=edits.attn_res
    )
    hidden_states = call_unedited(layer.mlp, edits.ffn, hidden_states)
    hidden_states = edit_then_norm(hidden_states, None, edits.ffn, layer.post_feedforward_layernorm)
    output = edit_add_to_next(layer, hidden_states, residual, None, after=edits.res)
    return edited_output(edits.res, output)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_SITES = {
    "ffn": ("mlp.down_proj",),
    "attn": ("self_attn.o_proj",),
    "qkv": _QKV,
    "res": ("",),
    "attn_res": ("self_attn",),
}
_EXPERTS = "the output of the whole block of experts, whose weights are one 3-D Parameter"


def _points(
    adds: str = "residual add", mlp: tuple[str, ...] = _GATED_MLP, norms_around: bool = False, experts: bool = False
) -> tuple[Point, ...]:
    """The edits of a layer that has its norms before the sublayers, or around them; `experts` may stand for the FFN."""
    attn_norm = "post_attention_layernorm"
    own_norm: dict[str, Any] = {"fuses": "its own RMSNorm; then residual add + {next}", "alone": "its own RMSNorm"}
    ffn: dict[str, Any] = own_norm if norms_around else {"fuses": f"{adds} + {{next}}", "alone": adds}
    attn = "its own RMSNorm; then residual add + RMSNorm" if norms_around else f"{adds} + RMSNorm"
    before_ffn = "pre_feedforward_layernorm" if norms_around else attn_norm
    return (
        Point(
            "ffn",
            "mlp.down_proj",
            "mlp",
            known={"mlp": mlp},
            norm="post_feedforward_layernorm" if norms_around else "",
            **ffn,
        ),
        *((Point("ffn", "mlp", "mlp", **ffn),) if experts else ()),
        Point(
            "attn",
            "self_attn.o_proj",
            "self_attn",
            known={"self_attn": _ATTENTION},
            fuses=attn,
            norm=attn_norm,
            bare=None if norms_around else adds,
        ),
        Point("attn_res", "self_attn", "", fuses="RMSNorm behind the residual add", norm=before_ffn, inside=True),
        RES,
    )


FAMILIES = (
    Family(
        name="Llama, Mistral, Qwen2, Qwen3",
        layers=("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
        sites=_SITES,
        inside=("attn_res",),
        layouts=(Layout(key="pre_norm", forward=_pre_norm, known=_PRE_NORM, points=_points(), hands_on=True),),
        first_norm=("", "input_layernorm"),
        known={"": _PRE_NORM},
        final_norm="norm",
        bias_flags={"mlp.down_proj": "mlp_bias", **dict.fromkeys(("self_attn.o_proj", *_QKV), "attention_bias")},
    ),
    Family(
        name="Mixtral, Qwen2-MoE, Qwen3-MoE",
        layers=("MixtralDecoderLayer", "Qwen2MoeDecoderLayer", "Qwen3MoeDecoderLayer"),
        sites={**_SITES, "ffn": ("mlp.down_proj|mlp",)},
        inside=("attn_res",),
        layouts=(
            Layout(
                key="mixture",
                forward=_pre_norm,
                known=(*_PRE_NORM, *_MIXTURE),
                points=_points(experts=True),
                hands_on=True,
            ),
        ),
        first_norm=("", "input_layernorm"),
        known={"": (*_PRE_NORM, *_MIXTURE)},
        final_norm="norm",
        bias_flags=dict.fromkeys(("self_attn.o_proj", *_QKV), "attention_bias"),
        remarks={"mlp": _EXPERTS},
    ),
    Family(
        name="Phi-3",
        layers=("Phi3DecoderLayer",),
        sites={**_SITES, "qkv": ("self_attn.qkv_proj",)},
        inside=("attn_res",),
        layouts=(
            Layout(
                key="pre_norm_with_dropout",
                forward=_pre_norm_with_dropout,
                known=_WITH_DROPOUT,
                points=_points("dropout + residual add", ("8fd1184e036c31a8",)),
                dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
                hands_on=True,
            ),
        ),
        first_norm=("", "input_layernorm"),
        known={"": _WITH_DROPOUT},
        final_norm="norm",
    ),
    Family(
        name="Gemma 2, Gemma 3",
        layers=("Gemma2DecoderLayer", "Gemma3DecoderLayer"),
        sites=_SITES,
        inside=("attn_res",),
        layouts=(
            Layout(
                key="norms_around",
                forward=_norms_around,
                known=_NORMS_AROUND,
                points=_points(norms_around=True),
                hands_on=True,
            ),
        ),
        first_norm=("", "input_layernorm"),
        known={"": _NORMS_AROUND},
        final_norm="norm",
        bias_flags=dict.fromkeys(("self_attn.o_proj", *_QKV), "attention_bias"),
    ),
)
