"""Encoders: BERT and its kin with a norm behind each sublayer, and ModernBERT with one before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..fusion.compose import add_then_norm, behind, edit_add_to_next, edit_then_norm
from ..fusion.deferral import call_unedited, edited_output
from .description import RES, Edits, Family, Layout, Point, attention_points

__all__ = ["FAMILIES"]

_OUTPUT = ("dc2f966459a0afc8",)
_DISTILBERT, _MODERNBERT = "f343da9f781bc85c", "224f526c0c391c56"
_POST_NORM: dict[str, Any] = {"fuses": "dropout + residual add + LayerNorm", "bare": "dropout + residual add"}


def _post_norm_output(module: Any, edits: Edits, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    own = edits.attn if edits.ffn is None else edits.ffn
    after = edits.attn_res if edits.res is None else edits.res
    hidden_states = call_unedited(module.dense, own, hidden_states)
    drop = module.dropout
    output = edit_then_norm(hidden_states, input_tensor, own, module.LayerNorm, drop.p, drop.training, after=after)
    return edited_output(after, output)


def _distilbert(
    layer: Any, edits: Edits, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    residual = hidden_states
    hidden_states, _ = call_unedited(
        layer.attention, edits.attn, hidden_states, attention_mask=attention_mask, **kwargs
    )
    residual = edit_then_norm(hidden_states, residual, edits.attn, layer.sa_layer_norm, after=edits.attn_res)
    drop = layer.ffn.dropout
    hidden_states = call_unedited(layer.ffn, edits.ffn, residual, without=drop)
    p, training = behind(edits.ffn, drop)
    output = edit_then_norm(hidden_states, residual, edits.ffn, layer.output_layer_norm, p, training, after=edits.res)
    return edited_output(edits.res, output)


def _modernbert(
    layer: Any,
    edits: Edits,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    drop = layer.attn.out_drop
    hidden_states, _ = call_unedited(
        layer.attn,
        edits.attn,
        layer.attn_norm(hidden_states),
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        without=drop,
        **kwargs,
    )
    p, training = behind(edits.attn, drop)
    hidden_states, residual = add_then_norm(
        hidden_states, residual, layer.mlp_norm, p, training, own=edits.attn, after=edits.attn_res
    )
    hidden_states = call_unedited(layer.mlp, edits.ffn, hidden_states)
    output = edit_add_to_next(layer, hidden_states, residual, edits.ffn, after=edits.res)
    return edited_output(edits.res, output)


def _output(key: str, block: str, place: str, behind_it: str) -> Layout:
    return Layout(
        key=key,
        block=block,
        forward=_post_norm_output,
        known=_OUTPUT,
        points=(
            Point(place, "dense", "dense", norm="LayerNorm", **_POST_NORM),
            Point(behind_it, "", "", norm="LayerNorm", fuses="LayerNorm"),
        ),
        dropouts=("dropout",),
    )


_OUTPUTS = (
    _output("post_norm_output", "output", "ffn", "res"),
    _output("post_norm_attention", "attention.output", "attn", "attn_res"),
    _output("post_norm_cross_attention", "crossattention.output", "attn", "attn_res"),
)
_OUTPUT_NORMS = {path: f"{path}.LayerNorm" for path in ("output", "attention.output", "crossattention.output")}
_BERT_SITES = {
    "ffn": ("output.dense",),
    "attn": ("attention.output.dense", "crossattention.output.dense?"),
    "qkv": (
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        *(f"crossattention.self.{name}?" for name in ("query", "key", "value")),
    ),
    "res": ("output",),
    "attn_res": ("attention.output", "crossattention.output?"),
}
FAMILIES = (
    Family(
        name="BERT, RoBERTa",
        layers=("BertLayer", "RobertaLayer"),
        sites=_BERT_SITES,
        layouts=_OUTPUTS,
        norms=_OUTPUT_NORMS,
    ),
    Family(
        name="DeBERTa, DeBERTa-v2 and v3",
        layers=("DebertaLayer", "DebertaV2Layer"),
        sites={
            **_BERT_SITES,
            "qkv": (
                "attention.self.in_proj|attention.self.query_proj",
                *(f"attention.self.{name}?" for name in ("key_proj", "value_proj")),
            ),
        },
        layouts=tuple(
            _output(f"deberta_{name}", block, place, behind_it)
            for name, block, place, behind_it in (
                ("output", "output", "ffn", "res"),
                ("attention", "attention.output", "attn", "attn_res"),
            )
        ),
        norms=_OUTPUT_NORMS,
    ),
    Family(
        name="DistilBERT",
        layers=("modeling_distilbert.TransformerBlock",),
        sites={
            "ffn": ("ffn.lin2",),
            "attn": ("attention.out_lin",),
            "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "res": ("",),
            "attn_res": ("sa_layer_norm",),
        },
        layouts=(
            Layout(
                key="distilbert",
                forward=_distilbert,
                known=(_DISTILBERT,),
                points=(
                    Point(
                        "ffn",
                        "ffn.lin2",
                        "ffn",
                        known={"ffn": ("d9c7be41ebef48d3",), "ffn:ff_chunk": ("4e82b737468bf93f",)},
                        dropout="ffn.dropout",
                        norm="output_layer_norm",
                        **_POST_NORM,
                    ),
                    Point(
                        "attn",
                        "attention.out_lin",
                        "attention",
                        known={"attention": ("e6bced51d0c1107d",)},
                        norm="sa_layer_norm",
                        fuses="residual add + LayerNorm",
                        bare="residual add",
                    ),
                    Point("attn_res", "sa_layer_norm", "sa_layer_norm", norm="sa_layer_norm", fuses="LayerNorm"),
                    Point("res", "", "", norm="output_layer_norm", fuses="LayerNorm"),
                ),
                when=("ffn.chunk_size_feed_forward", 0),
            ),
        ),
        norms={"": "output_layer_norm", "sa_layer_norm": "sa_layer_norm"},
    ),
    Family(
        name="ModernBERT",
        layers=("ModernBertEncoderLayer",),
        sites={
            "ffn": ("mlp.Wo",),
            "attn": ("attn.Wo",),
            "qkv": ("attn.Wqkv",),
            "res": ("",),
            "attn_res": ("attn",),
        },
        inside=("attn_res",),
        layouts=(
            Layout(
                key="modernbert",
                forward=_modernbert,
                known=(_MODERNBERT,),
                points=(
                    Point(
                        "ffn",
                        "mlp.Wo",
                        "mlp",
                        known={"mlp": ("14e6ba5ac5dd5015",)},
                        fuses="residual add + {next}",
                        alone="residual add",
                    ),
                    *attention_points("attn.Wo", "attn", ("c8114e0a5adcff35",), "mlp_norm", dropout="attn.out_drop"),
                    RES,
                ),
                hands_on=True,
            ),
        ),
        first_norm=("", "attn_norm"),
        known={"": (_MODERNBERT,)},
        final_norm="final_norm",
        bias_flags={"mlp.Wo": "mlp_bias", "attn.Wo": "attention_bias", "attn.Wqkv": "attention_bias"},
    ),
)
