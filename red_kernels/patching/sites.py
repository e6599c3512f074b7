"""The sites of a model: the layers that are known, and the modules in them whose output a position edits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from ..edits.config import RedConfig
from ..fusion.norms import norm_spec
from ..fusion.paths import child_at, first_path
from ..models import FAMILIES, Family, family_of
from ..support.text import listed
from .module_facts import experts_in, linear_patterns, output_width

__all__ = [
    "Place",
    "bias_flags",
    "check_names",
    "chosen",
    "known_sites",
    "norm_inside",
    "places_in",
    "resolved",
    "unknown_lists",
    "width_of",
]


@dataclass(frozen=True)
class Place:
    """A layer of a known family: in the list `stack.<key>`, at `index`."""

    name: str
    layer: nn.Module
    family: Family
    stack: nn.Module
    list_key: str
    index: int


def known_sites(model: nn.Module, config: RedConfig) -> dict[str, str]:
    """The sites that a position edits in the known layers, edited already or not, in the model's order.

    Returns:
        The name of each, and that of the norm in it by which its output ends; empty where there is none.

    Raises:
        ValueError: as `make_plan`, of the layers.
    """
    return {
        ".".join((place.name, *resolved(place.layer, path))): norm_inside(place, path)
        for place, sites in chosen(model, config, [])
        for _, path in sites
    }


def bias_flags(model: nn.Module) -> dict[str, str]:
    """The linear layers to which an attribute of the model's config gives a bias, and that attribute."""
    return {
        ".".join((place.name, *resolved(place.layer, path))): flag
        for place in places_in(model)
        for path, flag in place.family.bias_flags.items()
    }


def check_names(named: Iterable[tuple[nn.Module, str]]) -> None:
    names: dict[int, str] = {}
    for module, name in named:
        first = names.setdefault(id(module), name)
        if first != name:
            raise ValueError(f"model: {first} and {name} are the same module; one edit cannot be in both")


def chosen(model: nn.Module, config: RedConfig, warnings: list[str]) -> list[tuple[Place, list[tuple[str, str]]]]:
    """The layers to edit, and the place in the layer and the path of each of their sites."""
    places = list(places_in(model))
    if not places:
        raise ValueError(_no_sites(model))
    check_names((place.layer, place.name) for place in places)
    wanted = None if config.layers is None else set(config.layers)
    unknown = _unknown_layers(places)
    asked = [name for name, index in unknown.items() if wanted is None or index in wanted]
    if asked:
        raise ValueError(
            f"model: the layers {listed(asked)} beside known ones are not known; patch before wrapping layers, choose "
            "others by layers=, or name modules by sites="
        )
    if unknown:
        warnings.append(f"not edited, as these layers are not known: {listed(list(unknown))}")
    if wanted is not None:
        missing = sorted(wanted - {place.index for place in places})
        if missing:
            last = max(place.index for place in places)
            raise ValueError(f"layers: {missing} are not in this {type(model).__name__}, whose layers are 0 to {last}")
        places = [place for place in places if place.index in wanted]
    chosen = [(place, _sites_of(place, config)) for place in places]
    lost = {f"{place.name} (no {missing})" for place, (_, missing) in chosen if missing}
    if lost:
        names = [place.name for place, (_, missing) in chosen if missing]
        experts = [name for name in experts_in(model) if any(name.startswith(f"{layer}.") for layer in names)]
        remark = f": the weights of all experts are one 3-D Parameter in {listed(experts)}" if experts else ""
        raise ValueError(
            f"model: not all layers have what position {config.position!r} edits: {listed(sorted(lost))}{remark}; "
            "choose others by layers=, or name modules by sites="
        )
    return [(place, sites) for place, (sites, _) in chosen]


def places_in(model: nn.Module) -> Iterator[Place]:
    for stack_name, stack in model.named_modules():
        for list_key, children in stack.named_children():
            if not isinstance(children, nn.ModuleList):
                continue
            for key, layer in children._modules.items():  # named_children would leave out a layer's second place
                family = None if layer is None else family_of(type(layer))
                if layer is not None and family is not None:
                    name = ".".join(part for part in (stack_name, list_key, key) if part)
                    yield Place(name, layer, family, stack, list_key, int(key))


