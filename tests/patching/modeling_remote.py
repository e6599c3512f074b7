"""The code of a causal language model, as it lies beside the weights; test_other_models.py loads a copy with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RemoteConfig(PreTrainedConfig):
    model_type = "remote"
    vocab_size: int = 50
    hidden_size: int = 32
    depth: int = 3


class RemoteNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class RemoteAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class RemoteBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = RemoteNorm(width), RemoteNorm(width)
        self.attention = RemoteAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        return x + self.mlp(self.before_mlp(x))


class RemoteForCausalLM(PreTrainedModel):
    config_class = RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(RemoteBlock(config.hidden_size) for _ in range(config.depth))
        self.last, self.head = RemoteNorm(config.hidden_size), nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(self.last(x)))
