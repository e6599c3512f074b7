"""Patched and trained tiny models, and their edits as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_zoo
import pytest
import torch
from torch import nn

from red_kernels.checkpoint import load_edits
from red_kernels.config import RedConfig
from red_kernels.patch import edit_parameters, patch

WIDTH = model_zoo.HIDDEN


def patched(name: str = "llama", **options: Any) -> nn.Module:
    model = model_zoo.tiny(name)
    patch(model, RedConfig(**options))
    return model


def trained(name: str = "llama", **options: Any) -> nn.Module:
    """A patched model whose vectors are far from the identity."""
    model = patched(name, **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for vector in every_vector(model):
            vector.copy_(torch.randn(vector.shape, generator=generator) * 20)
    return model


def every_vector(model: nn.Module) -> list[nn.Parameter]:
    return [vector for parts in edit_parameters(model).values() for vector in parts.values()]


def values(model: nn.Module) -> list[torch.Tensor]:
    return [vector.detach().clone() for vector in every_vector(model)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(left.nan_to_num(nan=1e30), right.nan_to_num(nan=1e30))
        for left, right in zip(first, second, strict=True)
    )


def authors_state(model: nn.Module, prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The edits of a model in the authors' form, with `prefix` taken off the site names."""
    state = {}
    for site, parts in edit_parameters(model).items():
        for part, name in (("bias", "activation_bias"), ("scale", "activation_scaling")):
            if part in parts:
                key = f"{site.removeprefix(prefix)}.delta_vector.{name}"
                state[key] = parts[part].detach().clone().to(dtype).reshape(1, -1)
    return state


def assert_refused(path: Path, match: str) -> None:
    model = patched()
    before = values(model)
    with pytest.raises(ValueError, match=match):
        load_edits(model, path)
    assert same(before, values(model))
