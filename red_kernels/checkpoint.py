"""Saving the edits of a patched model, and loading them back, the RED authors' files included.

A saved folder holds two small files:

- `red_edits.safetensors`: one tensor `(width,)` per vector, named as in the `state_dict` of a model with one edit:
  `<site>.red_edit.scale`, `<site>.red_edit.bias`, and for kind `ln` also `norm_weight` and `norm_bias`;
- `red_config.json`: the format's version, the base model's name, the position, kind and sites of the edits, which is
  what `saved_config` needs to patch another copy of the base model the same way.

The authors' form is read and written by `authors.py`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ._files import write_files
from ._sharded import placed_as, refuse_partitioned, whole, write_from_one
from ._vectors import PARTS, SiteTensors, collect
from ._version import __version__
from ._wrapped_names import inner_model, match_wrapped, renamed_sites
from .authors import CLASSIFIER_NAME, HEAD, VECTORS_NAME, classifier_of, inner_prefix, read_classifier, read_vectors
from .config import RedConfig
from .edits import add_edit, edit_names
from .patch import edit_config, edit_parameters
from .pretrained import beside_pretrained
from .report import listed

__all__ = ["LoadReport", "load_edits", "save_edits", "saved_config"]

FORMAT = "red_kernels edits"
FORMAT_VERSION = 1
TENSORS_NAME = "red_edits.safetensors"
CONFIG_NAME = "red_config.json"
HEAD_NAME = "red_head.safetensors"  # what else a run has trained, by the model's names; integrations write and read it

_KEY = re.compile(rf"(?P<site>.+)\.red_edit\.(?P<part>{'|'.join(PARTS)})")


@dataclass(frozen=True)
class LoadReport:
    """What `load_edits` did.

    Attributes:
        source: the file the vectors came from.
        loaded: checkpoint site to model site, for every site of which something was loaded.
        checkpoint_only: what the checkpoint holds and the model has no place for: vectors as `<site>.<part>`, a
            classifier head as `classifier.<parameter>`.
        model_only: vectors in the model that the checkpoint lacks; they keep their values.
        head: the parameters of the classifier head that were loaded, as `classifier.<parameter>`.
    """

    source: Path
    loaded: dict[str, str]
    checkpoint_only: tuple[str, ...] = ()
    model_only: tuple[str, ...] = ()
    head: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{len(self.loaded)} sites loaded from {self.source}"
        if self.head:
            text += f"; the classifier head: {listed(self.head)}"
        if self.checkpoint_only:
            text += f"; in the checkpoint only: {listed(self.checkpoint_only)}"
        if self.model_only:
            text += f"; in the model only: {listed(self.model_only)}"
        return text


def save_edits(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Save an edit of a patched model: a safetensors file and a JSON file, a few hundred kilobytes.

    Both files are written to temporary names, synced and renamed: a crash leaves the former files or the new ones.
    Where each process holds a part of the vectors (FSDP2), all of them have to call this: the parts are gathered, and
    the first process writes. Where each has all of them (DDP), call it in one.

    Args:
        model: a model patched by `rk.patch`.
        folder: where to save; made if missing. Files of an earlier save are replaced, others left alone.
        name: which of the model's edits; None for the active one. The files do not depend on it.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched or has no edit of this name; its vectors are on the meta device and have no
            values.
        OSError: the folder cannot be written to (read-only, full, a file of that name); nothing is left behind.
    """
    return _save(model, folder, edit_config(model), name)


@beside_pretrained
def _save(model: nn.Module, folder: str | os.PathLike[str], config: RedConfig, name: str | None = None) -> Path:
    """As `save_edits`, of a patched model or of a part of one."""
    parameters = edit_parameters(model, name)
    vectors = renamed_sites(model, _values(parameters))
    target = Path(folder)
    content = own_files(config, vectors, base_model_name(model), inner_prefix(inner_model(model)[1], vectors))
    every = [own for parts in parameters.values() for own in parts.values()]
    write_from_one(every, lambda: write_files(target, content))
    return target


