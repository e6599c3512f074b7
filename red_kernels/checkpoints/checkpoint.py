"""Saving the edits of a patched model, and loading them, including the RED authors' files.

A saved folder has the edits in one small file, `red_edits.safetensors`. It has one tensor `(width,)` per vector,
named as in the `state_dict` of a model with one edit: `<site>.red_edit.scale`, `<site>.red_edit.bias`, and for kind
`ln` also `norm_weight` and `norm_bias`. Its metadata describes the edits, so that `saved_config` can return the config
for another copy of the base model. A trained head is next to it, in `red_head.safetensors`; `folder.py` keeps both
together. Folders of earlier versions have the description in a `red_config.json`. PEFT's form of the edits is in the
same folder; this package ignores it if its own form exists.

The authors' form is read and written by `authors.py`.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..edits.config import RedConfig
from ..edits.module import RedEdit
from ..edits.named import NewEdit, edit_names, new_edit, publish_edit
from ..patching.patch import edit_config
from ..patching.pretrained import beside_pretrained
from ..support.files import locked, made_folder, sync_folder, write_files
from ..support.sharded import placed_as, refuse_partitioned, whole, write_from_one
from ..support.text import listed
from .authors import CLASSIFIER_NAME, HEAD, VECTORS_NAME, classifier_of, inner_prefix
from .edit_values import Slot, edit_tensors, shared_sites, slots, values_of, weights_device
from .folder import CONFIG_NAME as CONFIG_NAME
from .folder import HEAD_NAME, Base, Head, Saved, make_saved, marked_head, stale_files
from .folder import TENSORS_NAME as TENSORS_NAME
from .found import Found as Found
from .model_facts import (
    architecture,
    base_model_name,
    base_revision,
    labels_of,
    last_name,
    set_labels,
    weights_print,
)
from .peft_names import CONFIG_NAME as CONFIG
from .peft_names import beside_files, has_room
from .peft_place import place_in_peft
from .peft_write import beside_model
from .reading import located
from .reading import read as read
from .reading import saved_config as saved_config
from .site_names import renamed
from .wrapped_names import bare_name, inner_model, match_wrapped, renamed_sites, unwrapped

__all__ = ["LoadReport", "load_edits", "save_edits", "saved_config"]


@dataclass(frozen=True)
class LoadReport:
    """The result of `load_edits`.

    Attributes:
        source: the file of the vectors.
        loaded: checkpoint site to model site, for every site with loaded values.
        checkpoint_only: values of the checkpoint without a place in the model: vectors as `<site>.<part>`, the
            parameters of a trained head by their names, an authors' classifier head as `classifier.<parameter>`.
        model_only: vectors in the model that the checkpoint lacks; they keep their values.
        head: the loaded parameters of a head, by their names in the model; of an authors' classifier head as
            `classifier.<parameter>`.
        labels: the present names of the labels in the model's config, by number; empty if the checkpoint has none.
        warnings: further remarks, for example on edits of another base model.
    """

    source: Path
    loaded: dict[str, str]
    checkpoint_only: tuple[str, ...] = ()
    model_only: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{len(self.loaded)} sites loaded from {self.source}"
        if self.head:
            kind = "classifier head" if all(name.startswith(f"{HEAD}.") for name in self.head) else "head"
            text += f"; the {kind}: {listed(self.head)}"
        if self.labels:
            text += f"; the labels: {listed(self.labels)}"
        if self.checkpoint_only:
            text += f"; in the checkpoint only: {listed(self.checkpoint_only)}"
        if self.model_only:
            text += f"; in the model only: {listed(self.model_only)}"
        return "\n".join([text, *(f"warning: {warning}" for warning in self.warnings)])


def save_edits(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None, *, peft: bool = True) -> Path:
    """Save an edit of a patched model: one safetensors file of a few hundred kilobytes, its description included.

    PEFT's form is written next to it (`adapter_config.json`, `adapter_model.safetensors`), so that
    `PeftModel.from_pretrained(model, folder)` loads the folder once `red_kernels.integrations.peft` is imported. It is
    omitted for sites that PEFT does not wrap, for example those of the positions `res` and `res_with_attn` and blocks
    of experts; in a folder with a model's `config.json`, which transformers would take for an adapter; and in a folder
    with another program's adapter, which stays.

    The file is written under a temporary name, synced and renamed: a crash leaves the former file or the new one, and
    a reader sees one of them. Saves into the same folder wait for each other. Vectors computed from others (a
    parametrization, weight norm, pruning) are saved with their effective values. If each process has a part of the
    vectors (FSDP2), all of them must call this: the parts are gathered, and the first process writes. If each has all
    of them (DDP), call it in one.

    Args:
        model: a model patched by `rk.patch`.
        folder: where to save; created if missing. Files of an earlier save are replaced, its trained head is removed,
            other files are kept.
        name: the edit to save; None for the active one. The file does not depend on it.
        peft: whether to write PEFT's form too.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched or has no edit of this name; its vectors are on the meta device and have no
            values.
        OSError: the folder cannot be written to (read-only, full, a file of that name); no partial file is left behind.
    """
    return save_with_head(model, folder, name, {}, peft=peft)


def save_with_head(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None,
    head: Mapping[str, nn.Parameter],
    *,
    peft: bool = True,
) -> Path:
    """As `save_edits`, with further trained parameters, by their names in the model."""
    return _save(model, folder, edit_config(model), name, head, peft)


@beside_pretrained
def _save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    config: RedConfig,
    name: str | None = None,
    head: Mapping[str, nn.Parameter] | None = None,
    peft: bool = False,
) -> Path:
    """As `save_with_head`, for a patched model or a part of one."""
    head = {} if head is None else head
    tensors = edit_tensors(model, name)
    for key, own in head.items():
        if own.is_meta:
            raise ValueError(f"model: {key} is on the meta device and has no values to save")
        refuse_partitioned(key, own)
    found = values_of(tensors)
    vectors = renamed_sites(model, found)
    values = {key: whole(own).to("cpu", copy=True).contiguous() for key, own in head.items()}
    trained = None
    if head:
        trained = Head(
            {bare_name(model, key): own for key, own in values.items()}, labels_of(model), architecture(model)
        )
    prefix = inner_prefix(inner_model(model)[1], vectors)
    named = model if hasattr(model, "config") else inner_model(model)[1]  # DistributedDataParallel has none
    base = Base(base_model_name(named), base_revision(named), weights_print(model), architecture(model))
    saved = make_saved(config, vectors, base, prefix, trained)
    beside = beside_model(config, place_in_peft(model, found, values), base) if peft else {}
    target = Path(folder)
    every = [*(own for parts in tensors.values() for own in parts.values()), *head.values()]
    write_from_one(every, lambda: write_saved(target, saved, beside))
    return target


def write_saved(folder: Path, saved: Saved, beside: Mapping[str, bytes] | None = None) -> tuple[Path, ...]:
    """Replace the former state in a folder by a saved one, in one step; the folder is created if missing.

    Args:
        folder: the folder.
        saved: the state in our own form.
        beside: the same in PEFT's form, of `beside_own`; written if there is room for it.

    Returns:
        The written files.

    Raises:
        OSError: the folder cannot be written to; the former state stays, or the new one is there without `beside`.
    """
    with made_folder(folder), locked(folder):
        write_files(folder, saved.contents(folder))
        # The new state is there. What follows is tidying, which a reader can do without.
        with contextlib.suppress(OSError):
            if saved.mark is not None:
                os.replace(marked_head(folder, saved.mark), folder / HEAD_NAME)
            for path in stale_files(folder, saved.mark):
                path.unlink(missing_ok=True)
            sync_folder(folder)
        beside = beside if beside and has_room(folder) else {}
        former = beside_files(folder)
        for path in former:  # the config first: it must not meet the vectors of other edits
            if path.name not in beside or (path.name == CONFIG and path.read_bytes() != beside[CONFIG]):
                path.unlink(missing_ok=True)
        if beside:
            try:
                write_files(folder, beside)
            except OSError:
                for path in former:  # of other edits than those that are there now
                    path.unlink(missing_ok=True)
                raise
    return tuple(folder / name for name in (*saved.names, *beside))


def load_edits(
    model: nn.Module,
    folder_or_file: str | os.PathLike[str],
    name: str | None = None,
    *,
    strict: bool = True,
    revision: str | None = None,
) -> LoadReport:
    """Load edits into a patched model, after checking every name, shape and dtype.

    The values are copied into the model's own Parameters, on their devices and in their dtype: an existing optimizer
    and a compiled model stay valid. Nothing is changed before all checks have passed. Values are copied unchanged, NaN
    and infinity included. Site names may differ from the model's by one prefix, the same for all
    (`encoder.layer.0...` in a file of the authors, `inner.encoder.layer.0...` in a model with a head).

    A folder may have a trained head: `red_head.safetensors` of `red-kernels finetune` and `RedTrainer`, or the authors'
    `classifier.pth`. Its values are copied into the model's parameters of those names, in their dtype: a head in fp32
    is rounded in a bf16 model. The names of the labels go into the model's config. To load the vectors without the
    head, name the file of the vectors itself.

    Vectors on the meta device, of a model that was patched there and given its weights by assignment, are replaced by
    new Parameters beside the weights.

    Args:
        model: a model patched by `rk.patch`, at the position and kind of the checkpoint (`rk.saved_config`).
        folder_or_file: a folder made by `save_edits`, or with the authors' `delta_vector.pth`; or one such file
            (`.safetensors`, or anything `torch.load(weights_only=True)` reads). The folder of a run of `red-kernels
            finetune`, or of a RED adapter that PEFT has saved. Or, as text, the id of a repository on the hub with one
            of these (`"user/name"`), which is fetched into the hub's cache.
        name: the edit to load into; None for the active one. A new edit is added when all of its values are loaded,
            and the active one stays active.
        strict: with False, vectors and parameters of a head without a partner are listed in the report instead of
            raising. A checkpoint without any match is always an error.
        revision: branch, tag or commit of a repository on the hub.

    Returns:
        A `LoadReport`.

    Raises:
        ValueError: the model is not patched; the file is damaged, foreign, of an unknown format version; the head is of
            another save; a vector or the head has another width or an integer dtype; the position differs; a value
            without a partner (`strict`); a vector of the model is computed from others and cannot be set; the base
            model's weights are on the meta device; `name` is invalid.
        FileNotFoundError: the file does not exist, the folder has no file of edits, or their head is missing; the
            repository does not exist on the hub.
        OSError: the hub cannot be reached, or refuses.

    Warns:
        UserWarning: the file says that the edits were trained on a base model of another name, and nothing says that
            its weights are the same; PEFT has saved an adapter into the folder since, which is not what is loaded.
    """
    check_patched(model)
    path = located(folder_or_file, revision)
    report = load_found(model, read(path), path, name, strict)
    for text in report.warnings:
        warnings.warn(text, stacklevel=2)
    return report


def check_patched(model: nn.Module) -> None:
    """Raises ValueError, with the remedy, for a model without vectors to load into."""
    try:
        edit_config(model)
    except ValueError as error:
        raise ValueError(
            "model: is not patched, so it has no vectors to load into; for a folder made by save_edits run "
            "rk.patch(model, rk.saved_config(folder)) first, for other files rk.patch(model, rk.RedConfig(...))"
        ) from error


def load_found(model: nn.Module, found: Found, path: Path, name: str | None, strict: bool) -> LoadReport:
    """As `load_edits`, for the content of `path`; the warnings are only in the report."""
    config = edit_config(model)
    source, description = found.source, found.description
    if description is not None and description["position"] != config.position:
        raise ValueError(
            f"{source}: holds edits at position {description['position']!r}, the model is patched at "
            f"{config.position!r}; patch it with rk.saved_config({str(path)!r})"
        )
    added = new_edit(model, name) if name is not None and name not in edit_names(model) else None
    places = slots(model, name) if added is None else _slots_of(added)
    first = shared_sites(model)
    mapping = match_wrapped(model, found.vectors, first)
    fitting: list[tuple[str, str, torch.Tensor]] = []
    checkpoint_only: list[str] = []
    for site, parts in found.vectors.items():
        to = first.get(mapping.get(site, ""), "")
        for part, value in parts.items():
            if part not in places.get(to, {}):
                checkpoint_only.append(f"{site}.{part}")
                continue
            _check_fits(source, f"{to}.{part}", value, places[to][part].own)
            fitting.append((to, part, value))
    filled = {(site, part) for site, part, _ in fitting}
    model_only = [f"{site}.{part}" for site, own in places.items() for part in own if (site, part) not in filled]
    if not fitting:
        raise ValueError(
            f"{source}: none of its sites is edited in the model; in the checkpoint: {listed(checkpoint_only)}; "
            f"in the model: {listed(model_only)}"
        )
    head, without_place = _head_pairs(model, found, mapping)
    checkpoint_only += without_place
    if strict and (checkpoint_only or model_only):
        advice = "patch the model alike, or pass strict=False to load what fits"
        if without_place:
            advice = (
                f"load into a model with such a head{_advised(found)}, name {source.name} itself to load the vectors "
                "alone, or pass strict=False to load what fits"
            )
        raise ValueError(
            f"{source}: does not fit the model; in the checkpoint only: {listed(checkpoint_only)}; in the model only: "
            f"{listed(model_only)}; {advice}"
        )
    labels = None if found.trained is None or without_place else found.trained.labels
    # Devices and dtypes are settled first, so that running out of memory cannot leave half of the edits loaded.
    staged = [(own, placed_as(value, own)) for _, own, value in head]
    moved = [(places[site][part], _placed(model, site, places[site][part], value)) for site, part, value in fitting]
    moved += _starts(model, places, filled)
    with torch.no_grad():
        for own, value in staged:
            own.copy_(value)
    for slot, value in moved:
        slot.assign(value)
    named = set_labels(model, labels)
    if added is not None:
        assert name is not None
        publish_edit(added, name)  # whole: a request in another thread meets all of it or nothing
    loaded = {
        site: to for site, to in mapping.items() if any((first[to], part) in filled for part in found.vectors[site])
    }
    return LoadReport(
        source,
        loaded,
        tuple(checkpoint_only),
        tuple(model_only),
        tuple(key for key, _, _ in head),
        named,
        (*_other_base(model, found), *([found.newer] if found.newer else [])),
    )


def _slots_of(added: NewEdit) -> dict[str, dict[str, Slot]]:
    return {
        site: {part: Slot(holder, part, one, own.width) for part, one in holder._parameters.items() if one is not None}
        for site, (own, holder) in added.items()
    }


def _check_fits(source: Path, name: str, value: torch.Tensor, parameter: nn.Parameter) -> None:
    refuse_partitioned(name, parameter)
    if value.shape != parameter.shape:
        raise ValueError(f"{source}: {name} has width {tuple(value.shape)}, the model's is {tuple(parameter.shape)}")


def _placed(model: nn.Module, site: str, slot: Slot, value: torch.Tensor) -> torch.Tensor:
    if slot.own.is_meta:
        return placed_as(value, slot.own, weights_device(model, site))
    return placed_as(value, slot.own)


def _starts(
    model: nn.Module, places: dict[str, dict[str, Slot]], filled: set[tuple[str, str]]
) -> list[tuple[Slot, torch.Tensor]]:
    """The initial values of vectors on the meta device that the checkpoint lacks."""
    found = []
    for site, parts in places.items():
        for part, slot in parts.items():
            if slot.own.is_meta and (site, part) not in filled:
                device, kind = weights_device(model, site), slot.holder.kind
                assert kind is not None
                start = kind.start(slot.width, slot.own.dtype, device)[part]
                found.append((slot, placed_as(start, slot.own, device)))
    return found


_Pairs = list[tuple[str, nn.Parameter, torch.Tensor]]  # the name for the report, the model's Parameter, its new value


def _head_pairs(model: nn.Module, found: Found, mapping: dict[str, str]) -> tuple[_Pairs, list[str]]:
    """The targets of a head's values in the model; and values without a place."""
    if found.trained is not None:
        return _trained_pairs(model, found, mapping)
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
        _check_head(source, f"{HEAD}.{key}", value, own[key], found)
    return [(f"{HEAD}.{key}", own[key], value) for key, value in found.head.items()], []


