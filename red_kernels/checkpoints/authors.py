"""Checkpoints in the form of RED's authors (arXiv 2402.15179): `delta_vector.pth`, with an optional `classifier.pth`.

`delta_vector.pth` is a `torch.save`d dict from `<site>.delta_vector.activation_scaling` and `.activation_bias` to
tensors of shape `[1, width]`; kind `ln` adds `<site>.delta_vector.activation_ln.weight` and `.bias`. `classifier.pth`
is the state dict of the classifier head. If both are written, they share a mark, in a record that torch.load ignores.
So a crash between two renames cannot mix two saves: see `folder.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..edits.kinds import PARTS
from ..edits.module import NAME
from ..support.files import locked, made_folder, sync_folder, write_files
from ..support.sharded import refuse_partitioned, whole, write_from_one
from ..support.text import listed
from .edit_values import edit_tensors, values_of
from .vectors import SiteTensors, checked_tensor, collect, load_pickled
from .wrapped_names import inner_model, renamed_sites

__all__ = ["CLASSIFIER_NAME", "VECTORS_NAME", "export_authors"]

VECTORS_NAME = "delta_vector.pth"
CLASSIFIER_NAME = "classifier.pth"
HEAD = "classifier"  # the module whose state the second file contains

_CHILD = ".delta_vector."
# Inner models under these names are part of the authors' site names (`transformer.h.0`, `model.layers.0`). An inner
# model under its own name is not: `encoder.layer.0` for the model's `inner.encoder.layer.0`.
_COMMON_PREFIXES = ("model", "transformer")
_RECORD = ".data/red_kernels_mark"  # in the archive of torch.save
_MARKED_CLASSIFIER = re.compile(r"classifier\.[0-9a-f]{32}\.pth")
_TRIES = 3  # to read both files while others write; then once more under the writers' lock


def export_authors(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> Path:
    """Save an edit of a patched model in the form of RED's authors, `delta_vector.pth`.

    Vectors have shape `[1, width]` and their own dtype (the authors' are fp32 or bf16). They are named from the inner
    model, like the authors'. A classifier head, the module `classifier` of the model, goes to `classifier.pth` next to
    them. Both files are written under temporary names, synced and renamed, and `rk.load_edits` reads the folder. A
    crash leaves the former state or the new one. For models in several processes see `rk.save_edits`.

    Args:
        model: a model patched by `rk.patch`.
        folder: where to save; created if missing. Files of an earlier save are replaced, others are kept.
        name: the edit to save; None for the active one.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched or has no edit of this name; its vectors or its head are on the meta device
            and have no values; the folder has a `classifier.pth` but the model has no classifier head, so the two files
            would not match.
        OSError: the folder cannot be written to (read-only, full, a file of that name); nothing is left behind.

    Warns:
        UserWarning: other tensors than the edits and the head are trained, for which this form has no place.
    """
    tensors = edit_tensors(model, name)
    vectors = renamed_sites(model, values_of(tensors))
    head = classifier_of(model)
    values = {key: _values(f"{HEAD}.{key}", own) for key, own in head.items()}
    known = {id(own) for own in head.values()}
    other = [
        key
        for key, own in model.named_parameters()
        if own.requires_grad and id(own) not in known and NAME not in key.split(".")
    ]
    target = Path(folder)
    prefix = inner_prefix(inner_model(model)[1], vectors)
    every = [own for parts in tensors.values() for own in parts.values()]
    write_from_one([*every, *head.values()], lambda: write_authors(target, vectors, prefix, values))
    if other:
        warnings.warn(f"not saved, because the authors' form has no place for it: {listed(other)}", stacklevel=2)
    return target


def write_authors(folder: Path, vectors: SiteTensors, prefix: str, head: Mapping[str, torch.Tensor]) -> None:
    """Write both files, with `prefix` removed from the site names; see `export_authors`."""
    foreign = sorted({part for parts in vectors.values() for part in parts if PARTS[part].key is None})
    if foreign:
        raise ValueError(f"model: the authors' form has no name for {listed(foreign)}; save them by rk.save_edits")
    if not head and (folder / CLASSIFIER_NAME).exists():
        raise ValueError(
            f"folder: {str(folder)!r} has a {CLASSIFIER_NAME} of another model, but this model has no classifier head; "
            "choose another folder or remove the file"
        )
    state = {
        f"{authors_site(site, prefix)}{_CHILD}{PARTS[part].key}": value.reshape(1, -1) if PARTS[part].row else value
        for site, parts in vectors.items()
        for part, value in parts.items()
    }
    mark = hashlib.sha256(_saved(state) + _saved(dict(head))).hexdigest()[:32] if head else None
    with made_folder(folder), locked(folder):
        contents = {VECTORS_NAME: _saved(state, mark)}
        if mark is not None:
            contents = {_marked_name(mark): _saved(dict(head), mark), **contents}
        write_files(folder, contents)
        with contextlib.suppress(OSError):  # the new state is complete; a reader does not need the rest
            if mark is not None:
                os.replace(folder / _marked_name(mark), folder / CLASSIFIER_NAME)
            for path in folder.iterdir():
                if _MARKED_CLASSIFIER.fullmatch(path.name):
                    path.unlink()
            sync_folder(folder)


def _rows() -> tuple[str, ...]:
    return tuple(part.name for part in PARTS.values() if part.row)


def authors_site(site: str, prefix: str) -> str:
    """The authors' name of a site, without `prefix`."""
    return site.removeprefix(f"{prefix}.") if prefix else site


def read_vectors(path: Path) -> SiteTensors:
    """Read a `delta_vector.pth`. Raises ValueError for a damaged file or one of another form."""
    return collect(path, load_pickled(path, path.read_bytes()), _split, _rows())


def read_authors(folder: Path) -> tuple[SiteTensors, None, dict[str, torch.Tensor]]:
    """Read a folder in the authors' form: the vectors, no description, and the classifier head if there is one.

    Raises:
        ValueError: a file is damaged or of another form; the classifier is of another save than the vectors.
        FileNotFoundError: the vectors, or the classifier that was saved with them, are missing.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(_Torn):
            return _read_both(folder)
    with locked(folder):
        try:
            return _read_both(folder)
        except _Torn as error:
            raise ValueError(str(error)) from None


class _Torn(Exception):
    """The files are of two saves, possibly only for a moment while another process writes."""


def _read_both(folder: Path) -> tuple[SiteTensors, None, dict[str, torch.Tensor]]:
    content = (folder / VECTORS_NAME).read_bytes()
    vectors = collect(folder / VECTORS_NAME, load_pickled(folder / VECTORS_NAME, content), _split, _rows())
    mark = _mark_of(content)
    for path in (folder / CLASSIFIER_NAME, *([] if mark is None else [folder / _marked_name(mark)])):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        state = load_pickled(path, content)
        # Files without a mark are from the authors' program or an earlier version, or were put there by hand.
        if mark is None or _mark_of(content) in (None, mark):
            if not state:
                raise ValueError(f"{path}: is not the state of a classifier head: it is empty")
            return vectors, None, {key: checked_tensor(path, key, value) for key, value in state.items()}
    if mark is None:
        return vectors, None, {}
    raise _Torn(
        f"{folder / CLASSIFIER_NAME}: is missing, or of another save than {VECTORS_NAME} in its folder; name "
        f"{VECTORS_NAME} itself to load the vectors alone"
    )


def inner_prefix(model: nn.Module, sites: Iterable[str]) -> str:
    """The prefix of a model's site names that the authors' names lack; empty for none.

    It is the name of a transformers model inside wrappers, and of its base model, if that contains all sites. A base
    model called `model` or `transformer` is the exception: the authors keep these names.
    """
    for name, module in model.named_modules():
        base = getattr(type(module), "base_model_prefix", None)  # the class's: wrappers forward their model's
        if isinstance(base, str):
            if not base or base in _COMMON_PREFIXES or base not in module._modules:
                base = ""
            prefix = ".".join(part for part in (name, base) if part)
            inside = all(site.startswith(f"{prefix}.") for site in sites)
            return prefix if inside else ""
    return ""


def classifier_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model's classifier head by their names in it; empty without a head of that name."""
    for module in model.modules():
        if isinstance(getattr(type(module), "base_model_prefix", None), str):
            head = module._modules.get(HEAD)
            break
    else:
        head = model._modules.get(HEAD)
    copies = None if head is None else head._modules.get("modules_to_save")
    if copies is not None:  # PEFT trains a copy
        head = copies._modules[getattr(head, "active_adapter", "default")]
    named = () if head is None else head.named_parameters()
    return {name: own for name, own in named if NAME not in name.split(".")}


def _values(name: str, parameter: torch.Tensor) -> torch.Tensor:
    if parameter.is_meta:
        raise ValueError(f"model: {name} is on the meta device and has no values to save")
    refuse_partitioned(name, parameter)
    # A copy: torch.save writes the whole storage of a view.
    return whole(parameter).to("cpu", copy=True).contiguous()


def _saved(state: dict[str, torch.Tensor], mark: str | None = None) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if mark is not None:
        with zipfile.ZipFile(buffer, "a") as archive:
            top = archive.namelist()[0].partition("/")[0]
            archive.writestr(zipfile.ZipInfo(f"{top}/{_RECORD}"), mark)  # without a date: equal content, equal bytes
    return buffer.getvalue()


def _mark_of(content: bytes) -> str | None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            name = next((name for name in archive.namelist() if name.endswith(f"/{_RECORD}")), None)
            mark = None if name is None else archive.read(name).decode()
    except Exception:  # torch.load has read it: the older form, not an archive
        return None
    return mark if mark is not None and re.fullmatch("[0-9a-f]{32}", mark) else None


def _marked_name(mark: str) -> str:
    return f"{HEAD}.{mark}.pth"


def _split(key: str) -> tuple[str, str] | None:
    site, found, name = key.rpartition(_CHILD)
    part = next((part.name for part in PARTS.values() if part.key == name), None)
    return (site, part) if found and site and part is not None else None