def _values(parameters: dict[str, dict[str, nn.Parameter]]) -> SiteTensors:
    for site, parts in parameters.items():
        for part, parameter in parts.items():
            if parameter.is_meta:
                raise ValueError(f"model: {site}.{part} is on the meta device and has no values to save")
            refuse_partitioned(f"{site}.{part}", parameter)
    return {site: {part: whole(own).cpu() for part, own in parts.items()} for site, parts in parameters.items()}


def own_files(config: RedConfig, vectors: SiteTensors, base_model: str | None, prefix: str) -> dict[str, bytes]:
    """The files of a folder of `save_edits`, by name.

    Args:
        config: what the model is patched with.
        vectors: site to part to tensor, on the CPU.
        base_model: the base model's name, if it has one.
        prefix: what the site names have in front of the authors' names, for converting.
    """
    tensors = {
        f"{site}.red_edit.{part}": own.contiguous() for site, parts in vectors.items() for part, own in parts.items()
    }
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "red_kernels_version": __version__,
        "base_model_name": base_model,
        "position": config.position,
        "kind": config.kind,
        "layers": None if config.layers is None else list(config.layers),
        "site_patterns": None if config.sites is None else list(config.sites),
        "dtype": str(config.dtype).removeprefix("torch."),
        "inner_prefix": prefix,
        "sites": {
            site: {"width": next(iter(parts.values())).shape[-1], "vectors": list(parts)}
            for site, parts in vectors.items()
        },
    }
    return {
        TENSORS_NAME: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        CONFIG_NAME: (json.dumps(description, indent=2) + "\n").encode(),
    }


def saved_config(folder: str | os.PathLike[str]) -> RedConfig:
    """Read from a folder made by `save_edits` how the model has to be patched before `load_edits`.

    `rk.patch(model, rk.saved_config(folder)); rk.load_edits(model, folder)` brings the edits to a fresh base model.

    Raises:
        FileNotFoundError: the folder, or the `red_config.json` in it, does not exist.
        ValueError: the file is damaged, of another program, or of a newer format.
    """
    description = _read_description(Path(folder))
    patterns = description["site_patterns"]
    layers = description["layers"]
    return RedConfig(
        position=description["position"],
        kind=description["kind"],
        layers=None if layers is None else tuple(layers),
        dtype=getattr(torch, description["dtype"]),
        sites=None if patterns is None else tuple(patterns),
    )


