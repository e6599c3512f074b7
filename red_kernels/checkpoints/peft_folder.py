"""Reading a folder of a RED adapter that PEFT has saved, without PEFT."""

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
from ..edits.kinds import Kind, is_kind, kind_named
from ..models import ON_INPUT
from ..support.parse import read_json, shown
from ..support.text import listed
from .folder import Base, Head, Saved, make_saved
from .found import Found
from .infer import config_from_names, kind_of, layers_by_stack
from .peft_names import CONFIG_NAME, PREFIX, TENSORS_NAMES, named_by
from .vectors import SiteTensors, checked_tensor, collect, load_pickled, split_key
from .wrapped_names import unwrapped

__all__ = ["PeftFolder", "read_peft", "read_peft_folder"]

_KEPT = {"model", "transformer", "encoder", "decoder", "layers", "layer", "h", "blocks"}  # in the authors' names


@dataclass(frozen=True)
class PeftFolder:
    """The content of a folder of a RED adapter.

    Attributes:
        config: the config for a patch; by a position if the sites are those of one, else by their names.
        vectors: site to part to vector `(width,)`.
        head: the trained parameters of `modules_to_save`, by the model's names.
        base: the base model, as far as known.
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
    rest = {key: checked_tensor(source, key, value) for key, value in tensors.items() if split_key(key) is None}
    odd = [key for key in rest if ".red_edit." in key]
    if odd:
        raise ValueError(f"{source}: has {listed(odd)}, which are no vectors of RED")
    edits = {key: value for key, value in tensors.items() if key not in rest}
    head = {unwrapped(key): value for key, value in rest.items()}  # PEFT saves an edited output layer's weights too
    vectors = collect(source, edits, split_key)
    name, revision = (content.get(key) for key in ("base_model_name_or_path", "revision"))
    base = Base(*(value if isinstance(value, str) and value else None for value in (name, revision)))
    config = _config(source, content, vectors)
    return PeftFolder(config, _once(config, vectors), head, base, source)


def read_peft(folder: str | os.PathLike[str]) -> Found:
    """The content of PEFT's folder in the form of `rk.save_edits`. Raises as `read_peft_folder`."""
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


def _config(source: Path, content: Mapping[str, Any], vectors: SiteTensors) -> RedConfig:
    """By position, if the names determine one, so that the edits fit a model with a head around it; else by names."""
    kind = _kind(source, content, vectors)
    dtypes = {own.dtype for parts in vectors.values() for own in parts.values()}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    target, position = content.get("target_modules"), content.get("position")
    if target is None and position is not None:  # of save_edits or convert: PEFT itself writes the modules
        layers = content.get("layers_to_transform")
        try:
            layers = [layers] if isinstance(layers, int) else layers
            return RedConfig(position, kind, layers, dtype, stacks=content.get("stacks"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source.with_name(CONFIG_NAME)}: describes edits that cannot be: {error}") from error
    sites = _all_sites(source, target, kind_named(kind), vectors)
    try:
        config = config_from_names(source, sites)
        stacks = layers_by_stack(sites)
        layers = next(iter(stacks.values()))
        if all(own == layers for own in stacks.values()):
            config = replace(config, layers=sorted(layers))  # names do not tell whether the model has more layers
        config = replace(config, kind=kind, stacks=content.get("stacks"))
    except (ValueError, TypeError):
        config = RedConfig(kind=kind, sites=_globs(sites), dtype=dtype)
    if config.edit_kind.on_input:
        return config
    inputs = _inputs(source, content, sites)
    by_position = config.sites is None and not set(config.places).isdisjoint(ON_INPUT)
    if by_position and not inputs:  # the names of IA3's sites, and the outputs of all of them
        return RedConfig(kind=kind, sites=_globs(sites), dtype=dtype)
    if inputs and not (by_position and _are_ffn(source, inputs)):
        raise ValueError(
            f"{source.with_name(CONFIG_NAME)}: edits the input of {listed(list(inputs))}, which PEFT's form alone can "
            "say; load it by peft.PeftModel.from_pretrained"
        )
    return config


def _kind(source: Path, content: Mapping[str, Any], vectors: SiteTensors) -> str:
    """The kind that the config names: several have the same parts but another number."""
    name = content.get("kind")
    if not is_kind(name):
        return kind_of(source, vectors)
    kind = kind_named(str(name))
    for site, parts in vectors.items():
        try:
            if set(parts) != set(kind.names):
                raise ValueError(f"are {listed(list(parts))}")
            kind.width(parts)
        except ValueError as error:
            where = source.with_name(CONFIG_NAME)
            raise ValueError(f"{where}: says kind {kind.name!r}, but the vectors of {site} {error}") from None
    return kind.name


def _all_sites(source: Path, target: Any, kind: Kind, vectors: SiteTensors) -> SiteTensors:
    """The vectors by all sites: a file of ours has shared vectors only at the first of their sites."""
    if not kind.shared or not isinstance(target, str):
        return vectors
    names = [re.sub(r"\\(.)", r"\1", name) for name in target.split("|")]
    if "|".join(map(re.escape, names)) == target:
        first = next(iter(vectors.values()))
        return {name: vectors.get(name, first) for name in names}
    shapes = [tuple(own.shape for own in parts.values()) for parts in vectors.values()]
    if len(set(shapes)) == len(shapes):  # as of vectors that are held once
        raise ValueError(
            f"{source.with_name(CONFIG_NAME)}: names the sites by the expression {shown(target)}, and the vectors do "
            "not say which modules that stands for; load it by peft.PeftModel.from_pretrained"
        )
    return vectors


def _inputs(source: Path, content: Mapping[str, Any], sites: SiteTensors) -> dict[str, dict[str, torch.Tensor]]:
    """The sites whose input is edited."""
    chosen = content.get("feedforward_modules") or ()
    try:
        return {site: parts for site, parts in sites.items() if named_by(chosen, site)}
    except (TypeError, re.error) as error:
        where = source.with_name(CONFIG_NAME)
        raise ValueError(f"{where}: the entry 'feedforward_modules' is {shown(chosen)}: {error}") from error


def _are_ffn(source: Path, sites: SiteTensors) -> bool:
    try:
        return config_from_names(source, sites).position == "ffn"
    except ValueError:
        return False


def _globs(sites: SiteTensors) -> tuple[str, ...]:
    return tuple(re.sub(r"([*?[])", r"[\1]", site) for site in sites)


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
    """The prefix that the authors' names omit: the base model's name in front of a stack of layers."""
    first = {site.partition(".")[0] for site in vectors}
    return "" if len(first) > 1 or first & _KEPT else next(iter(first))
