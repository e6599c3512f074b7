"""Facts about a model for saving and loading: its labels, its class, the name of its base model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..edits.find import edit_modules
from ..edits.module import RedEdit
from ..fusion.fingerprint import BASE
from ..support.sharded import is_sharded
from .hub import only_commit

__all__ = [
    "architecture",
    "base_model_name",
    "base_revision",
    "labels_of",
    "last_name",
    "set_labels",
    "weights_print",
]

_SAMPLED = 64  # values of a tensor: enough to distinguish two models
_COMMIT = re.compile("[0-9a-f]{40}")


def set_labels(model: nn.Module, labels: dict[int, str] | None) -> tuple[str, ...]:
    """Give the model's config the names of the labels; returns them, or nothing if none were given."""
    config = _labelled_config(model)
    if config is None or not labels or (config.id2label == labels and labels == _unnamed(len(labels))):
        return ()
    config.id2label = dict(labels)
    config.label2id = {label: number for number, label in labels.items()}
    return tuple(labels.values())


def labels_of(model: nn.Module) -> dict[int, str] | None:
    """The names of the labels by their numbers, if the model's config has them."""
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
    """The class of the transformers model inside a model."""
    for module in model.modules():
        if isinstance(getattr(type(module), "base_model_prefix", None), str):
            kind = getattr(type(module), BASE, type(module))
            return str(kind.__name__)
    return None


def base_model_name(model: nn.Module) -> str | None:
    """The name under which transformers loaded a model, if any."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def last_name(name: str) -> str:
    """The part of a base model's name that does not depend on its folder's place."""
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".")]
    if len(parts) >= 3 and parts[-2] == "snapshots":  # in the cache of the hub: models--OWNER--NAME/snapshots/COMMIT
        parts = parts[-3].split("--")
    return parts[-1].casefold() if parts else ""


def base_revision(model: nn.Module) -> str | None:
    """The commit of a model's repository on the hub; None if unknown."""
    said = getattr(getattr(model, "config", None), "_commit_hash", None)
    if isinstance(said, str) and _COMMIT.fullmatch(said):
        return said
    name = base_model_name(model)
    if name is None:
        return None
    parts = Path(name).parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and _COMMIT.fullmatch(parts[-1]):
        return parts[-1]
    return only_commit(name)


def weights_print(model: nn.Module) -> str | None:
    """A digest of some frozen weights of the first and the last edited modules, rounded to bf16.

    So it is the same for a model loaded in fp32 or bf16, under any folder name. None if there are no such weights, or
    this process does not have them whole (sharded, offloaded, quantised).
    """
    sites = list(edit_modules(model))
    digest = hashlib.sha256()
    any_weights = False
    for site in dict.fromkeys((*sites[:1], *sites[-1:])):
        module = model.get_submodule(site)
        edits = {id(own) for part in module.modules() if isinstance(part, RedEdit) for own in part.parameters()}
        for own in module.parameters():
            if id(own) in edits:
                continue
            # Quantised weights are tensors of their own classes, which lack some operations.
            plain = type(own) in (torch.nn.Parameter, torch.Tensor) and type(own.data) is torch.Tensor
            known = plain and own.is_floating_point() and own.element_size() > 1 and own.layout is torch.strided
            if not known or own.is_meta or is_sharded(own) or own.numel() == 0 or own.requires_grad:
                return None
            flat = own.detach().reshape(-1)[:: max(1, own.numel() // _SAMPLED)][:_SAMPLED]
            digest.update(
                str(tuple(own.shape)).encode() + flat.float().bfloat16().view(torch.int16).cpu().numpy().tobytes()
            )
            any_weights = True
    return digest.hexdigest() if any_weights else None