def load_edits(
    model: nn.Module, folder_or_file: str | os.PathLike[str], name: str | None = None, *, strict: bool = True
) -> LoadReport:
    """Load edits into a patched model, after checking every name, shape and dtype.

    The values are copied into the model's own Parameters, on their devices and in their dtype: an optimizer made before
    goes on working, and so does a compiled model. Until all checks have passed nothing is changed. Values are taken as
    they are, NaN and infinity included. Site names may differ from the model's by one prefix, the same for all
    (`encoder.layer.0...` in a file of the authors, `roberta.encoder.layer.0...` in a model with a head).

    A folder in the authors' form may hold a `classifier.pth`; its values are copied into the model's module
    `classifier`. To load the vectors without it, name `delta_vector.pth` itself.

    Args:
        model: a model patched by `rk.patch`, at the position and kind of the checkpoint (`rk.saved_config`).
        folder_or_file: a folder made by `save_edits`, or with the authors' `delta_vector.pth`; or one such file
            (`.safetensors`, or anything `torch.load(weights_only=True)` reads).
        name: which of the model's edits to load into; None for the active one. An edit that does not exist yet is
            added, and the active one stays active.
        strict: with False, vectors without a partner are listed in the report instead of raising. A checkpoint of
            which nothing fits is an error all the same.

    Returns:
        A `LoadReport`.

    Raises:
        ValueError: the model is not patched; the file is damaged, foreign, of an unknown format version; a vector or
            the head has another width or an integer dtype; the position differs; something without a partner
            (`strict`); `name` cannot be the name of an edit.
        FileNotFoundError: there is no such file, or no file of edits in the folder.
    """
    path = Path(folder_or_file)
    try:
        config = edit_config(model)
    except ValueError as error:
        raise ValueError(
            "model: is not patched, so it has no vectors to load into; for a folder made by save_edits run "
            "rk.patch(model, rk.saved_config(folder)) first, for other files rk.patch(model, rk.RedConfig(...))"
        ) from error
    found = read(path)
    source, description = found.source, found.description
    if description is not None and description["position"] != config.position:
        raise ValueError(
            f"{source}: holds edits at position {description['position']!r}, the model is patched at "
            f"{config.position!r}; patch it with rk.saved_config({str(path)!r})"
        )
    # An edit that is still to be added will look like those that are there.
    names = edit_names(model)
    new = name is not None and name not in names
    parameters = edit_parameters(model, next(iter(names), None) if new else name)
    mapping = match_wrapped(model, found.vectors, parameters)
    fitting: list[tuple[str, str, torch.Tensor]] = []
    checkpoint_only: list[str] = []
    for site, parts in found.vectors.items():
        to = mapping.get(site, "")
        for part, value in parts.items():
            if part not in parameters.get(to, {}):
                checkpoint_only.append(f"{site}.{part}")
                continue
            _check_fits(source, f"{to}.{part}", value, parameters[to][part])
            fitting.append((to, part, value))
    filled = {(site, part) for site, part, _ in fitting}
    model_only = [f"{site}.{part}" for site, own in parameters.items() for part in own if (site, part) not in filled]
    if not fitting:
        raise ValueError(
            f"{source}: none of its sites is edited in the model; in the checkpoint: {listed(checkpoint_only)}; "
            f"in the model: {listed(model_only)}"
        )
    pairs, without_place = _head_pairs(model, found)
    checkpoint_only += without_place
    if strict and (checkpoint_only or model_only):
        advice = "patch the model alike, or pass strict=False to load what fits"
        if without_place:
            advice = f"name {VECTORS_NAME} itself to load the vectors alone, or pass strict=False to load what fits"
        raise ValueError(
            f"{source}: does not fit the model; in the checkpoint only: {listed(checkpoint_only)}; in the model only: "
            f"{listed(model_only)}; {advice}"
        )
    # Devices and dtypes are settled first, so that running out of memory cannot leave half of the edits loaded.
    staged = [(own, placed_as(value, own)) for own, value in pairs]
    moved = [placed_as(value, parameters[site][part]) for site, part, value in fitting]
    if new:
        assert name is not None
        add_edit(model, name)
        parameters = edit_parameters(model, name)
    staged += [(parameters[site][part], value) for (site, part, _), value in zip(fitting, moved, strict=True)]
    with torch.no_grad():
        for target, value in staged:
            target.copy_(value)
    loaded = {site: to for site, to in mapping.items() if any((to, part) in filled for part in found.vectors[site])}
    head = tuple(f"{HEAD}.{key}" for key in found.head) if pairs else ()
    return LoadReport(source, loaded, tuple(checkpoint_only), tuple(model_only), head)


@dataclass(frozen=True)
class Found:
    """What a folder or a file of edits holds.

    Attributes:
        source: the file of the vectors.
        vectors: site to part to tensor `(width,)`.
        description: the content of `red_config.json`, if there is one.
        head: the authors' classifier head, parameter name to value; empty where there is none.
    """

    source: Path
    vectors: SiteTensors
    description: dict[str, Any] | None = None
    head: dict[str, torch.Tensor] = field(default_factory=dict)


def read(path: Path) -> Found:
    """Read a folder or file of either form. Raises as `load_edits` does."""
    if path.is_dir():
        if (path / CONFIG_NAME).exists() or (path / TENSORS_NAME).exists():
            description = _read_description(path)
            vectors = _read_own(path / TENSORS_NAME)
            _check_description(path, description, vectors)
            return Found(path / TENSORS_NAME, vectors, description)
        if (path / VECTORS_NAME).exists():
            classifier = path / CLASSIFIER_NAME
            head = read_classifier(classifier) if classifier.exists() else {}
            return Found(path / VECTORS_NAME, read_vectors(path / VECTORS_NAME), None, head)
        raise FileNotFoundError(f"folder_or_file: {str(path)!r} holds neither {TENSORS_NAME} nor {VECTORS_NAME}")
    if not path.exists():
        raise FileNotFoundError(f"folder_or_file: {str(path)!r} does not exist")
    if path.suffix == ".safetensors":
        return Found(path, _read_own(path))
    return Found(path, read_vectors(path))


