"""The sites of every position in every family of the zoo, written down by hand."""

from __future__ import annotations

from typing import NamedTuple

import model_zoo as zoo
import torch
from torch import Tensor, nn

POSITIONS = ("ffn", "attn", "ffn_attn", "res", "res_with_attn", "more")
_LLAMA = {
    "attn": ["self_attn.o_proj"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "res": [""],
    "attn_res": ["self_attn"],
}
_BERT = {
    "attn": ["attention.output.dense"],
    "qkv": ["attention.self.query", "attention.self.key", "attention.self.value"],
    "res": ["output"],
    "attn_res": ["attention.output"],
}
_NEOX = {"attn": ["attention.dense"], "qkv": ["attention.query_key_value"], "res": [""], "attn_res": ["attention"]}
_FALCON = {
    "attn": ["self_attention.dense"],
    "qkv": ["self_attention.query_key_value"],
    "res": [""],
    "attn_res": ["self_attention"],
}
_OPT = {**_LLAMA, "attn": ["self_attn.out_proj"]}
_DEBERTA_QKV = [f"attention.self.{name}_proj" for name in ("query", "key", "value")]
_PLACES: dict[str, dict[str, list[str]]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "mixtral", "qwen2_moe", "qwen3_moe"), _LLAMA
    ),
    "phi3": {**_LLAMA, "qkv": ["self_attn.qkv_proj"]},
    "gpt2": {"attn": ["attn.c_proj"], "qkv": ["attn.c_attn"], "res": [""], "attn_res": ["attn"]},
    "opt": _OPT,
    "opt_post_norm": _OPT,
    "bert": _BERT,
    "roberta": _BERT,
    "deberta": {**_BERT, "qkv": ["attention.self.in_proj"]},
    "deberta_v2": {**_BERT, "qkv": _DEBERTA_QKV},
    "distilbert": {
        "attn": ["attention.out_lin"],
        "qkv": ["attention.q_lin", "attention.k_lin", "attention.v_lin"],
        "res": [""],
        "attn_res": ["sa_layer_norm"],
    },
    "vit": {
        "attn": ["attention.o_proj"],
        "qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
        "res": [""],
        "attn_res": ["attention"],
    },
    "neox": _NEOX,
    "neox_sequential": _NEOX,
    "falcon": _FALCON,
    "falcon_new": _FALCON,
    "falcon_sequential": _FALCON,
    "phi": {**_LLAMA, "attn": ["self_attn.dense"]},
    "modernbert": {"attn": ["attn.Wo"], "qkv": ["attn.Wqkv"], "res": [""], "attn_res": ["attn"]},
}
# The norm that reads the residual stream behind attention, where no module gives that stream.
_READER = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral"), "post_attention_layernorm"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "neox_sequential", "falcon_sequential"), "post_attention_layernorm"),
    **dict.fromkeys(("gemma2", "gemma3"), "pre_feedforward_layernorm"),
    "gpt2": "ln_2",
    "opt": "final_layer_norm",
    "vit": "layernorm_after",
    "modernbert": "mlp_norm",
}
_PARTS = {
    "ffn": ("ffn",),
    "attn": ("attn",),
    "ffn_attn": ("attn", "ffn"),
    "res": ("res",),
    "res_with_attn": ("attn_res", "res"),
    "more": ("qkv", "attn", "ffn"),
}


class Sites(NamedTuple):
    """The sites of a position; for those inside of a layer's forward the layer and the norm that reads the stream."""

    names: set[str]
    inside: dict[str, tuple[str, str]]
    hooked: dict[str, str]  # sites that are no module's output, to the module whose output they are


def sites(name: str, position: str) -> Sites:
    """Which sites a position has in a model of the zoo."""
    if name.startswith("t5"):
        return Sites({site for kind in _PARTS[position] for site in _t5(kind)}, {}, {})
    names: set[str] = set()
    inside: dict[str, tuple[str, str]] = {}
    hooked: dict[str, str] = {}
    for ffn in zoo.sites(name):
        number = next(part for part in ffn.split(".") if part.isdigit())
        layer = ffn[: ffn.index(f".{number}.") + len(number) + 1]
        for kind in _PARTS[position]:
            for path in [ffn.removeprefix(f"{layer}.")] if kind == "ffn" else _PLACES[name][kind]:
                site = f"{layer}.{path}" if path else layer
                names.add(site)
                if kind == "attn_res" and name in _READER:
                    inside[site] = layer, f"{layer}.{_READER[name]}"
                if kind == "attn_res" and name == "opt_post_norm":
                    hooked[site] = f"{layer}.self_attn_layer_norm"
    return Sites(names, inside, hooked)


def _t5(kind: str) -> list[str]:
    found = []
    for stack, layers in (("encoder", zoo.LAYERS), ("decoder", zoo.LAYERS - 1)):
        last = 1 if stack == "encoder" else 2
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            attentions = [f"{block}.0.SelfAttention"] + ([f"{block}.1.EncDecAttention"] if last == 2 else [])
            found += {
                "ffn": [f"{block}.{last}.DenseReluDense.wo"],
                "attn": [f"{attention}.o" for attention in attentions],
                "qkv": [f"{attention}.{letter}" for attention in attentions for letter in "qkv"],
                "res": [f"{block}.{last}"],
                "attn_res": [attention.rpartition(".")[0] for attention in attentions],
            }[kind]
    return found


def values(parameters: dict[str, dict[str, nn.Parameter]], seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """Trained-looking values for all vectors of a patched model: scales about 1, shifts about 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: {
            part: (1.0 if part in ("scale", "norm_weight") else 0.0)
            + (0.4 if part == "scale" else 0.2) * torch.randn(vector.shape, generator=generator)
            for part, vector in parts.items()
        }
        for site, parts in parameters.items()
    }
