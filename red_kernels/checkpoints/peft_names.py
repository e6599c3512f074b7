"""The file names of PEFT's form, and recognising the files that `rk.save_edits` has written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path

__all__ = [
    "BESIDE",
    "CONFIG_NAME",
    "METHOD",
    "PREFIX",
    "TENSORS_NAMES",
    "beside_files",
    "foreign_adapter",
    "has_room",
    "is_peft_folder",
    "named_by",
]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
METHOD = "RED"
PREFIX = "base_model.model."  # of every name in PEFT's files
BESIDE = "red_kernels"  # the key in the metadata of an `adapter_model.safetensors` that save_edits has written
_MODEL = "config.json"  # transformers loads a model from a folder by this, unless an adapter is in it
_LONGEST = 1 << 24  # bytes of the longest header that is read


def is_peft_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has an adapter of PEFT, of any method."""
    return (Path(folder) / CONFIG_NAME).is_file()


def named_by(chosen: str | Collection[str], name: str) -> bool:
    """Whether a module's name matches a regular expression, or equals or ends in one of these names, as in PEFT."""
    if isinstance(chosen, str):
        return re.fullmatch(chosen, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in chosen)


def beside_files(folder: Path) -> list[Path]:
    """The files of PEFT's form that `rk.save_edits` has written into a folder, the config first; [] without any."""
    path = folder / TENSORS_NAMES[0]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _LONGEST)))
        if BESIDE in header.get("__metadata__", {}):
            # A config of another method, or with a file of PEFT's other kind, is that of an adapter saved since.
            config = folder / CONFIG_NAME
            theirs = _method(folder) not in (None, METHOD) or (folder / TENSORS_NAMES[1]).exists()
            return [config, path] if config.exists() and not theirs else [path]
    return []


def foreign_adapter(folder: Path) -> str | None:
    """A digest of the vectors of a RED adapter in a folder, saved by PEFT, not by `rk.save_edits`; or None."""
    if _method(folder) != METHOD or (folder / CONFIG_NAME) in beside_files(folder):
        return None
    with contextlib.suppress(OSError):
        path = next((folder / name for name in TENSORS_NAMES if (folder / name).is_file()), None)
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def _method(folder: Path) -> object:
    """The method that an adapter's config names; None if the config is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / CONFIG_NAME).read_bytes()).get("peft_type")
    return None


def has_room(folder: Path) -> bool:
    """Whether PEFT's form may be written into a folder.

    Not next to another program's adapter, which would be lost. Not next to a model, which transformers would no longer
    load: it takes such a folder for an adapter.
    """
    if (folder / _MODEL).exists():
        return False
    others = {folder / name for name in (CONFIG_NAME, *TENSORS_NAMES)} - set(beside_files(folder))
    return not any(path.exists() for path in others)
