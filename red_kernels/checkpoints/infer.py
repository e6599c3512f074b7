"""The config of a checkpoint's vectors, if the checkpoint does not state it.

A file of the authors contains only names and vectors. With a model, the position is that with the checkpoint's sites.
From names alone, it is the position for which a known family has these modules in each layer.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..edits.config import POSITIONS, RedConfig
from ..edits.kinds import KINDS, kind_fitting, kind_named, kind_with
from ..models import FAMILIES, NARROWER, ON_INPUT, serves_alone
from ..patching.plan import make_plan
from ..support.parse import layer_number, shown
from ..support.text import listed
from .site_names import match_sites
from .vectors import SiteTensors

__all__ = ["config_from_model", "config_from_names", "kind_of", "layers_by_stack"]


class _LayerSite(NamedTuple):
    """A site's name, split at its layer's number."""

    stack: str
    number: int
    path: str


def kind_of(source: Path, vectors: SiteTensors) -> str:
    """The kind of edit with these vectors at each site.

    Raises:
        ValueError: sites of different kinds, or of no kind.
    """
    first = next(iter(vectors))
    for site, parts in vectors.items():
        if parts.keys() != vectors[first].keys():
            raise ValueError(
                f"{source}: {first} has {listed(list(vectors[first]))} and {site} has {listed(list(parts))}; expected "
                "one kind at all sites"
            )
    kind = kind_with(vectors[first])
    with contextlib.suppress(ValueError):  # raised below, with the site's name
        kind = kind_fitting(vectors[first])
    if kind is None:
        raise ValueError(f"{source}: no kind of edit has {listed(list(vectors[first]))} alone; kinds: {_kinds()}")
    for site, parts in vectors.items():
        try:
            kind.width(parts)
        except ValueError as error:
            raise ValueError(f"{source}: the vectors of {site} {error}") from None
    return kind.name


def config_from_names(source: Path, vectors: SiteTensors, position: str | None = None) -> RedConfig:
    """The config of the vectors, inferred from the names of their sites.

    Args:
        source: the file, for messages.
        vectors: site to part to tensor.
        position: the position, if known; then only the layers are inferred.

    Raises:
        ValueError: it cannot be inferred: no position or several have these sites, or the layers of two stacks were
            chosen differently.
    """
    kind = kind_of(source, vectors)
    stacks: dict[str, dict[int, set[str]]] = {}
    for site in vectors:
        found = _layer_site(site)
        if found is None:
            raise ValueError(
                f"{source}: the site {shown(site)} names no layer, so its position cannot be inferred; {_ADVICE}"
            )
        stacks.setdefault(found.stack, {}).setdefault(found.number, set()).add(found.path)
    if position is None:
        layers = {frozenset(paths) for stack in stacks.values() for paths in stack.values()}
        fitting = {
            name: [
                family.name for family in FAMILIES if all(_fits(_entries(family.sites, name), own) for own in layers)
            ]
            for name in POSITIONS
        }
        possible = [name for name, families in fitting.items() if families]
        if not possible:
            paths = sorted(frozenset.union(*layers))
            raise ValueError(f"{source}: no position of a known family edits {listed(paths)} in each layer; {_ADVICE}")
        if len(possible) > 1:
            choices = ", ".join(f"{name!r} of {' or '.join(fitting[name])}" for name in possible)
            raise ValueError(f"{source}: its sites are those of position {choices}; {_ADVICE}")
        position = possible[0]
    return RedConfig(position=position, kind=kind, layers=_chosen_layers(source, stacks), dtype=_dtype(vectors))


def config_from_model(
    source: Path, vectors: SiteTensors, model: nn.Module, position: str | None = None
) -> tuple[RedConfig, dict[str, str]]:
    """The config of the vectors, inferred from their model; and checkpoint site to model site.

    Args:
        source: the file, for messages.
        vectors: site to part to tensor.
        model: not patched; it may be on the meta device.
        position: the position, if known; only this one is tried then.

    Raises:
        ValueError: no position of the model has these sites, or more than one; a width differs.
    """
    kind, dtype = kind_of(source, vectors), _dtype(vectors)
    found: dict[str, tuple[RedConfig, dict[str, str]]] = {}
    reasons: dict[str, str] = {}
    for name in POSITIONS if position is None else (position,):
        try:
            config = RedConfig(position=name, kind=kind, dtype=dtype)
            widths = _planned(model, config)
            mapping = match_sites(vectors, widths)
            chosen = set(mapping.values())
            if len(mapping) == len(vectors) and chosen != widths.keys():
                layers = {at.number for site in chosen if (at := _layer_site(site)) is not None}
                config = RedConfig(position=name, kind=kind, dtype=dtype, layers=layers)
                widths = _planned(model, config)
        except ValueError as error:
            reasons[name] = str(error)
            continue
        if len(mapping) < len(vectors) or chosen != widths.keys():
            there = [site for site in vectors if site not in mapping]
            missing = [site for site in widths if site not in chosen]
            reasons[name] = f"in the checkpoint only: {listed(there)}; in the model only: {listed(missing)}"
            continue
        for site, to in mapping.items():
            width = kind_named(kind).width(vectors[site])
            if width not in (None, widths[to]):
                raise ValueError(f"{source}: {site} has width {width}, {to} in the {type(model).__name__} {widths[to]}")
        found[name] = config, mapping
    if len(found) > 1:
        raise ValueError(f"{source}: its sites are those of the positions {listed(list(found))}; pass --position")
    if not found:
        why = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"{source}: no position of this {type(model).__name__} has these sites: {why}")
    return next(iter(found.values()))


def layers_by_stack(sites: Iterable[str]) -> dict[str, set[int]]:
    """The numbers of the layers in each stack, from the names of sites; names without a number are skipped."""
    found: dict[str, set[int]] = {}
    for site in sites:
        cut = _layer_site(site)
        if cut is not None:
            found.setdefault(cut.stack, set()).add(cut.number)
    return found


def _layer_site(site: str) -> _LayerSite | None:
    """Split a name at its first number, the layer's (`encoder.block.3.layer.1.wo`); None if there is none."""
    parts = site.split(".")
    for place, part in enumerate(parts):
        number = layer_number(part)
        if number is not None:
            return _LayerSite("".join(f"{before}." for before in parts[:place]), number, ".".join(parts[place + 1 :]))
    return None


