"""What a model says of itself for saving and loading: its labels, its class, the name of its base model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..fusion.fingerprint import BASE

__all__ = ["architecture", "base_model_name", "labels_of", "last_name", "set_labels"]


def set_labels(model: nn.Module, labels: dict[int, str] | None) -> tuple[str, ...]:
    """Give the model's config the names of the labels; returns them, or nothing where none were given."""
    config = _labelled_config(model)
    if config is None or not labels or (config.id2label == labels and labels == _unnamed(len(labels))):
        return ()
    config.id2label = dict(labels)
    config.label2id = {label: number for number, label in labels.items()}
    return tuple(labels.values())


def labels_of(model: nn.Module) -> dict[int, str] | None:
    """The names of the labels by their numbers, where the model's config has them."""
    config = _labelled_config(model)
    if config is None or not isinstance(config.id2label, Mapping):
        return None
    return {int(number): str(label) for number, label in config.id2label.items()}


def _labelled_config(model: nn.Module) -> Any:
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "id2label"):
            return config
    return None


def _unnamed(count: int) -> dict[int, str]:
    return {number: f"LABEL_{number}" for number in range(count)}


def architecture(model: nn.Module) -> str | None:
    """The class of the transformers model in a model."""
    for module in model.modules():
        if isinstance(getattr(type(module), "base_model_prefix", None), str):
            kind = getattr(type(module), BASE, type(module))
            return str(kind.__name__)
    return None


def base_model_name(model: nn.Module) -> str | None:
    """The name that transformers loaded a model by, if any."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def last_name(name: str) -> str:
    """What is left of a base model's name wherever its folder lies."""
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".")]
    if len(parts) >= 3 and parts[-2] == "snapshots":  # in the cache of the hub: models--OWNER--NAME/snapshots/COMMIT
        parts = parts[-3].split("--")
    return parts[-1].casefold() if parts else ""
