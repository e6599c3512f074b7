"""Patched and trained tiny models, and their edits as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_zoo
import pytest
import safetensors.torch
import torch
from torch import nn

from red_kernels.checkpoints.checkpoint import CONFIG_NAME, HEAD_NAME, TENSORS_NAME, load_edits
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch

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


def change_base(model: nn.Module) -> None:
    """Make another base model of a patched one: by its frozen weights one is told from a copy in another folder."""
    vectors = {id(vector) for vector in every_vector(model)}
    with torch.no_grad():
        for own in model.parameters():
            if id(own) not in vectors and not own.requires_grad:
                own.add_(1.0)


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


def description(folder: Path) -> dict[str, Any]:
    """The description of the edits in a folder of `save_edits`."""
    with safetensors.safe_open(folder / TENSORS_NAME, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["red_kernels"])
    return found


def describe(folder: Path, said: str) -> None:
    """Put another text in place of the description."""
    tensors = safetensors.torch.load_file(folder / TENSORS_NAME)
    safetensors.torch.save_file(tensors, folder / TENSORS_NAME, {"format": "pt", "red_kernels": said})


def as_earlier(folder: Path) -> None:
    """Make a folder what earlier versions wrote: the description in a file of its own, and no marks."""
    said = description(folder)
    for key in ("head", "stale_head"):
        said.pop(key, None)
    head = folder / HEAD_NAME
    if head.exists():
        with safetensors.safe_open(head, "pt") as file:
            labels = json.loads(file.metadata()["red_kernels"])["labels"]
        values = safetensors.torch.load_file(head)
        safetensors.torch.save_file(values, head, {"format": "pt", "id2label": json.dumps(labels)})
    safetensors.torch.save_file(
        safetensors.torch.load_file(folder / TENSORS_NAME), folder / TENSORS_NAME, {"format": "pt"}
    )
    (folder / CONFIG_NAME).write_text(json.dumps(said, indent=2) + "\n")


def assert_refused(path: Path, match: str) -> None:
    model = patched()
    before = values(model)
    with pytest.raises(ValueError, match=match):
        load_edits(model, path)
    assert same(before, values(model))
