"""Models of torch, written by hand, and of code loaded with a model, held to plain forward hooks; and what is fused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hooked import fused_with, held_to_hooks
from torch import Tensor, nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, norm_first=norm_first, batch_first=True)
    norm = nn.LayerNorm(32) if norm_first else None
    return nn.TransformerEncoder(layer, 3, norm=norm, enable_nested_tensor=False)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("position", ["ffn", "attn"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_of_torch(norm_first: bool, position: str, training: bool) -> None:
    report = held_to_hooks(encoder(norm_first), torch.randn(2, 8, 32), position, training)
    assert all("add" in str(fused) and "LayerNorm" in str(fused) for fused in fused_with(report))


def test_the_fast_path_of_torch_is_off_once_patched() -> None:
    """It reads the weights of `linear2` without calling it: the edit would be left out."""
    model = encoder(False).eval()
    x = torch.randn(2, 8, 32)
    patch(model, RedConfig())
    with torch.no_grad():
        before = model(x)
        for parts in edit_parameters(model).values():
            parts["bias"].fill_(3.0)
        assert not torch.allclose(model(x), before)


class Scale(nn.Module):
    """An RMSNorm under a name that says nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.gain


class Layer(nn.Module):
    def __init__(self, width: int, scaled: bool) -> None:
        super().__init__()
        self.first, self.second = Scale(width), Scale(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = nn.Linear(width, 80), nn.Linear(width, 80), nn.Linear(80, width)
        self.gain = nn.Parameter(torch.rand(width)) if scaled else None

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        y = self.down(F.silu(self.gate(self.second(x))) * self.up(self.second(x)))
        return x + (y if self.gain is None else self.gain * y)


class Decoder(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3, scaled: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Layer(width, scaled) for _ in range(depth))
        self.last, self.head = Scale(width), nn.Linear(width, 50)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_decoder_written_by_hand(scaled: bool) -> None:
    """Names and norms of its own, and a layer scale."""
    report = held_to_hooks(Decoder(scaled=scaled), torch.randint(0, 50, (2, 8)))
    assert fused_with(report) == {
        "residual add + next layer's RMSNorm": 2,
        "residual add + final RMSNorm": 1,
    }


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A model whose code lies in its folder; transformers copies the code into a cache, here one of this test."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("modeling_remote.py"), folder)
    own = {"AutoConfig": "modeling_remote.RemoteConfig", "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "remote", "auto_map": own}))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(folder)
    yield transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("position", ["ffn", "attn"])
def test_code_loaded_with_a_model(remote: nn.Module, position: str, training: bool) -> None:
    assert type(remote).__module__.startswith("transformers_modules.")
    report = held_to_hooks(remote, {"input_ids": torch.randint(0, 50, (2, 8))}, position, training)
    assert (
        fused_with(report)
        == {
            "ffn": {"residual add + next layer's RMSNorm": 2, "residual add + final RMSNorm": 1},
            "attn": {"residual add + RMSNorm": 3},
        }[position]
    )