def _unknown_layers(places: list[Place]) -> dict[str, int]:
    """Layers of unknown make in the lists of the known ones, such as a wrapper around one: their names and indices."""
    found: dict[str, int] = {}
    for place in places:
        layers = place.stack._modules[place.list_key]
        assert layers is not None
        for key, child in layers._modules.items():
            if child is not None and family_of(type(child)) is None and _has_linear_layers(child):
                name = f"{place.name.rpartition('.')[0]}.{key} ({type(child).__name__})"
                found[name] = int(key)
    return found


def _has_linear_layers(module: nn.Module) -> bool:
    return any(output_width(part) is not None for part in module.modules())


def unknown_lists(model: nn.Module) -> list[str]:
    """Lists of layers with linear layers in them, beside the known ones: a vision tower, for instance."""
    found: list[str] = []
    inside: list[str] = []  # prefixes of what has been looked at
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if family_of(type(module)) is not None:
            inside.append(f"{name}.")
        elif isinstance(module, nn.ModuleList) and len(module) > 1:
            kinds = {type(child) for child in module}
            if any(map(_has_linear_layers, module)) and all(family_of(kind) is None for kind in kinds):
                found.append(f"{name} ({', '.join(sorted(kind.__name__ for kind in kinds))})")
                inside.append(f"{name}.")
    return found


def _sites_of(place: Place, config: RedConfig) -> tuple[list[tuple[str, str]], str]:
    """The place in the layer and the path of each site that a position edits there; and what is missing."""
    sites: list[tuple[str, str]] = []
    for kind in config.places:
        entries = place.family.sites.get(kind)
        if entries is None:
            return (
                [],
                "residual stream behind its attention, which runs beside the FFN" if kind == "attn_res" else kind,
            )
        for entry in entries:
            path = first_path(place.layer, entry)
            if path is not None:
                sites.append((kind, path))
            elif not entry.endswith("?"):
                return [], entry
    order = {id(module): at for at, module in enumerate(place.layer.modules())}
    sites.sort(key=lambda site: (site[0] == "res", order[id(child_at(place.layer, site[1]))]))
    return sites, ""


def norm_inside(place: Place, path: str) -> str:
    norm = place.family.norms.get(path)
    if norm is None:
        return ""
    return "." if norm == path else norm.removeprefix(path).removeprefix(".")


def width_of(site: nn.Module, place: Place, name: str) -> int:
    width = output_width(site) or _stream_width(place)
    if width is None:
        raise ValueError(f"model: the width of the output of {name}, a {type(site).__name__}, cannot be told")
    return width


def _stream_width(place: Place) -> int | None:
    """The width of the residual stream, by a norm of the layer: for a site that does not say its own."""
    # Norms of queries and keys are deeper in and may be as narrow as a head.
    for module in (*place.layer.children(), *place.layer.modules()):
        if norm_spec(type(module)) is not None:
            return output_width(module)
    return None


def _no_sites(model: nn.Module) -> str:
    supported = "; ".join(family.name for family in FAMILIES)
    experts = experts_in(model)
    remark = (
        f" The weights of all experts are one 3-D Parameter in {listed(experts)}: no module gives their output."
        if experts
        else ""
    )
    return (
        f"model: {type(model).__name__} has no layers that are known; supported: {supported}.{remark} For another "
        f"layout name the modules whose output is to be edited, as in RedConfig(sites='*.down_proj'); its linear "
        f"layers are {linear_patterns(model)}"
    )


def resolved(layer: nn.Module, path: str) -> list[str]:
    """The parts of a path, `-1` replaced by the name it stands for."""
    parts: list[str] = []
    module: nn.Module | None = layer
    for part in path.split(".") if path else ():
        if part == "-1" and module is not None:
            part = next(reversed(module._modules), "")
        parts.append(part)
        module = None if module is None else module._modules.get(part)
    return parts
