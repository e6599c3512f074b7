"""Saving the edits of a patched model, and loading them back, the RED authors' files included.

A saved folder holds two small files:

- `red_edits.safetensors`: one tensor `(width,)` per vector, named as in the model's `state_dict`:
  `<site>.red_edit.scale`, `<site>.red_edit.bias`;
- `red_config.json`: the format's version, the base model's name, the position, kind and sites of the edits, which is
  what `saved_config` needs to patch another copy of the base model the same way.

The authors' form is a `torch.save`d dict, `delta_vector.pth`, with `<site>.delta_vector.activation_scaling` and
`<site>.delta_vector.activation_bias` of shape `[1, width]` (RED, arXiv 2402.15179).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from ._files import write_files
from ._site_names import match_sites
from ._version import __version__
from .config import RedConfig
from .patch import edit_config, edit_parameters
from .report import listed

__all__ = ["LoadReport", "load_edits", "save_edits", "saved_config"]

FORMAT = "red_kernels edits"
FORMAT_VERSION = 1
TENSORS_NAME = "red_edits.safetensors"
CONFIG_NAME = "red_config.json"
HEAD_NAME = "red_head.safetensors"  # what else a run has trained, by the model's names; integrations write and read it
AUTHORS_NAME = "delta_vector.pth"

_OWN_KEY = re.compile(r"(?P<site>.+)\.red_edit\.(?P<part>scale|bias)")
_AUTHORS_KEY = re.compile(r"(?P<site>.+)\.delta_vector\.activation_(?P<part>scaling|bias)")
_AUTHORS_NORM_KEY = re.compile(r".+\.delta_vector\.activation_ln\.(weight|bias)")
_VECTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Vectors = dict[str, dict[str, torch.Tensor]]  # site -> "scale" | "bias" -> (width,)


@dataclass(frozen=True)
class LoadReport:
    """What `load_edits` did.

    Attributes:
        source: the file the vectors came from.
        loaded: checkpoint site to model site, for every site of which something was loaded.
        checkpoint_only: vectors in the checkpoint that have no place in the model, as `<site>.scale` or `<site>.bias`.
        model_only: vectors in the model that the checkpoint lacks; they keep their values.
    """

    source: Path
    loaded: dict[str, str]
    checkpoint_only: tuple[str, ...] = ()
    model_only: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{len(self.loaded)} sites loaded from {self.source}"
        if self.checkpoint_only:
            text += f"; in the checkpoint only: {listed(self.checkpoint_only)}"
        if self.model_only:
            text += f"; in the model only: {listed(self.model_only)}"
        return text


def save_edits(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Save the edits of a patched model: a safetensors file and a JSON file, a few hundred kilobytes.

    Both files are written to temporary names, synced and renamed: a crash leaves the former files or the new ones.

    Args:
        model: a model patched by `rk.patch`.
        folder: where to save; made if missing. Files of an earlier save are replaced, others left alone.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched, or its vectors are on the meta device and have no values.
        OSError: the folder cannot be written to (read-only, full, a file of that name); nothing is left behind.
    """
    config = edit_config(model)
    tensors: dict[str, torch.Tensor] = {}
    sites: dict[str, dict[str, Any]] = {}
    for site, parts in edit_parameters(model).items():
        for part, parameter in parts.items():
            if parameter.is_meta:
                raise ValueError(f"model: {site}.{part} is on the meta device and has no values to save")
            tensors[f"{site}.red_edit.{part}"] = parameter.detach().cpu().contiguous()
        sites[site] = {"width": next(iter(parts.values())).shape[-1], "vectors": sorted(parts, reverse=True)}
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "red_kernels_version": __version__,
        "base_model_name": _base_model_name(model),
        "position": config.position,
        "kind": config.kind,
        "layers": None if config.layers is None else list(config.layers),
        "site_patterns": None if config.sites is None else list(config.sites),
        "dtype": str(config.dtype).removeprefix("torch."),
        "sites": sites,
    }
    target = Path(folder)
    write_files(
        target,
        {
            TENSORS_NAME: safetensors.torch.save(tensors, metadata={"format": "pt"}),
            CONFIG_NAME: (json.dumps(description, indent=2) + "\n").encode(),
        },
    )
    return target


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


