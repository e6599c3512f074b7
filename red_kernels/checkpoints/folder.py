"""The files of `rk.save_edits`: their content, their checks, and the pairing of edits with a trained head.

`red_edits.safetensors` contains the vectors, and in its metadata the description. This one file is the saved state: it
is complete or absent. A trained head has its own file, and both have the same mark. The head is written first, under a
name with the mark. Renaming the edits into place makes both valid at once. Then the head gets its plain name. A reader
takes the head with the mark of the edits, under either name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .._version import __version__
from ..edits.config import RedConfig
from ..edits.kinds import kind_named
from ..support.files import locked
from ..support.text import listed
from .peft_names import beside_files, foreign_adapter
from .vectors import SiteTensors, checked_tensor, collect, split_key

__all__ = [
    "CONFIG_NAME",
    "HEAD_NAME",
    "TENSORS_NAME",
    "Base",
    "Head",
    "MissingHead",
    "OwnFound",
    "Saved",
    "config_of",
    "is_own_folder",
    "make_saved",
    "marked_head",
    "read_description",
    "read_file",
    "read_folder",
    "remove_saved",
    "stale_files",
    "tensors_file",
]

FORMAT = "red_kernels edits"
FORMAT_VERSION = 1
TENSORS_NAME = "red_edits.safetensors"
HEAD_NAME = "red_head.safetensors"  # other trained parameters of a run, by the model's names
CONFIG_NAME = "red_config.json"  # the description, in folders of earlier versions

_BASE_ENTRIES = ("base_model_name", "base_model_revision", "base_weights", "base_architecture")  # fields of Base
_DESCRIPTION = "red_kernels"  # the metadata key of the description, and of a head's data
_MARK = re.compile(r"[0-9a-f]{32}")
_MARKED_HEAD = re.compile(r"red_head\.[0-9a-f]{32}\.safetensors")
_TRIES = 3  # to read both files while others write; then once more under the writers' lock


class MissingHead(FileNotFoundError):
    """The folder's edits were saved with a head, but its file is missing."""


class _OtherHead(ValueError):
    """The head is of another save."""


class _NoDescription(FileNotFoundError):
    """The edits contain no description, and there is none next to them."""


@dataclass(frozen=True)
class Head:
    """The trained parameters beside the edits.

    Attributes:
        values: by the names of the model's parameters.
        labels: the names of the labels by their numbers, if the model's config has them.
        architecture: the class of the model.
    """

    values: dict[str, torch.Tensor]
    labels: dict[int, str] | None = None
    architecture: str | None = None


@dataclass(frozen=True)
class Base:
    """The base model of edits.

    Attributes:
        name: as transformers loaded it.
        revision: the commit of its repository on the hub.
        weights: a digest of some of its weights, which identifies a copy in another folder.
        architecture: the class of the model.
    """

    name: str | None = None
    revision: str | None = None
    weights: str | None = None
    architecture: str | None = None

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Base:
        """The base model of a description; files of earlier versions have fewer fields."""
        return cls(*map(description.get, _BASE_ENTRIES))


@dataclass(frozen=True)
class Saved:
    """The data to write. `contents` gives the files in the order of their renames."""

    tensors: dict[str, torch.Tensor]
    description: dict[str, Any]
    head: bytes | None = None

    @property
    def mark(self) -> str | None:
        """The mark that edits and head share; None without a head."""
        mark = self.description["head"]
        assert mark is None or isinstance(mark, str)
        return mark

    @property
    def names(self) -> tuple[str, ...]:
        """The final files."""
        return (TENSORS_NAME,) if self.head is None else (TENSORS_NAME, HEAD_NAME)

    def contents(self, folder: Path) -> dict[str, bytes]:
        """File name to content.

        A head without a mark in the folder is recorded as not belonging to these edits, and an adapter that PEFT saved
        there as older than them.
        """
        description = {**self.description, "other_adapter": foreign_adapter(folder)}
        if self.head is None:
            with contextlib.suppress(OSError):
                description["stale_head"] = _digest((folder / HEAD_NAME).read_bytes())
        edits = _file(self.tensors, description)
        if self.head is None:
            return {TENSORS_NAME: edits}
        return {_marked_name(str(self.mark)): self.head, TENSORS_NAME: edits}