def _planned(model: nn.Module, config: RedConfig) -> dict[str, int]:
    return {site.report.site: site.width for site in make_plan(model, config).sites}


def _entries(sites: dict[str, tuple[str, ...]], position: str) -> tuple[str, ...]:
    found: list[str] = []
    for place in POSITIONS[position]:
        entries = sites.get(place) or sites.get(NARROWER.get(place, ""), ())
        if place not in sites and place not in ON_INPUT:
            entries = tuple(entry for entry in entries if serves_alone(entry.removesuffix("?"), place))
            entries = tuple(entry.removesuffix("?") for entry in entries[:1]) + entries[1:]  # one must be present
        if not entries:
            return ()
        found += entries
    return tuple(found)


def _fits(entries: Sequence[str], paths: frozenset[str]) -> bool:
    """Whether `paths` are those of a layer with these entries of `Family.sites`: a partner for each."""
    if not entries:
        return not paths
    first, *rest = entries
    options = [_path_pattern(option.partition(" with ")[0]) for option in first.removesuffix("?").split("|")]
    taken = [path for path in paths if any(option.fullmatch(path) for option in options)]
    return any(_fits(rest, paths - {path}) for path in taken) or (first.endswith("?") and _fits(rest, paths))


def _path_pattern(path: str) -> re.Pattern[str]:
    parts = [r"[0-9]+" if part == "-1" else re.escape(part) for part in path.split(".")]
    return re.compile(r"\.".join(parts))


def _chosen_layers(source: Path, stacks: dict[str, dict[int, set[str]]]) -> Iterable[int] | None:
    """None if each stack has its layers from 0 on; else the layers of all stacks."""
    if all(sorted(layers) == list(range(len(layers))) for layers in stacks.values()):
        return None
    first, *others = stacks.values()
    if any(other.keys() != first.keys() for other in others):
        raise ValueError(
            f"{source}: not all layers are edited, and in {listed([name.rstrip('.') for name in stacks])} not the same "
            "ones; names alone do not show which layers the model has, so pass --model"
        )
    return sorted(first)


def _dtype(vectors: SiteTensors) -> torch.dtype:
    """Vectors are fp32 at least: in half precision small updates are lost."""
    doubles = any(value.dtype == torch.float64 for parts in vectors.values() for value in parts.values())
    return torch.float64 if doubles else torch.float32


def _kinds() -> str:
    return ", ".join(f"{kind.name!r} ({' and '.join(kind.names)})" for kind in KINDS.values())


_ADVICE = "pass --model with the base model's id, folder or config.json, or state it by --position"
