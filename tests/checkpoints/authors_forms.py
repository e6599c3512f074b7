"""Files in the form of RED's authors, made here; and the plain composition that is driven by such a file's names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import model_zoo
import torch
from torch import Tensor, nn

VECTORS, CLASSIFIER = "delta_vector.pth", "classifier.pth"
SUFFIXES = {
    "scale": "activation_scaling",
    "bias": "activation_bias",
    "norm_weight": "activation_ln.weight",
    "norm_bias": "activation_ln.bias",
}
PARTS = {
    "all": ("scale", "bias"),
    "scaling": ("scale",),
    "bias": ("bias",),
    "ln": ("scale", "bias", "norm_weight", "norm_bias"),
}

_ROBERTA = "encoder.layer.{}."
_GPT2 = "transformer.h.{}."
_LLAMA = "model.layers.{}."
_T5 = ("encoder.block.{}.layer.0.SelfAttention.", "decoder.block.{}.layer.0.SelfAttention.")
_T5_CROSS = "decoder.block.{}.layer.1.EncDecAttention."
_T5_FFN = ("encoder.block.{}.layer.1.DenseReluDense.wo", "decoder.block.{}.layer.2.DenseReluDense.wo")
# model -> position -> the authors' names of a layer's sites, written down by hand
SITES: dict[str, dict[str, list[str]]] = {
    "roberta": {
        "ffn": [_ROBERTA + "output.dense"],
        "attn": [_ROBERTA + "attention.output.dense"],
        "ffn_attn": [_ROBERTA + "attention.output.dense", _ROBERTA + "output.dense"],
        "res": [_ROBERTA + "output"],
        "res_with_attn": [_ROBERTA + "attention.output", _ROBERTA + "output"],
        "more": [_ROBERTA + f"attention.self.{name}" for name in ("query", "key", "value")]
        + [_ROBERTA + "attention.output.dense", _ROBERTA + "output.dense"],
    },
    "gpt2": {
        "ffn": [_GPT2 + "mlp.c_proj"],
        "more": [_GPT2 + name for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")],
    },
    "t5": {
        "ffn": list(_T5_FFN),
        "more": [prefix + name for prefix in (*_T5, _T5_CROSS) for name in "qkvo"] + list(_T5_FFN),
    },
    "llama": {
        "ffn": [_LLAMA + "mlp.down_proj"],
        "more": [_LLAMA + f"self_attn.{name}_proj" for name in "qkvo"] + [_LLAMA + "mlp.down_proj"],
    },
}
INNER = {"roberta": "roberta"}  # the module that the authors' names start from, where it is not the model


def layers_of(pattern: str) -> range:
    return range(model_zoo.LAYERS - 1 if pattern.startswith("decoder.") else model_zoo.LAYERS)


def names(model: str, position: str) -> list[str]:
    """The authors' names of the sites of a tiny model."""
    return [pattern.format(layer) for pattern in SITES[model][position] for layer in layers_of(pattern)]


def inner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(INNER.get(name, ""))


def width_of(module: nn.Module) -> int:
    found: Any = module
    if hasattr(module, "LayerNorm"):
        found = found.LayerNorm.weight.shape[0]
    elif hasattr(module, "out_features"):
        found = found.out_features
    else:
        found = found.nf
    return int(found)


def state(model: nn.Module, name: str, position: str, kind: str = "all", seed: int = 9) -> dict[str, Tensor]:
    """A trained-looking `delta_vector.pth` for a tiny model: scales far from 1, some below 0."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for site in names(name, position):
        width = width_of(inner(model, name).get_submodule(site))
        for part in PARTS[kind]:
            value = torch.randn(width, generator=generator) * (1.0 if part == "scale" else 0.5)
            value = value + (1.0 if part in ("scale", "norm_weight") else 0.0)
            made[f"{site}.delta_vector.{SUFFIXES[part]}"] = value if part.startswith("norm") else value.reshape(1, -1)
    return made


def classifier(width: int = model_zoo.HIDDEN, labels: int = 2, seed: int = 10) -> dict[str, Tensor]:
    """A `classifier.pth`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "dense.weight": (width, width),
        "dense.bias": (width,),
        "out_proj.weight": (labels, width),
        "out_proj.bias": (labels,),
    }
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def write(folder: Path, vectors: dict[str, Tensor], head: dict[str, Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(vectors, folder / VECTORS)
    if head is not None:
        torch.save(head, folder / CLASSIFIER)
    return folder


@contextmanager
def composed(model: nn.Module, name: str, raw: dict[str, Tensor]) -> Iterator[None]:
    """`scale * h + bias` as forward hooks on the modules that a file's keys name, and the LayerNorm of kind `ln`."""
    sites: dict[str, dict[str, Tensor]] = {}
    for key, value in raw.items():
        site, _, suffix = key.partition(".delta_vector.")
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        sites.setdefault(site, {})[suffix] = value.reshape(-1).to(dtype)
    handles = [
        inner(model, name).get_submodule(site).register_forward_hook(_edit(vectors)) for site, vectors in sites.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edit(vectors: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        hidden = output
        if "activation_scaling" in vectors:
            hidden = hidden * vectors["activation_scaling"]
        if "activation_bias" in vectors:
            hidden = hidden + vectors["activation_bias"]
        if "activation_ln.weight" in vectors:
            weight, bias = vectors["activation_ln.weight"], vectors["activation_ln.bias"]
            hidden = nn.functional.layer_norm(hidden, weight.shape, weight, bias, 1e-5)
        return hidden

    return hook