def make_saved(config: RedConfig, vectors: SiteTensors, base: Base, prefix: str, head: Head | None = None) -> Saved:
    """The content of a folder of `save_edits`.

    Args:
        config: the config of the patch.
        vectors: site to part to tensor, on the CPU.
        base: the base model, as far as known.
        prefix: the prefix of the site names that the authors' names lack, for converting.
        head: the trained parameters beside the edits, on the CPU.
    """
    tensors = {
        f"{site}.red_edit.{part}": own.contiguous() for site, parts in vectors.items() for part, own in parts.items()
    }
    description: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "red_kernels_version": __version__,
        **dict(zip(_BASE_ENTRIES, astuple(base), strict=True)),
        "position": config.position,
        "kind": config.kind,
        "layers": None if config.layers is None else list(config.layers),
        "stacks": None if config.stacks is None else list(config.stacks),
        "site_patterns": None if config.sites is None else list(config.sites),
        "dtype": str(config.dtype).removeprefix("torch."),
        "inner_prefix": prefix,
        "sites": {
            site: {"width": kind_named(config.kind).width(parts), "vectors": list(parts)}
            for site, parts in vectors.items()
        },
        "head": None,
    }
    if head is None:
        return Saved(tensors, description)
    values = {name: own.contiguous() for name, own in head.values.items()}
    said = {"labels": head.labels, "architecture": head.architecture}
    # From the content, not random: saving the same again gives the same files.
    mark = _digest(_file(tensors, description) + _file(values, said))[:32]
    return Saved(tensors, {**description, "head": mark}, _file(values, {**said, "mark": mark}))


def stale_files(folder: Path, mark: str | None) -> list[Path]:
    """The files in a folder that do not belong to the state just saved with this mark, or with none."""
    found = [path for path in folder.iterdir() if _MARKED_HEAD.fullmatch(path.name)]
    found = [path for path in found if mark is None or path.name != _marked_name(mark)]
    if mark is None:
        found.append(folder / HEAD_NAME)
    return [*found, folder / CONFIG_NAME]


