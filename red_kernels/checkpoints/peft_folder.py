"""Reading a folder that PEFT has saved a RED adapter into. PEFT itself is not needed for that."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..edits.config import RedConfig
from ..support.parse import read_json, shown
from ..support.text import listed
from .folder import Base, Head, Saved, make_saved
from .found import Found
from .infer import config_from_names, kind_of, layers_by_stack
from .peft_names import CONFIG_NAME, PREFIX, TENSORS_NAMES
from .vectors import SiteTensors, checked_tensor, collect, load_pickled, split_key

__all__ = ["PeftFolder", "read_peft", "read_peft_folder"]

_KEPT = {"model", "transformer", "encoder", "decoder", "layers", "layer", "h", "blocks"}  # in the authors' names


@dataclass(frozen=True)
class PeftFolder:
    """What a folder of a RED adapter holds.

    Attributes:
        config: how a model has to be patched; by a position where the sites are those of one, else by their names.
        vectors: site to part to vector `(width,)`.
        head: what `modules_to_save` has trained, by the model's names.
        base: the base model, as far as it is named.
        source: the file of the vectors.
    """

    config: RedConfig
    vectors: SiteTensors
    head: dict[str, torch.Tensor]
    base: Base
    source: Path

    def saved(self) -> Saved:
        """The same as the content of a folder of `rk.save_edits`."""
        head = Head(self.head) if self.head else None
        return make_saved(self.config, self.vectors, self.base, _inner_prefix(self.vectors), head)


def read_peft_folder(folder: str | os.PathLike[str]) -> PeftFolder:
    """Read a RED adapter that PEFT's `save_pretrained` wrote.

    Args:
        folder: with `adapter_config.json`, and `adapter_model.safetensors` or `.bin`.

    Raises:
        ValueError: a file is damaged, or the adapter is of another method.
        FileNotFoundError: a file is missing.
    """
    path = Path(folder)
    content = read_json(path / CONFIG_NAME)
    if content.get("peft_type") != "RED":
        raise ValueError(
            f"{path / CONFIG_NAME}: is of an adapter of the method {shown(content.get('peft_type'))}, expected 'RED'"
        )
    source = _tensors_file(path)
    tensors = {key.removeprefix(PREFIX): value for key, value in _tensors(source).items()}
    head = {key: checked_tensor(source, key, value) for key, value in tensors.items() if split_key(key) is None}
    odd = [key for key in head if ".red_edit." in key]
    if odd:
        raise ValueError(f"{source}: has {listed(odd)}, which are no vectors of RED")
    edits = {key: value for key, value in tensors.items() if key not in head}
    vectors = collect(source, edits, split_key)
    name, revision = (content.get(key) for key in ("base_model_name_or_path", "revision"))
    base = Base(*(value if isinstance(value, str) and value else None for value in (name, revision)))
    config = _config(source, vectors)
    return PeftFolder(config, _once(config, vectors), head, base, source)


def read_peft(folder: str | os.PathLike[str]) -> Found:
    """What PEFT's folder holds, as if `rk.save_edits` had written it. Raises as `read_peft_folder`."""
    found = read_peft_folder(folder)
    head = Head(found.head) if found.head else None
    return Found(found.source, found.vectors, found.saved().description, trained=head, head_file=found.source)


def _tensors_file(folder: Path) -> Path:
    for name in TENSORS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"folder: {str(folder)!r} holds neither {' nor '.join(TENSORS_NAMES)}")


def _tensors(path: Path) -> Mapping[str, Any]:
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        return load_pickled(path, content)
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: is damaged or no file of an adapter: {reason}") from error


def _config(source: Path, vectors: SiteTensors) -> RedConfig:
    """By position, where the names say one, so that the edits fit a model with a head around it; else by names."""
    try:
        config = config_from_names(source, vectors)
        stacks = layers_by_stack(vectors)
        layers = next(iter(stacks.values()))
        # Names alone do not tell whether the model has more layers than these.
        return replace(config, layers=sorted(layers)) if all(own == layers for own in stacks.values()) else config
    except ValueError:
        kind, dtypes = kind_of(source, vectors), {own.dtype for parts in vectors.values() for own in parts.values()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        return RedConfig(kind=kind, sites=tuple(re.sub(r"([*?[])", r"[\1]", site) for site in vectors), dtype=dtype)


def _once(config: RedConfig, vectors: SiteTensors) -> SiteTensors:
    """Vectors that all sites of a width share: PEFT writes them for each, and our own form for the first."""
    kind = config.edit_kind
    if not kind.shared:
        return vectors
    kept: SiteTensors = {}
    for site, parts in vectors.items():
        if not any(_same(parts, other) for other in kept.values()):
            kept[site] = parts
    return kept


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[part], second[part]) for part in first)


def _inner_prefix(vectors: SiteTensors) -> str:
    """What the authors' names would leave out: the name of the base model in front of a stack of layers."""
    first = {site.partition(".")[0] for site in vectors}
    return "" if len(first) > 1 or first & _KEPT else next(iter(first))
