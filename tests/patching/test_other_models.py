"""Models of other libraries, and one written by hand, as plain forward hooks have them; and what is fused in them."""

from __future__ import annotations

import copy
import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hooked import flat, paired
from torch import Tensor, nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch
from red_kernels.patching.report import PatchReport

CLOSE = 1e-5  # relative, of two computations in fp32


def held_to_hooks(model: nn.Module, batch: Any, position: str = "ffn", training: bool = True) -> PatchReport:
    """Patch a model, and hold two forwards and backwards to the same edits as forward hooks. Returns the report."""
    plain = copy.deepcopy(model).train(training)
    report, own, others = paired(model.train(training), plain, position, batch)
    for _ in range(2):
        found, wanted = (_results(one, batch, vectors) for one, vectors in ((model, own), (plain, others)))
        for name, one, other in zip(("output", "gradients"), found, wanted, strict=True):
            assert (one - other).norm() <= CLOSE * other.norm() + 1e-9, name
    return report


def _results(model: nn.Module, batch: Any, vectors: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    output = model(**batch) if isinstance(batch, dict) else model(batch)
    output = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.sample
    pattern = torch.cos(torch.arange(output.numel())).view(output.shape)
    found = torch.autograd.grad((output * pattern).sum(), vectors, allow_unused=True)
    return output.detach(), flat(found, vectors)


def fused_with(report: PatchReport) -> Counter[str | None]:
    return Counter(site.fused for site in report.sites)


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


def timm_model(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        # torchvision's own operators need its compiled library, which fits one build of torch only.
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
        timm = pytest.importorskip("timm")
        return timm.create_model(name, **arguments)  # type: ignore[no-any-return]

    return make


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (timm_model("vit_tiny_patch16_224", img_size=32, depth=3), 32),
        (timm_model("deit3_small_patch16_224", img_size=32, depth=3, embed_dim=64, num_heads=2), 32),
        (timm_model("eva02_tiny_patch14_224", img_size=28, depth=3), 28),
        (timm_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), embed_dim=32, num_heads=(2, 4)), 56),
        (timm_model("beit_base_patch16_224", img_size=32, depth=3, embed_dim=64, num_heads=2), 32),
    ],
    ids=["vit", "deit3", "eva", "swin", "beit"],
)
def test_timm(make: Callable[[], nn.Module], size: int) -> None:
    report = held_to_hooks(make(), torch.randn(2, 3, size, size))
    assert all("add" in str(fused) for fused in fused_with(report)), report


def test_diffusers() -> None:
    """The gates of DiT are factors for each sample, which go into the vectors."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    batch = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([1, 2]),
    }
    assert all("add" in str(fused) for fused in fused_with(held_to_hooks(model, batch)))
