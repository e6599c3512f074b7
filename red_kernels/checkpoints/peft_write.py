"""Saved edits in PEFT's form: the files of a RED adapter that PEFT loads, written without PEFT."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..edits.config import RedConfig
from ..support.files import locked, made_folder, write_files
from ..support.text import listed
from .folder import TENSORS_NAME, Base, Head, tensors_file
from .peft_names import BESIDE, CONFIG_NAME, PREFIX, TENSORS_NAMES
from .peft_place import Place, owners_of
from .vectors import SiteTensors

__all__ = ["PEFT_NAMES", "beside_model", "beside_own", "whole_layers", "write_peft"]

PEFT_NAMES = (TENSORS_NAMES[0], CONFIG_NAME)
_BY_POSITION = ("ia3",)  # edits inputs and outputs, which only the model's own table tells apart
_MARK = {BESIDE: TENSORS_NAME}
_WHOLE_LAYERS = ("res", "res_with_attn")
_LANGUAGE_MODEL = "ForCausalLM"


def write_peft(folder: Path, config: RedConfig, vectors: SiteTensors, base: Base, head: Head | None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into a folder, together; it is created if missing.

    Args:
        folder: the folder.
        config: the config of the patch.
        vectors: site to part to tensor.
        base: the base model, as far as known.
        head: further trained parameters: their modules become `modules_to_save`.

    Raises:
        ValueError: PEFT has no place for further trained parameters.
        OSError: the folder cannot be written to; the former files stay.
    """
    lost = _without_place(vectors, head)
    if lost:
        raise ValueError(
            f"to: PEFT has no place for {listed(lost)}, which were trained beside the edits: it keeps whole modules, "
            "and edits none of these"
        )
    with made_folder(folder), locked(folder):
        write_files(folder, _files(config, vectors, base, head, {}))


def beside_own(config: RedConfig, vectors: SiteTensors, base: Base, head: Head | None) -> dict[str, bytes]:
    """The same files for a folder of `rk.save_edits`, marked as such; {} if PEFT has no place for the edits."""
    if whole_layers(config) or _without_place(vectors, head):
        return {}
    return _files(config, vectors, base, head, _MARK)


def beside_model(config: RedConfig, place: Place | None, base: Base) -> dict[str, bytes]:
    """The same from a model, which also has all of its sites, and all tensors of a head's modules."""
    if whole_layers(config) or place is None:
        return {}
    return _files(config, place.vectors, base, place.head, _MARK, place.sites)


def whole_layers(config: RedConfig) -> bool:
    """Whether the sites may be whole layers, which PEFT cannot wrap."""
    return config.sites is None and config.position in _WHOLE_LAYERS


def _without_place(vectors: SiteTensors, head: Head | None) -> list[str]:
    """Further trained parameters in no module, in an edited one, or in one around edited ones."""
    return [
        name
        for name in (() if head is None else head.values)
        if not (owner := name.rpartition(".")[0])
        or any(f"{site}.".startswith(f"{owner}.") or owner.startswith(f"{site}.") for site in vectors)
    ]


def _files(
    config: RedConfig,
    vectors: SiteTensors,
    base: Base,
    head: Head | None,
    metadata: Mapping[str, str],
    sites: Mapping[str, bool] | None = None,
) -> dict[str, bytes]:
    tensors = {f"{site}.red_edit.{part}": own for site, parts in vectors.items() for part, own in parts.items()}
    tensors |= {} if head is None else head.values
    # A copy each: safetensors refuses tensors that share memory, as the vectors of shared kinds do.
    content = {f"{PREFIX}{name}": own.clone(memory_format=torch.contiguous_format) for name, own in tensors.items()}
    said = json.dumps(_said(config, vectors, base, head, sites), indent=2) + "\n"
    # The config last: without it there is no adapter.
    return {PEFT_NAMES[0]: tensors_file(content, metadata), CONFIG_NAME: said.encode()}


def _said(
    config: RedConfig, vectors: SiteTensors, base: Base, head: Head | None, sites: Mapping[str, bool] | None
) -> dict[str, Any]:
    shared = config.edit_kind.shared  # the file names one of the sites, and the others have the same vectors
    by_position = sites is None and config.sites is None and (shared or config.position in _BY_POSITION)
    # An expression and not a list of names, each of which would stand for all names that end in it.
    names = map(_expression, config.sites or ()) if shared and sites is None else map(re.escape, sites or vectors)
    inputs = [] if config.edit_kind.on_input else [name for name, on_input in (sites or {}).items() if on_input]
    modules = None if head is None else owners_of(head.values)
    language_model = (base.architecture or "").endswith(_LANGUAGE_MODEL)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base.name,
        "exclude_modules": None,
        "feedforward_modules": "|".join(map(re.escape, inputs)) or None,
        "inference_mode": True,
        "init_weights": True,
        "kind": config.kind,
        "layers_pattern": None,
        "layers_to_transform": list(config.layers) if by_position and config.layers is not None else None,
        "modules_to_save": modules,
        "peft_type": "RED",
        "position": config.position,
        "revision": base.revision,
        "stacks": None if config.stacks is None else list(config.stacks),
        "target_modules": None if by_position else "|".join(names),
        "task_type": "CAUSAL_LM" if language_model else None,
        "vector_dtype": str(config.dtype).removeprefix("torch."),
    }


def _expression(glob: str) -> str:
    """A glob as an expression for every version of Python: Python's own translation has changed."""
    return fnmatch.translate(glob).replace("(?>", "(?:").replace(r"\z", r"\Z").removesuffix(r"\Z")