def _trained_pairs(model: nn.Module, found: Found, mapping: dict[str, str]) -> tuple[_Pairs, list[str]]:
    assert found.trained is not None
    source = found.head_source
    vectors = {id(own) for module in model.modules() if isinstance(module, RedEdit) for own in module.parameters()}
    own = {key: one for key, one in model.named_parameters(remove_duplicate=False) if id(one) not in vectors}
    values = found.trained.values
    bare = {bare_name(model, key): key for key in own}
    change = {unwrapped(site): unwrapped(to) for site, to in mapping.items()}

    def place(key: str) -> str:
        if key in own:
            return key
        return bare.get(key) or bare.get(renamed(key, change)) or renamed(key, mapping)

    names = {place(key): key for key in sorted(values)}
    pairs: _Pairs = [(to, own[to], values[names[to]]) for to in own if to in names]  # in the model's order
    for to, one, value in pairs:
        _check_head(source, to, value, one, found)
    return pairs, [key for to, key in names.items() if to not in own]


def _check_head(source: Path, name: str, value: torch.Tensor, own: nn.Parameter, found: Found) -> None:
    if own.is_meta:
        raise ValueError(
            f"model: {name} is on the meta device; give this part of the model its memory before loading (a module's "
            "to_empty clears all of its values, so call it for the head alone)"
        )
    refuse_partitioned(name, own)
    if not own.is_floating_point():
        raise ValueError(f"model: {name} is {own.dtype}, into which no trained head can be loaded")
    if value.shape != own.shape:
        raise ValueError(
            f"{source}: {name} has shape {tuple(value.shape)}, the model's head {tuple(own.shape)}; a model with as "
            f"many labels is needed{_advised(found)}, or name {found.source.name} itself to load the vectors alone"
        )


def _advised(found: Found) -> str:
    trained = found.trained
    if trained is None or not trained.labels:
        return ""
    kind = f" of the class {trained.architecture}" if trained.architecture else ""
    return f" ({kind.removeprefix(' of the class ')}{', ' if kind else ''}num_labels={len(trained.labels)})"


def _other_base(model: nn.Module, found: Found) -> tuple[str, ...]:
    """A warning if the edits were trained on a base model of another name."""
    said = found.description or {}
    saved, here = said.get("base_model_name"), base_model_name(model)
    if not saved or not here or last_name(saved) == last_name(here):
        return ()
    if said.get("base_weights") is not None and said["base_weights"] == weights_print(model):  # a copy of the folder
        return ()
    if Path(here).is_dir() and Path(here).resolve() == found.source.resolve().parent:  # save_pretrained wrote both
        return ()
    return (
        f"{found.source}: its edits were trained on the base model {saved!r}, and this model is {here!r}; on another "
        "base model they do not do what they were trained for",
    )
