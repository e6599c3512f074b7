"""The vectors of a checkpoint, sorted by site and checked, for reading and writing files of every form."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..edits.kinds import PARTS, kind_with
from ..support.parse import layer_number
from ..support.text import listed

__all__ = ["VECTOR_DTYPES", "SiteTensors", "by_layer", "collect", "in_order", "load_pickled", "split_key"]

VECTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

SiteTensors = dict[str, dict[str, torch.Tensor]]  # site -> one of PARTS -> its tensor, mostly (width,)
_KEY = re.compile(r"(?P<site>.+)\.red_edit\.(?P<part>\w+)")


def collect(
    path: Path, tensors: Mapping[str, Any], split: Callable[[str], tuple[str, str] | None], rows: tuple[str, ...] = ()
) -> SiteTensors:
    """Sort the tensors of a file by site, as `(width,)` vectors; an unexpected name, type or shape is an error.

    Args:
        path: the file, for messages.
        tensors: its content, by name.
        split: a name as site and part; None for a name of no edit.
        rows: the parts of shape `[1, width]` in the file; other parts may exist.
    """
    vectors: SiteTensors = {}
    names = {key: split(key) for key in tensors}
    foreign = [key for key, name in names.items() if name is None]
    if foreign or not tensors:
        raise ValueError(f"{path}: is not a file of edits: " + (f"has {listed(foreign)}" if foreign else "it is empty"))
    for key, name in names.items():
        assert name is not None  # foreign names were refused above
        site, part = name
        value = checked_tensor(path, key, tensors[key])
        row = value.ndim == 2 and value.shape[0] == 1
        dimensions = len(PARTS[part].shape(1))
        fits = row if part in rows else value.ndim == dimensions or (row and bool(rows))
        if not fits:
            expected = "[1, width]" if part in rows else "(width,)" if dimensions == 1 else f"{dimensions} dimensions"
            raise ValueError(f"{path}: {key} has shape {tuple(value.shape)}, expected {expected}")
        if part in vectors.setdefault(site, {}):
            raise ValueError(f"{path}: holds {site}.{part} twice")
        vectors[site][part] = value.reshape(-1) if dimensions == 1 else value
    return in_order(vectors)


def load_pickled(path: Path, content: bytes) -> Mapping[str, Any]:
    """The content of a torch.save file, by name; a foreign pickle runs no code. ValueError names the file."""
    try:
        # The authors saved their files from cuda:0.
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: is damaged, or torch.load cannot read it safely: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path}: expected a dict from names to tensors, got {type(state).__name__}")
    return state


def checked_tensor(path: Path, key: str, value: Any) -> torch.Tensor:
    """`value`, detached, if it is a dense floating-point tensor; else an error that names it."""
    if not isinstance(value, torch.Tensor) or value.dtype not in VECTOR_DTYPES:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"{path}: {key} is {got}, expected a floating-point tensor of 16, 32 or 64 bits")
    if value.layout is not torch.strided or value.is_meta:
        raise ValueError(f"{path}: {key} is {value.layout} on {value.device}, expected a dense tensor with values")
    return value.detach()


def split_key(key: str) -> tuple[str, str] | None:
    """The site and the part of `<site>.red_edit.<part>`; None for a name of no edit."""
    match = _KEY.fullmatch(key)
    return None if match is None or match["part"] not in PARTS else (match["site"], match["part"])


def in_order(vectors: SiteTensors) -> SiteTensors:
    """By layer, with the parts in their kind's order: files have no useful order."""
    found: SiteTensors = {}
    for site in sorted(vectors, key=by_layer):
        kind = kind_with(vectors[site])
        found[site] = {part: vectors[site][part] for part in (kind.names if kind else PARTS) if part in vectors[site]}
    return found


def by_layer(site: str) -> list[tuple[int, str]]:
    """A sort key for site names: layer 2 comes before layer 10."""
    numbers = ((layer_number(part), part) for part in site.split("."))
    return [(-1, part) if number is None else (number, "") for number, part in numbers]
