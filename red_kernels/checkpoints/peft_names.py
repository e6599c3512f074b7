"""The file names of PEFT's form, and which of such files `rk.save_edits` has written beside its own."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

__all__ = ["BESIDE", "CONFIG_NAME", "PREFIX", "TENSORS_NAMES", "beside_files", "has_room", "is_peft_folder"]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # of every name in PEFT's files
BESIDE = "red_kernels"  # the key in the metadata of an `adapter_model.safetensors` that save_edits has written
_MODEL = "config.json"  # transformers loads a model from a folder by this, unless an adapter is in it
_LONGEST = 1 << 24  # bytes of a header that is looked at


def is_peft_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter of PEFT, of any method."""
    return (Path(folder) / CONFIG_NAME).is_file()


def beside_files(folder: Path) -> list[Path]:
    """The files of PEFT's form that `rk.save_edits` has written into a folder, the config first; [] without any."""
    path = folder / TENSORS_NAMES[0]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _LONGEST)))
        if BESIDE in header.get("__metadata__", {}):
            return [own for own in (folder / CONFIG_NAME, path) if own.exists()]
    return []


def has_room(folder: Path) -> bool:
    """Whether PEFT's form may be written into a folder.

    Not beside an adapter that something else has written, which would be lost. Not beside a model, which
    transformers would no longer load: it takes such a folder for an adapter.
    """
    if (folder / _MODEL).exists():
        return False
    others = {folder / name for name in (CONFIG_NAME, *TENSORS_NAMES)} - set(beside_files(folder))
    return not any(path.exists() for path in others)