def _check_fits(source: Path, name: str, value: torch.Tensor, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise ValueError(f"model: {name} is on the meta device; give the model memory (to_empty) before loading edits")
    refuse_partitioned(name, parameter)
    if value.shape != parameter.shape:
        raise ValueError(f"{source}: {name} has width {tuple(value.shape)}, the model's is {tuple(parameter.shape)}")


def _head_pairs(model: nn.Module, found: Found) -> tuple[list[tuple[nn.Parameter, torch.Tensor]], list[str]]:
    """The parameters of the model's classifier head with their values from the file; and what has no place in it."""
    if not found.head:
        return [], []
    own = classifier_of(model)
    if not own:
        return [], [f"{HEAD}.{key}" for key in found.head]
    source = found.source.with_name(CLASSIFIER_NAME)
    if own.keys() != found.head.keys():
        raise ValueError(
            f"{source}: holds {listed(sorted(found.head))}, the model's classifier head has {listed(sorted(own))}; "
            f"name {VECTORS_NAME} itself to load the vectors alone"
        )
    for key, value in found.head.items():
        if own[key].is_meta:
            raise ValueError(f"model: {HEAD}.{key} is on the meta device; give the model memory before loading")
        refuse_partitioned(f"{HEAD}.{key}", own[key])
        if value.shape != own[key].shape:
            raise ValueError(
                f"{source}: {key} has shape {tuple(value.shape)}, the model's classifier head {tuple(own[key].shape)}; "
                f"a model with as many labels is needed, or name {VECTORS_NAME} itself to load the vectors alone"
            )
    return [(own[key], value) for key, value in found.head.items()], []


def _read_own(path: Path) -> SiteTensors:
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        raise ValueError(f"{path}: is damaged or no safetensors file: {error}") from error
    return collect(path, tensors, _split)


def _split(key: str) -> tuple[str, str] | None:
    match = _KEY.fullmatch(key)
    return None if match is None else (match["site"], match["part"])


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {str(folder)!r} is not a complete folder of save_edits")
    try:
        description = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: is damaged: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ValueError(f'{path}: is not a description of edits (no "format": {FORMAT!r})')
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format version {description.get('format_version')!r}, this version of red_kernels reads "
            f"{FORMAT_VERSION}"
        )
    expected: dict[str, tuple[type, ...]] = {
        "position": (str,),
        "kind": (str,),
        "layers": (list, type(None)),
        "site_patterns": (list, type(None)),
        "dtype": (str,),
        "sites": (dict,),
    }
    for key, types in expected.items():
        if key not in description or not isinstance(description[key], types):
            raise ValueError(f"{path}: the entry {key!r} is missing or of the wrong type")
    if not isinstance(description.get("inner_prefix", ""), str):  # files of the first versions lack it
        raise ValueError(f"{path}: the entry 'inner_prefix' is of the wrong type")
    if not isinstance(getattr(torch, description["dtype"], None), torch.dtype):
        raise ValueError(f"{path}: {description['dtype']!r} is no dtype of torch")
    return description


def _check_description(folder: Path, description: dict[str, Any], vectors: SiteTensors) -> None:
    described = {
        site: entry.get("vectors") if isinstance(entry, dict) else None for site, entry in description["sites"].items()
    }
    found = {site: list(parts) for site, parts in vectors.items()}
    different = [site for site in {**described, **found} if described.get(site) != found.get(site)]
    if different:
        raise ValueError(
            f"{folder}: {CONFIG_NAME} and {TENSORS_NAME} do not belong together; they differ at {listed(different)}"
        )


def base_model_name(model: nn.Module) -> str | None:
    """The name that transformers loaded a model by, if any."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
