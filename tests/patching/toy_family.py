"""A model of another package whose structure misleads, and the `Family` that says where its sites are.

The mixer of a layer has no name that tells attention, and a gate of the stream looks like a second FFN.
`ToyForCausalLM` has the same layers as a model of transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from red_kernels.models import Family, register_family

WIDTH, LAYERS = 16, 3


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mixer = nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        normed = self.norm2(x)
        gate = torch.sigmoid(self.narrow(F.gelu(self.widen(normed))))
        return x + self.down(F.gelu(self.up(gate * normed)))


class ToyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ToyLayer() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


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
        self.model = ToyModel()
        self.lm_head = nn.Linear(WIDTH, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embed

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **more: Any) -> CausalLMOutput:
        logits = self.lm_head(self.model(self.embed(input_ids)))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


FAMILY = Family(
    name="Toy",
    layers=("toy_family.ToyLayer",),
    sites={"ffn": ("down",), "attn": ("mixer",), "res": ("",)},
    layouts=("what a release wrote in which forwards were replaced",),
)


def model() -> ToyModel:
    torch.manual_seed(0)
    return ToyModel()


def causal_lm(vocabulary: int = 64) -> ToyForCausalLM:
    torch.manual_seed(0)
    found = ToyForCausalLM(ToyConfig(vocab_size=vocabulary)).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return found


def register() -> None:
    register_family(FAMILY)


AutoConfig.register(ToyConfig.model_type, ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
