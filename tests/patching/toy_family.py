"""A model of another package, and its family: edited unfused by its sites alone, and fused by a layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def register() -> None:
    register_family(UNFUSED)
    register_family(FUSED)