def remove_saved(folder: Path) -> None:
    """Remove the files of a save, and the folder if it is then empty. Raises OSError if that fails."""
    if not folder.is_dir():
        return
    # The edits first: without them and the adapter next to them, there is no state.
    for path in (*beside_files(folder), folder / TENSORS_NAME, *stale_files(folder, None)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def marked_head(folder: Path, mark: str) -> Path:
    """The name of a head from its writing until it gets its plain name."""
    return folder / _marked_name(mark)


@dataclass(frozen=True)
class OwnFound:
    """The content of a folder or a file of `save_edits`; `description` is None for a single file without one."""

    vectors: SiteTensors
    description: dict[str, Any] | None = None
    head: Head | None = None


def is_own_folder(folder: Path) -> bool:
    """Whether a folder contains a file of `save_edits`."""
    return (folder / TENSORS_NAME).exists() or (folder / CONFIG_NAME).exists()


def read_file(path: Path) -> OwnFound:
    """Read one file of vectors, with its description if it has one. Raises ValueError for a damaged or foreign one."""
    vectors, description = _read_own(path)
    return OwnFound(vectors, description)


def read_folder(folder: Path) -> OwnFound:
    """Read a folder of `save_edits`, all files of one save, while others may write to it.

    Raises:
        ValueError: a file is damaged, foreign, of an unknown version or of another save.
        FileNotFoundError: the edits, their description or their head is missing.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(MissingHead, _OtherHead, _NoDescription):
            return _read_once(folder)
    with locked(folder):
        return _read_once(folder)


def read_description(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The description in a folder or a single file, and its file. Raises as `read_folder` does."""
    if folder.is_file():
        description = read_file(folder).description
        if description is None:
            raise ValueError(f"{folder}: has no description of its edits; name the folder that save_edits wrote")
        return folder, description
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: {str(folder)!r} does not exist")
    if (folder / TENSORS_NAME).exists():
        for attempt in range(_TRIES):
            description = _read_own(folder / TENSORS_NAME)[1]
            if description is not None:
                return folder / TENSORS_NAME, description
            try:
                return folder / CONFIG_NAME, _read_config(folder)
            except _NoDescription:  # a writer may have replaced the former form by the new one
                if attempt == _TRIES - 1:
                    raise
    return folder / CONFIG_NAME, _read_config(folder)


def config_of(path: Path, description: Mapping[str, Any]) -> RedConfig:
    """The config of the patch for edits of this description. Raises ValueError, with the file's name."""
    patterns, layers = description["site_patterns"], description["layers"]
    try:
        return RedConfig(
            position=description["position"],
            kind=description["kind"],
            layers=None if layers is None else tuple(layers),
            dtype=getattr(torch, description["dtype"]),
            sites=None if patterns is None else tuple(patterns),
            stacks=description.get("stacks"),
        )
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: describes impossible edits: {error}") from error


def _read_once(folder: Path) -> OwnFound:
    path = folder / TENSORS_NAME
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {str(folder)!r} is not a complete folder of save_edits")
    vectors, description = _read_own(path)
    if description is None:
        description = _read_config(folder)
        _check_description(str(folder), f"{CONFIG_NAME} and {TENSORS_NAME}", description, vectors)
    return OwnFound(vectors, description, _read_head(folder, description))


def _read_head(folder: Path, description: Mapping[str, Any]) -> Head | None:
    plain = folder / HEAD_NAME
    mark = description.get("head")
    if isinstance(mark, str) and not plain.exists() and not marked_head(folder, mark).exists():
        raise MissingHead(f"{plain} does not exist; the edits in {str(folder)!r} were saved with a trained head")
    if isinstance(mark, str) and marked_head(folder, mark).exists():
        with contextlib.suppress(FileNotFoundError):  # it may be getting its plain name now
            return _parse_head(marked_head(folder, mark), marked_head(folder, mark).read_bytes())[0]
    try:
        content = plain.read_bytes()
    except FileNotFoundError:
        if isinstance(mark, str):
            raise MissingHead(f"{plain} does not exist; the edits beside it were saved with a trained head") from None
        return None
    if "head" in description and mark is None and _digest(content) == description.get("stale_head"):
        return None  # of a former save that ended before it was removed
    head, found = _parse_head(plain, content)
    if found is None or found == mark:  # a file without a mark, of an earlier version or made by hand, is accepted
        return head
    if "head" in description and mark is None:
        return None  # as above
    raise _OtherHead(
        f"{plain}: is of another save than {TENSORS_NAME} next to it; save both again, or name {TENSORS_NAME} itself "
        "to load the vectors alone"
    )


def _parse_head(path: Path, content: bytes) -> tuple[Head, str | None]:
    tensors, metadata = _parse(path, content)
    if not tensors:
        raise ValueError(f"{path}: is empty, expected a trained head")
    values = {name: checked_tensor(path, name, value) for name, value in tensors.items()}
    said = _loads(path, metadata.get(_DESCRIPTION, "{}"))
    labels = said.get("labels")
    if labels is None and "id2label" in metadata:  # of earlier versions
        labels = _loads(path, f'{{"labels": {metadata["id2label"]}}}')["labels"]
    mark, architecture = said.get("mark"), said.get("architecture")
    if not isinstance(mark, str | None) or not isinstance(architecture, str | None):
        raise ValueError(f"{path}: is damaged: the entries 'mark' and 'architecture' must be text")
    return Head(values, _labels(path, labels), architecture), mark


def _labels(path: Path, labels: object) -> dict[int, str] | None:
    if labels is None:
        return None
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels.values()):
        raise ValueError(f"{path}: is damaged: its labels must map numbers to text, got {str(labels)[:100]}")
    numbers = [str(number) for number in range(len(labels))]
    if set(labels) != set(numbers):
        raise ValueError(f"{path}: is damaged: its labels must be numbered from 0, got {listed(list(labels))}")
    return {int(number): labels[number] for number in numbers}


