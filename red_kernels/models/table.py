"""The architectures of RED's paper and related ones: the facts that only their names show.

`structure.py` finds their sites like those of all others. This table has facts that no module shows: the position of
the names of a checkpoint's vectors, and the attribute of a config that gives a linear layer a bias.
"""

from __future__ import annotations

from .family import Family

__all__ = ["TABLE"]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_DECODER = {
    "ffn": ("mlp.down_proj",),
    "attn": ("self_attn.o_proj",),
    "qkv": _QKV,
    "res": ("",),
    "attn_res": ("self_attn",),
}
_ATTENTION_BIAS = dict.fromkeys(("self_attn.o_proj", *_QKV), "attention_bias")
_BERT = {
    "ffn": ("output.dense",),
    "attn": ("attention.output.dense", "crossattention.output.dense?"),
    "qkv": (
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        *(f"crossattention.self.{name}?" for name in ("query", "key", "value")),
    ),
    "res": ("output",),
    "attn_res": ("attention.output", "crossattention.output?"),
}
_FALCON = {"ffn": "mlp.dense_4h_to_h", "attn": "self_attention.dense", "qkv": "self_attention.query_key_value"}

TABLE = (
    Family(
        "Llama, Mistral, Qwen2, Qwen3",
        ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
        _DECODER,
        bias_flags={"mlp.down_proj": "mlp_bias", **_ATTENTION_BIAS},
    ),
    Family(
        "Mixtral, Qwen2-MoE, Qwen3-MoE",
        ("MixtralDecoderLayer", "Qwen2MoeDecoderLayer", "Qwen3MoeDecoderLayer"),
        {**_DECODER, "ffn": ("mlp.down_proj|mlp",)},
        bias_flags=_ATTENTION_BIAS,
    ),
    Family("Phi-3", ("Phi3DecoderLayer",), {**_DECODER, "qkv": ("self_attn.qkv_proj",)}),
    Family("Gemma 2, Gemma 3", ("Gemma2DecoderLayer", "Gemma3DecoderLayer"), _DECODER, bias_flags=_ATTENTION_BIAS),
    Family(
        "GPT-2",
        ("GPT2Block",),
        {
            "ffn": ("mlp.c_proj",),
            "attn": ("attn.c_proj", "crossattention.c_proj?"),
            "qkv": ("attn.c_attn", "crossattention.q_attn?", "crossattention.c_attn?"),
            "res": ("",),
            "attn_res": ("attn",),
        },
    ),
    Family(
        "OPT",
        ("OPTDecoderLayer",),
        {"ffn": ("fc2",), "attn": ("self_attn.out_proj",), "qkv": _QKV, "res": ("",), "attn_res": ("self_attn",)},
        bias_flags=dict.fromkeys(("fc2", "self_attn.out_proj", *_QKV), "enable_bias"),
    ),
    Family(
        "ViT",
        ("ViTLayer",),
        {
            "ffn": ("mlp.fc2",),
            "attn": ("attention.o_proj",),
            "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "res": ("",),
            "attn_res": ("attention",),
        },
    ),
    Family("BERT, RoBERTa", ("BertLayer", "RobertaLayer"), _BERT),
    Family(
        "DeBERTa, DeBERTa-v2 and v3",
        ("DebertaLayer", "DebertaV2Layer"),
        {
            **_BERT,
            "qkv": (
                "attention.self.in_proj|attention.self.query_proj",
                *(f"attention.self.{name}?" for name in ("key_proj", "value_proj")),
            ),
        },
    ),
    Family(
        "DistilBERT",
        ("modeling_distilbert.TransformerBlock",),
        {
            "ffn": ("ffn.lin2",),
            "attn": ("attention.out_lin",),
            "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            "res": ("",),
            "attn_res": ("sa_layer_norm",),
        },
        norms={"": "output_layer_norm", "sa_layer_norm": "sa_layer_norm"},
    ),
    Family(
        "ModernBERT",
        ("ModernBertEncoderLayer",),
        {"ffn": ("mlp.Wo",), "attn": ("attn.Wo",), "qkv": ("attn.Wqkv",), "res": ("",), "attn_res": ("attn",)},
        bias_flags={"mlp.Wo": "mlp_bias", "attn.Wo": "attention_bias", "attn.Wqkv": "attention_bias"},
    ),
    Family(
        "GPT-NeoX",
        ("GPTNeoXLayer",),
        {
            "ffn": ("mlp.dense_4h_to_h",),
            "attn": ("attention.dense",),
            "qkv": ("attention.query_key_value",),
            "res": ("",),
            "attn_res": ("attention",),
        },
        bias_flags=dict.fromkeys(("attention.dense", "attention.query_key_value"), "attention_bias"),
    ),
    Family(
        "Falcon",
        ("FalconDecoderLayer",),
        {**{place: (path,) for place, path in _FALCON.items()}, "res": ("",), "attn_res": ("self_attention",)},
        bias_flags=dict.fromkeys(_FALCON.values(), "bias"),
    ),
    Family(
        "Phi",
        ("PhiDecoderLayer",),
        {"ffn": ("mlp.fc2",), "attn": ("self_attn.dense",), "qkv": _QKV, "res": ("",)},
    ),
    Family(
        "T5",
        ("T5Block",),
        {
            "ffn": ("layer.-1.DenseReluDense.wo",),
            "attn": ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o?"),
            "qkv": (
                *(f"layer.0.SelfAttention.{name}" for name in "qkv"),
                *(f"layer.1.EncDecAttention.{name}?" for name in "qkv"),
            ),
            "res": ("layer.-1",),
            "attn_res": ("layer.0", "layer.1 with EncDecAttention?"),
        },
    ),
)
