"""The models of the measured training steps, and their batches.

Most are published configurations with random weights, made directly on their device and in their dtype: the time of a
step does not depend on the weights. Two have their real weights, from packages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from red_kernels.finetune.base_dtype import DTYPES
from red_kernels.support.base_models import load_base

LABELS = ["negative", "positive"]


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        task: `"classification"`, `"causal-lm"` or `"seq2seq"`.
        config: the name of its configuration's class in transformers; empty for a packaged one.
        sizes: the configuration's arguments.
        packaged: its name in `red_kernels.support.base_models`.
        longest: the most tokens of a text.
    """

    task: str
    config: str = ""
    sizes: tuple[tuple[str, Any], ...] = ()
    packaged: str = ""
    longest: int = 512


def _model(task: str, config: str, longest: int, **sizes: Any) -> Model:
    return Model(task, config, tuple(sizes.items()), longest=longest)


def _roberta(width: int, layers: int) -> Model:
    return _model(
        "classification",
        "RobertaConfig",
        512,
        vocab_size=50265,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )


def llama(vocabulary: int, width: int, inner: int, layers: int, heads: int, longest: int) -> Model:
    """A Llama-shaped decoder, with separate keys and values for each head."""
    return _model(
        "causal-lm",
        "LlamaConfig",
        longest,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=longest,
        rms_norm_eps=1e-5,
    )


MODELS: dict[str, Model] = {
    "MiniLM-L6": Model("classification", packaged="all-MiniLM-L6-v2"),
    "SmolLM2-135M": Model("causal-lm", packaged="SmolLM2-135M-Instruct", longest=8192),
    "RoBERTa-base": _roberta(768, 12),
    "RoBERTa-large": _roberta(1024, 24),
    "GPT-2-medium": _model(
        "causal-lm", "GPT2Config", 1024, vocab_size=50257, n_embd=1024, n_layer=24, n_head=16, n_positions=1024
    ),
    "T5-base": _model(
        "seq2seq",
        "T5Config",
        512,
        vocab_size=32128,
        d_model=768,
        d_ff=3072,
        d_kv=64,
        num_layers=12,
        num_heads=12,
        decoder_start_token_id=0,
    ),
    "Llama-2-7B": llama(32000, 4096, 11008, 32, 32, 4096),
    "tiny-decoder": llama(128, 64, 160, 2, 2, 128),
    "tiny-encoder": _model(
        "classification",
        "RobertaConfig",
        128,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=130,
    ),
}


def find(name: str) -> Model:
    """The model of this name. Raises ValueError for an unknown one."""
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, expected one of {', '.join(map(repr, MODELS))}")
    return MODELS[name]


def build(model: Model, dtype: str, device: torch.device, seed: int = 0) -> nn.Module:
    """Make or load a model, frozen and in evaluation mode; random weights are always the same on one kind of device.

    Raises:
        ValueError: an unknown dtype.
        ModuleNotFoundError: the package of a packaged model is missing; the message contains the pip command.
    """
    import transformers

    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(map(repr, DTYPES))}")
    made: Any
    torch.manual_seed(seed)
    if model.packaged:
        labels = LABELS if model.task == "classification" else None
        made = load_base(model.packaged, model.task, DTYPES[dtype], device, labels).model
    else:
        config = getattr(transformers, model.config)(**dict(model.sizes))
        auto: Any = {
            "classification": transformers.AutoModelForSequenceClassification,
            "causal-lm": transformers.AutoModelForCausalLM,
            "seq2seq": transformers.AutoModelForSeq2SeqLM,
        }[model.task]
        with torch.device(device):
            made = auto.from_config(config, dtype=DTYPES[dtype])
    made.config.use_cache = False
    frozen: nn.Module = made.requires_grad_(False).eval()
    return frozen


def batch_of(model: nn.Module, task: str, batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """Random tokens, no padding: `input_ids` and `attention_mask` of shape `(batch, length)`, and `labels`.

    The labels are `(batch,)` class numbers, the input itself for a causal language model, and a quarter as many tokens
    as the input has for an encoder with a decoder. Raises ValueError for a batch or length below 1.
    """
    for name, value in (("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    config: Any = model.config
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tensor:
        return torch.randint(3, config.vocab_size, (batch, count), generator=generator).to(device)

    ids = tokens(length)
    if task == "classification":
        labels = torch.randint(0, config.num_labels, (batch,), generator=generator).to(device)
    else:
        labels = ids.clone() if task == "causal-lm" else tokens(max(1, length // 4))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
