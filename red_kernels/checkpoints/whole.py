"""A base model with its saved edits in one call, and base models alone."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..patching.heads import make_trainable
from ..patching.patch import patch
from .checkpoint import load_found
from .folder import config_of
from .found import Found
from .reading import located, read_described

if TYPE_CHECKING:
    from .base import Source

__all__ = ["from_pretrained", "load_base_model", "load_tokenizer"]

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> Any:
    """Load a base model with its edits: the model, the patch, the vectors and a trained head.

    The edits name their base model. Its class is that of the trained head if there is one, else that of the base
    model's configuration. A folder with a base model and edits (from `save_pretrained` of a patched model) is its own
    base model.

    Args:
        source: a folder of `rk.save_edits`, of a run of `red-kernels finetune`, or of a RED adapter that PEFT has
            saved; or, as text, the id of a repository on the hub with one of these, such as `"user/name"`.
        revision: branch, tag or commit of that repository.
        base: the base model, if not the one that the edits name: a packaged model's name, a folder, a `.gguf` file or a
            hub id.
        base_revision: branch, tag or commit of the base model; None for the one that the edits name.
        dtype: of the base weights: a dtype, or `"auto"` for that of the files (fp32 for a `.gguf` file). The vectors
            keep theirs; a trained head is fp32 at least, as in training.
        device: the model's device; None for the CPU.

    Returns:
        The patched model, in evaluation mode. `rk.load_tokenizer(source)` loads the tokenizer.

    Raises:
        ValueError: the source has no edits, or no config for them, or names no base model; a damaged file; edits or a
            head that do not fit the base model; a revision, but no repository.
        FileNotFoundError, OSError: the folder, repository or base model does not exist, or the hub cannot be reached.

    Warns:
        UserWarning: `base` is not the base model of the edits.
    """
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: got {dtype!r}, expected a floating-point dtype of torch, or 'auto'")
    place, found = _read(source, revision)
    from .base import load_source

    model = load_source(_base(source, place, found, base, base_revision), dtype, found.trained)
    if device is not None:
        model = model.to(device)
    assert found.description is not None
    patch(model, config_of(found.source, found.description))
    if found.trained is not None:
        own = dict(model.named_parameters())
        head = {name: own[name] for name in found.trained.values if name in own and own[name].dtype.itemsize < 4}
        make_trainable(model, head)
        for parameter in head.values():
            parameter.requires_grad_(False)
    for text in load_found(model, found, place, None, strict=True).warnings:
        warnings.warn(text, stacklevel=2)
    return model.eval()


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base: str | None = None,
    base_revision: str | None = None,
) -> Any:
    """The tokenizer of the base model of saved edits. Arguments as in `from_pretrained`.

    Raises:
        ValueError: as `from_pretrained`, or the base model has no tokenizer.
        FileNotFoundError, OSError: the folder, repository or base model does not exist, or the hub cannot be reached.
    """
    place, found = _read(source, revision)
    from .base import source_tokenizer

    tokenizer, reason = source_tokenizer(_base(source, place, found, base, base_revision))
    if tokenizer is None:
        raise ValueError(f"source: the base model of {str(source)!r} has no tokenizer: {reason}")
    return tokenizer


def load_base_model(
    name: str,
    task: str = "causal-lm",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    labels: list[str] | None = None,
    revision: str | None = None,
) -> tuple[Any, Any]:
    """Load a base model and its tokenizer by any name that `red-kernels finetune --model` accepts.

    Args:
        name: the name of a packaged model (`"SmolLM2-135M-Instruct"`, `"all-MiniLM-L6-v2"`), a folder, a `.gguf` file,
            or an id of the hub.
        task: `"causal-lm"` or `"classification"`; the latter gets a fresh head for `labels`.
        dtype: of the weights. A GGUF file is unpacked to fp32 first and rounded once.
        device: the model's device.
        labels: for classification, the labels in the order of their numbers.
        revision: branch, tag or commit, for an id of the hub.

    Returns:
        The model, in evaluation mode and not patched, and its tokenizer, which has a padding token.

    Raises:
        ModuleNotFoundError: a package is missing; the message contains the pip command.
        OSError: the model cannot be found or read.
        ValueError: an unknown task, no labels for classification, a damaged file, a revision without a repository, or a
            tokenizer that lacks tokens of the task.
    """
    if task == "classification" and not labels:
        raise ValueError(f"labels: got {labels!r}, expected the names of the labels, for the task 'classification'")
    if task != "classification" and labels is not None:
        raise ValueError(f"labels: got {labels!r} for the task {task!r}, expected None")
    from ..support.base_models import load_base

    loaded = load_base(name, task, dtype, torch.device(device), labels, revision=revision)
    return loaded.model, loaded.tokenizer


def _read(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, Found]:
    place = located(source, revision)
    try:
        return place, read_described(place, "source", source)
    except FileNotFoundError as error:
        if place.is_dir() and (place / "config.json").is_file():
            raise ValueError(
                f"source: {str(source)!r} holds a model and no edits; load it by transformers' from_pretrained"
            ) from error
        raise


def _base(source: str | os.PathLike[str], place: Path, found: Found, base: str | None, revision: str | None) -> Source:
    """The base model of saved edits, or its replacement."""
    from .base import source_of
    from .hub import is_hub_id

    if base is not None:
        return source_of(base, revision)
    folder = place if place.is_dir() else place.parent
    if (folder / "config.json").is_file() and any(next(folder.glob(name), None) for name in _WEIGHTS):
        return source_of(str(folder), revision)
    said = found.description or {}
    name = said.get("base_model_name")
    if not name:
        raise ValueError(f"base: the edits in {str(source)!r} name no base model; pass base= with its name or folder")
    from ..support.base_models import is_packaged

    here = os.path.exists(name)
    if not here and not is_packaged(name) and not is_hub_id(name):
        raise FileNotFoundError(
            f"base: the edits in {str(source)!r} belong to the base model {name!r}, which is not here; pass base= with "
            "its name or folder"
        )
    if revision is None and not here and is_hub_id(name):
        revision = said.get("base_model_revision")
    return source_of(name, revision)