def load_edits(model: nn.Module, folder_or_file: str | os.PathLike[str], *, strict: bool = True) -> LoadReport:
    """Load edits into a patched model, after checking every name, shape and dtype.

    The values are copied into the model's own Parameters, on their devices and in their dtype: an optimizer made before
    goes on working. Until all checks have passed nothing is changed. Values are taken as they are, NaN and infinity
    included. Site names may differ from the model's by one prefix, the same for all (`encoder.layer.0...` in a file
    of the authors, `roberta.encoder.layer.0...` in a model with a head).

    Args:
        model: a model patched by `rk.patch`, at the position and kind of the checkpoint (`rk.saved_config`).
        folder_or_file: a folder made by `save_edits`, or with the authors' `delta_vector.pth`; or one such file
            (`.safetensors`, or anything `torch.load(weights_only=True)` reads).
        strict: with False, vectors without a partner are listed in the report instead of raising. A checkpoint of
            which nothing fits is an error all the same.

    Returns:
        A `LoadReport`.

    Raises:
        ValueError: the model is not patched; the file is damaged, foreign, of an unknown format version; a vector has
            another width or an integer dtype; the position differs; vectors without a partner (`strict`).
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
    source, vectors, description = _read(path)
    if description is not None and description["position"] != config.position:
        raise ValueError(
            f"{source}: holds edits at position {description['position']!r}, the model is patched at "
            f"{config.position!r}; patch it with rk.saved_config({str(path)!r})"
        )

    parameters = edit_parameters(model)
    mapping = match_sites(vectors, parameters)
    pairs: list[tuple[nn.Parameter, torch.Tensor]] = []
    checkpoint_only: list[str] = []
    filled: set[str] = set()
    for site, parts in vectors.items():
        own = parameters.get(mapping.get(site, ""), {})
        for part, value in parts.items():
            if part not in own:
                checkpoint_only.append(f"{site}.{part}")
                continue
            name = f"{mapping[site]}.{part}"
            _check_fits(source, name, value, own[part])
            pairs.append((own[part], value))
            filled.add(name)
    model_only = [f"{site}.{part}" for site, parts in parameters.items() for part in parts]
    model_only = [name for name in model_only if name not in filled]

    if not pairs:
        raise ValueError(
            f"{source}: none of its sites is edited in the model; in the checkpoint: {listed(checkpoint_only)}; "
            f"in the model: {listed(model_only)}"
        )
    if strict and (checkpoint_only or model_only):
        raise ValueError(
            f"{source}: does not fit the model; in the checkpoint only: {listed(checkpoint_only)}; in the model only: "
            f"{listed(model_only)}; patch the model alike, or pass strict=False to load what fits"
        )
    # Devices and dtypes are settled first, so that running out of memory cannot leave half of the edits loaded.
    staged = [(target, value.to(device=target.device, dtype=target.dtype)) for target, value in pairs]
    with torch.no_grad():
        for target, value in staged:
            target.copy_(value)
    loaded = {site: to for site, to in mapping.items() if any(f"{to}.{part}" in filled for part in vectors[site])}
    return LoadReport(source, loaded, tuple(checkpoint_only), tuple(model_only))


def _check_fits(source: Path, name: str, value: torch.Tensor, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise ValueError(f"model: {name} is on the meta device; give the model memory (to_empty) before loading edits")
    if value.shape != parameter.shape:
        raise ValueError(f"{source}: {name} has width {tuple(value.shape)}, the model's is {tuple(parameter.shape)}")


def _read(path: Path) -> tuple[Path, Vectors, dict[str, Any] | None]:
    """Read a folder or file of either form: the file's path, the vectors, and the description if there is one."""
    if path.is_dir():
        if (path / CONFIG_NAME).exists() or (path / TENSORS_NAME).exists():
            description = _read_description(path)
            vectors = _read_own(path / TENSORS_NAME)
            _check_description(path, description, vectors)
            return path / TENSORS_NAME, vectors, description
        if (path / AUTHORS_NAME).exists():
            return path / AUTHORS_NAME, _read_authors(path / AUTHORS_NAME), None
        raise FileNotFoundError(f"folder_or_file: {str(path)!r} holds neither {TENSORS_NAME} nor {AUTHORS_NAME}")
    if not path.exists():
        raise FileNotFoundError(f"folder_or_file: {str(path)!r} does not exist")
    if path.suffix == ".safetensors":
        return path, _read_own(path), None
    return path, _read_authors(path), None