def _read_own(path: Path) -> tuple[SiteTensors, dict[str, Any] | None]:
    tensors, metadata = _parse(path, path.read_bytes())
    vectors = collect(path, tensors, split_key)
    if _DESCRIPTION not in metadata:
        return vectors, None
    description = _loads(path, metadata[_DESCRIPTION])
    _check_entries(path, description)
    _check_description(str(path), "its description and its vectors", description, vectors)
    return vectors, description


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise _NoDescription(
            f"{path} does not exist, and {TENSORS_NAME} contains no description: {str(folder)!r} is not a complete "
            "folder of save_edits"
        ) from None
    description = _loads(path, content)
    _check_entries(path, description)
    return description


def _parse(path: Path, content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file."""
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return tensors, header.get("__metadata__") or {}
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        raise ValueError(f"{path}: is damaged or no safetensors file: {error}") from error


def _file(tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any]) -> bytes:
    return tensors_file(tensors, {_DESCRIPTION: json.dumps(said)})


def tensors_file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with entries in its metadata; equal content gives equal bytes.

    The library itself writes the metadata in random order.
    """
    plain = safetensors.torch.save(dict(tensors))
    start = 8 + int.from_bytes(plain[:8], "little")
    metadata = {"format": "pt", **metadata}
    header = json.dumps({"__metadata__": metadata, **json.loads(plain[8:start])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[start:]


def _loads(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'{path}: is not a description of edits (no "format": {FORMAT!r})')
    return found


def _check_entries(path: Path, description: dict[str, Any]) -> None:
    if description.get("format") != FORMAT:
        raise ValueError(f'{path}: is not a description of edits (no "format": {FORMAT!r})')
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format version {description.get('format_version')!r}, expected {FORMAT_VERSION} for this "
            "version of red_kernels"
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
    # Files of earlier versions lack some.
    if not isinstance(description.get("stacks"), list | None):
        raise ValueError(f"{path}: the entry 'stacks' is of the wrong type")
    for key in ("inner_prefix", "head", "stale_head", "other_adapter", *_BASE_ENTRIES):
        if not isinstance(description.get(key), str | None):
            raise ValueError(f"{path}: the entry {key!r} is of the wrong type")
    mark = description.get("head")
    if mark is not None and not _MARK.fullmatch(mark):  # it becomes part of a file's name
        raise ValueError(f"{path}: the entry 'head' is {mark[:100]!r}, expected 32 hexadecimal digits")
    if not isinstance(getattr(torch, description["dtype"], None), torch.dtype):
        raise ValueError(f"{path}: {description['dtype']!r} is not a dtype of torch")


def _check_description(where: str, what: str, description: dict[str, Any], vectors: SiteTensors) -> None:
    described = {
        site: entry.get("vectors") if isinstance(entry, dict) else None for site, entry in description["sites"].items()
    }
    found = {site: list(parts) for site, parts in vectors.items()}
    different = [site for site in {**described, **found} if described.get(site) != found.get(site)]
    if different:
        raise ValueError(f"{where}: {what} do not match; they differ at {listed(different)}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _marked_name(mark: str) -> str:
    stem, _, end = HEAD_NAME.partition(".")
    return f"{stem}.{mark}.{end}"
