"""A model of another package, and its family, in one file: edited unfused by its sites alone, and fused by a layout.

`ToyForCausalLM` has the same layers as a model of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from red_kernels.fusion.compose import add, add_then_norm
from red_kernels.fusion.deferral import call_unedited, edited_output
from red_kernels.fusion.fingerprint import class_fingerprint
from red_kernels.models import Edits, Family, Layout, Point, register_family

WIDTH, LAYERS = 16, 3


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class FusedLayer(ToyLayer):
    """The same, of a family with a layout."""


class ToyModel(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def fused(layer: Any, edits: Edits, x: Tensor) -> Tensor:
    mixed = call_unedited(layer.mixer, edits.attn, layer.norm1(x))
    normed, x = add_then_norm(mixed, x, layer.norm2, own=edits.attn)
    output = call_unedited(layer.down, edits.ffn, F.gelu(layer.up(normed)))
    output = add(output, x, edits.ffn) if edits.res is None else edits.res(add(output, x, edits.ffn))
    return edited_output(edits.res, output)


class ToyConfig(PretrainedConfig):
    model_type = "red_kernels_toy"

    def __init__(self, vocab_size: int = 64, **more: Any) -> None:
        super().__init__(**{"tie_word_embeddings": False, **more})
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, WIDTH, LAYERS


class ToyForCausalLM(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.model = ToyModel(FusedLayer)
        self.lm_head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embed

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **more: Any) -> CausalLMOutput:
        logits = self.lm_head(self.model(self.embed(input_ids)))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


SITES = {"ffn": ("down",), "attn": ("mixer",), "res": ("",)}
UNFUSED = Family(name="Toy", layers=("ToyLayer",), sites=SITES)
FUSED = Family(
    name="Fused toy",
    layers=("toy_family.FusedLayer",),
    sites=SITES,
    layouts=(
        Layout(
            key="toy",
            forward=fused,
            known=(str(class_fingerprint(ToyLayer)),),
            points=(
                Point("attn", "mixer", "mixer", fuses="residual add + LayerNorm", norm="norm2", bare="residual add"),
                Point("ffn", "down", "down", fuses="residual add"),
                Point("res", "", "", fuses="nothing more"),
            ),
        ),
    ),
)


def model(layer: type[nn.Module]) -> ToyModel:
    torch.manual_seed(0)
    return ToyModel(layer)


def causal_lm(vocabulary: int = 64) -> ToyForCausalLM:
    torch.manual_seed(0)
    found = ToyForCausalLM(ToyConfig(vocab_size=vocabulary)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


def register() -> None:
    register_family(UNFUSED)
    register_family(FUSED)


AutoConfig.register(ToyConfig.model_type, ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