def _read_own(path: Path) -> Vectors:
    content = path.read_bytes()
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        raise ValueError(f"{path}: is damaged or no safetensors file: {error}") from error
    return _collect(path, tensors, _OWN_KEY, ndim=1)


def _read_authors(path: Path) -> Vectors:
    with path.open("rb") as file:
        try:
            # Their files were saved from cuda:0; weights_only keeps a foreign pickle from running code.
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # as above
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path}: is damaged or no checkpoint that torch.load reads safely: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path}: expected a dict from names to tensors, got {type(state).__name__}")
    norms = [key for key in state if _AUTHORS_NORM_KEY.fullmatch(key)]
    if norms:
        raise ValueError(f"{path}: holds edits of kind 'ln' ({listed(norms)}), which cannot be loaded")
    return _collect(path, state, _AUTHORS_KEY, ndim=2)


def _collect(path: Path, tensors: Mapping[str, Any], pattern: re.Pattern[str], ndim: int) -> Vectors:
    """Sort the tensors of a file by site, as `(width,)` vectors; any name, type or shape out of form is an error."""
    vectors: Vectors = {}
    matches = {key: pattern.fullmatch(key) for key in tensors}
    foreign = [key for key, match in matches.items() if match is None]
    if foreign or not tensors:
        raise ValueError(f"{path}: is not a file of edits: " + (f"has {listed(foreign)}" if foreign else "it is empty"))
    for key, match in matches.items():
        assert match is not None  # foreign names were refused above
        value = tensors[key]
        if not isinstance(value, torch.Tensor) or value.dtype not in _VECTOR_DTYPES:
            got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"{path}: {key} is {got}, expected a floating-point tensor of 16, 32 or 64 bits")
        if value.ndim != ndim or (ndim == 2 and value.shape[0] != 1):
            expected = "(width,)" if ndim == 1 else "[1, width]"
            raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}, expected {expected}")
        part = "scale" if match["part"] == "scaling" else match["part"]
        vectors.setdefault(match["site"], {})[part] = value.detach().reshape(-1)
    # Files keep no useful order; reports go by layer, scale before bias.
    return {site: dict(sorted(vectors[site].items(), reverse=True)) for site in sorted(vectors, key=_by_layer)}


def _by_layer(site: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in site.split(".")]


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
    if not isinstance(getattr(torch, description["dtype"], None), torch.dtype):
        raise ValueError(f"{path}: {description['dtype']!r} is no dtype of torch")
    return description


def _check_description(folder: Path, description: dict[str, Any], vectors: Vectors) -> None:
    described = {
        site: entry.get("vectors") if isinstance(entry, dict) else None for site, entry in description["sites"].items()
    }
    found = {site: sorted(parts, reverse=True) for site, parts in vectors.items()}
    different = [site for site in {**described, **found} if described.get(site) != found.get(site)]
    if different:
        raise ValueError(
            f"{folder}: {CONFIG_NAME} and {TENSORS_NAME} do not belong together; they differ at {listed(different)}"
        )


def _base_model_name(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
