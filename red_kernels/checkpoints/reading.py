"""Reading edits of every form: a folder of `rk.save_edits`, of PEFT, of the authors, of a run, a file, or a hub id."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..edits.config import RedConfig
from .authors import VECTORS_NAME, read_authors, read_vectors
from .folder import TENSORS_NAME, config_of, is_own_folder, read_description, read_file, read_folder
from .found import Found
from .hub import fetched
from .peft_folder import read_peft, read_peft_folder
from .peft_names import foreign_adapter, is_peft_folder

__all__ = ["RUN_EDITS", "located", "located_folder", "read", "read_described", "saved_config"]

RUN_EDITS = "edits"  # the folder of edits in the folder of a run of `red-kernels finetune`


def located(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder or the file of a name.

    Args:
        source: a file or a folder; the folder of a run, whose edits are in `edits/`; or, as text, the id of a
            repository on the hub, which is fetched into the hub's cache.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: the file, folder or repository does not exist.
        OSError: the hub cannot be reached.
        ValueError: a revision, but no repository.
    """
    path = fetched(source, revision)
    inner = path / RUN_EDITS
    return inner if path.is_dir() and not _has_edits(path) and _has_edits(inner) else path


def located_folder(folder: str | os.PathLike[str]) -> Path:
    """The local folder of `folder`. Raises FileNotFoundError if there is none."""
    place = located(Path(folder))
    if not place.is_dir():
        raise FileNotFoundError(f"folder: {str(folder)!r} is no folder; expected one that rk.save_edits wrote")
    return place


def read(path: Path) -> Found:
    """Read a folder or a file of `located`. Raises as `load_edits` does."""
    if path.is_dir():
        if is_own_folder(path):  # first: a folder of save_pretrained may have both
            own = read_folder(path)
            newer = _newer_adapter(path, own.description or {})
            return Found(path / TENSORS_NAME, own.vectors, own.description, trained=own.head, newer=newer)
        if is_peft_folder(path):
            return read_peft(path)
        if (path / VECTORS_NAME).exists():
            return Found(path / VECTORS_NAME, *read_authors(path))
        raise FileNotFoundError(
            f"folder_or_file: {str(path)!r} holds neither {TENSORS_NAME} nor {VECTORS_NAME}, nor an adapter of PEFT"
        )
    if not path.exists():
        raise FileNotFoundError(f"folder_or_file: {str(path)!r} does not exist")
    if path.suffix == ".safetensors":
        if path.name != TENSORS_NAME and is_peft_folder(path.parent):
            raise ValueError(f"folder_or_file: {str(path)!r} is a file of PEFT; name its folder {str(path.parent)!r}")
        own = read_file(path)
        return Found(path, own.vectors, own.description)
    return Found(path, read_vectors(path))


def read_described(path: Path, argument: str, source: str | os.PathLike[str]) -> Found:
    """The same for edits with a config. Raises ValueError for others, naming the argument."""
    found = read(path)
    if found.description is None:
        raise ValueError(
            f"{argument}: {os.fspath(source)!r} does not say where its edits belong; expected a folder with "
            f"{TENSORS_NAME}, which red-kernels convert makes of other forms"
        )
    return found


def saved_config(folder: str | os.PathLike[str], revision: str | None = None) -> RedConfig:
    """Read the config of saved edits, with which to patch the model before `load_edits`.

    `rk.patch(model, rk.saved_config(folder)); rk.load_edits(model, folder)` loads the edits into a fresh base model.

    Args:
        folder: the folder of `save_edits`, or the `red_edits.safetensors` in it; the folder of a run of
            `red-kernels finetune`; that of a RED adapter that PEFT has saved; or, as text, the id of a repository on
            the hub that holds one of these.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: the folder, the description in it, or the repository does not exist.
        OSError: the hub cannot be reached.
        ValueError: the file is damaged, of another program, of a newer format, or describes impossible edits.
    """
    path = located(folder, revision)
    if path.is_dir() and is_peft_folder(path) and not is_own_folder(path):
        return read_peft_folder(path).config
    return config_of(*read_description(path))


def _newer_adapter(folder: Path, description: Mapping[str, Any]) -> str:
    """What there is to say of a RED adapter that PEFT has saved into a folder of ours behind the last save."""
    found = foreign_adapter(folder)
    if found is None or found == description.get("other_adapter"):
        return ""
    return (
        f"{folder}: PEFT has saved an adapter of RED here since {TENSORS_NAME} was written, and what is read is the "
        f"latter; remove {TENSORS_NAME} to read PEFT's, or let PEFT save into another folder"
    )


def _has_edits(folder: Path) -> bool:
    return is_own_folder(folder) or is_peft_folder(folder) or (folder / VECTORS_NAME).exists()
