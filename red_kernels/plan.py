"""Finding what to edit in a model, and checking all of it before anything is changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .config import RedConfig
from .edit_module import NAME, RedEdit
from .edits.kinds import Kind
from .models import FAMILIES, Layout, Point, child_at, family_of, first_path
from .models.handoff import NextNorm
from .models.norms import norm_spec
from .module_facts import device_of, experts_in, experts_remark, linear_patterns, output_width, wrapper_of
from .next_norm import Place, next_norm, resolved, unusable
from .patched import is_patched, recognised, recognised_point
from .report import SiteReport, listed

__all__ = [
    "Plan",
    "PlannedBlock",
    "PlannedSite",
    "bias_flags",
    "known_sites",
    "make_plan",
    "plan_edited",
]


@dataclass(frozen=True)
class PlannedSite:
    """One site to edit: by a hook on the module, or inside of the forward of `layer`, to which `path` is relative."""

    module: nn.Module
    width: int
    device: torch.device
    report: SiteReport
    layer: nn.Module | None = None
    path: tuple[str, ...] = ()
    of_tuple: bool = False  # whether the module may return a tuple, of which the first is edited
    norm: str = ""  # name in the module of the norm that its output ends in, to merge into
    bias_flag: str = ""  # attribute of the model's config that gives this linear layer a bias
    caller: nn.Module | None = None  # whose forward always calls the module, where there is one
    caller_name: str = ""


@dataclass(frozen=True)
class PlannedBlock:
    """A block to fuse, with `norm` and `stack` where a norm behind it takes part."""

    module: nn.Module
    layout: Layout
    link: NextNorm | None = None
    norm: nn.Module | None = None
    stack: nn.Module | None = None


@dataclass
class Plan:
    """All that `patch` is going to do."""

    sites: list[PlannedSite] = field(default_factory=list)
    blocks: list[PlannedBlock] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def make_plan(model: nn.Module, config: RedConfig) -> Plan:
    """What to do to patch a model. Raises ValueError as `red_kernels.patch.patch` says; changes nothing."""
    for name, module in model.named_modules():
        if isinstance(module, RedEdit):
            raise ValueError(
                f"model: this {type(model).__name__} is already patched (at {name}); call rk.unpatch first. If it was "
                "patched through another model that shares these modules, unpatch that one"
            )
        wrapper = wrapper_of(module)
        if wrapper is not None:
            where = f"in {name!r}" if name else "around it"
            raise ValueError(f"model: has a {wrapper} {where}, which would not know the vectors; patch before wrapping")
    plan = _plan_known(model, config) if config.sites is None else _plan_named(model, config)
    _only_one_name((site.module, site.report.site) for site in plan.sites)
    return plan


def _only_one_name(named: Iterable[tuple[nn.Module, str]]) -> None:
    names: dict[int, str] = {}
    for module, name in named:
        first = names.setdefault(id(module), name)
        if first != name:
            raise ValueError(f"model: {first} and {name} are the same module; one edit cannot be in both")


def _plan_named(model: nn.Module, config: RedConfig) -> Plan:
    plan = Plan()
    assert config.sites is not None
    modules = dict(model.named_modules())
    chosen: dict[str, nn.Module] = {}
    for pattern in config.sites:
        matched = {name: module for name, module in modules.items() if name and fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(
                f"sites: {pattern!r} matches no module of this {type(model).__name__}; its linear layers are "
                f"{linear_patterns(model)}"
            )
        chosen.update(matched)
    for name, module in modules.items():
        if name not in chosen:
            continue
        parent, _, _ = name.rpartition(".")
        if isinstance(modules[parent], nn.MultiheadAttention):
            raise ValueError(
                f"sites: {name!r} is inside of an nn.MultiheadAttention, which reads its weights without calling it: "
                "an edit there would never be applied"
            )
        width = output_width(module)
        if width is None:
            raise ValueError(
                f"sites: {name!r} is a {type(module).__name__}, whose output is not known to be one tensor of a fixed "
                f"width; name linear layers or norms{experts_remark(module, name)}"
            )
        report = SiteReport(name, width, None, "named by sites=")
        # What is in a list may be called or not.
        caller = None if isinstance(modules[parent], (nn.ModuleList, nn.ModuleDict)) else modules[parent]
        plan.sites.append(
            PlannedSite(module, width, device_of(module, model), report, caller=caller, caller_name=parent)
        )
    experts = experts_in(model)
    if experts:
        plan.warnings.append(f"not edited, as their weights are one 3-D Parameter for all experts: {listed(experts)}")
    return plan


def _plan_known(model: nn.Module, config: RedConfig) -> Plan:
    plan = Plan()
    for place, sites in _chosen(model, config, plan.warnings):
        _plan_layer(plan, model, place, sites, config.edit_kind)
    lists = _unknown_lists(model)
    if lists:
        plan.warnings.append(f"not edited, as their layers are not known: {listed(lists)}")
    return plan


def known_sites(model: nn.Module, config: RedConfig) -> dict[str, str]:
    """The sites that a position edits in the known layers, edited already or not, in the model's order.

    Returns:
        The name of each, and that of the norm in it by which its output ends; empty where there is none.

    Raises:
        ValueError: as `make_plan`, of the layers.
    """
    return {
        ".".join((place.name, *resolved(place.layer, path))): _norm_inside(place, path)
        for place, sites in _chosen(model, config, [])
        for _, path in sites
    }


def plan_edited(model: nn.Module) -> Plan:
    """How to fuse the edits that a model's sites have already, but for blocks that are; changes nothing."""
    plan = Plan()
    for place in _places(model):
        for path, (layout, _) in _layouts(place).items():
            block = child_at(place.layer, path)
            if layout is None or block is None or is_patched(block):
                continue
            if any(_edited(block, point) for point in layout.points):
                plan.blocks.append(_planned_block(place, layout))
    return plan


def bias_flags(model: nn.Module) -> dict[str, str]:
    """The linear layers to which an attribute of the model's config gives a bias, and that attribute."""
    return {
        ".".join((place.name, *resolved(place.layer, path))): flag
        for place in _places(model)
        for path, flag in place.family.bias_flags.items()
    }


def _edited(block: nn.Module, point: Point) -> bool:
    site = child_at(block, point.site)
    edited = site is not None and isinstance(site._modules.get(NAME), RedEdit)
    return edited and recognised_point(point, block) is None


def _chosen(model: nn.Module, config: RedConfig, warnings: list[str]) -> list[tuple[Place, list[tuple[str, str]]]]:
    """The layers to edit, and the place in the layer and the path of each of their sites."""
    places = list(_places(model))
    if not places:
        raise ValueError(_no_sites(model))
    _only_one_name((place.layer, place.name) for place in places)
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


def _places(model: nn.Module) -> Iterator[Place]:
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


def _unknown_lists(model: nn.Module) -> list[str]:
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


def _plan_layer(plan: Plan, model: nn.Module, place: Place, sites: list[tuple[str, str]], edit: Kind) -> None:
    """Plan the sites of one layer, and the blocks of it that can be fused."""
    layouts = _layouts(place)
    blocks: dict[str, PlannedBlock] = {}
    for kind, path in sites:
        site = child_at(place.layer, path)
        assert site is not None
        inside = kind in place.family.inside
        found, reason = _point(place, layouts, kind, path)
        name = ".".join((place.name, *resolved(place.layer, path)))
        if inside and found is None:
            raise ValueError(
                f"model: the residual stream behind the attention of {place.name} is no module's output, and only a "
                f"known forward can edit it: {reason}; choose another position, or other layers by layers="
            )
        fused: str | None = None
        if found is not None:
            layout, point = found
            if layout.block not in blocks:
                blocks[layout.block] = _planned_block(place, layout)
            fused, reason = _fused_with(blocks[layout.block], point, place)
        if edit.kernel is None:
            fused, reason = None, f"edits of kind {edit.name!r} have no fused kernel"
        remark = place.family.remarks.get(path, "")
        report = SiteReport(name, _width(site, place, name), fused, "; ".join(filter(None, (reason, remark))))
        plan.sites.append(
            PlannedSite(
                site,
                report.width,
                device_of(site, model),
                report,
                layer=place.layer if inside else None,
                path=tuple(resolved(place.layer, path)) if inside else (),
                of_tuple=kind in ("res", "attn_res"),
                norm=_norm_inside(place, path),
                bias_flag=place.family.bias_flags.get(path, ""),
                caller=None if site is place.layer or inside else place.layer,
                caller_name=place.name,
            )
        )
    plan.blocks.extend(blocks.values())


def _norm_inside(place: Place, path: str) -> str:
    norm = place.family.norms.get(path)
    if norm is None:
        return ""
    return "." if norm == path else norm.removeprefix(path).removeprefix(".")


def _layouts(place: Place) -> dict[str, tuple[Layout | None, str]]:
    """The layout of each block of a layer by the block's path, or why it has none that is known."""
    found: dict[str, tuple[Layout | None, str]] = {}
    if "forward" in place.layer.__dict__:
        reason = f"the forward of {type(place.layer).__name__} was replaced"
        return {layout.block: (None, reason) for layout in place.family.layouts}
    for layout in place.family.layouts:
        former, reason = found.get(layout.block, (None, ""))
        block = child_at(place.layer, layout.block)
        if former is not None or block is None:
            continue
        different = recognised(layout, block)
        found[layout.block] = (layout, "") if different is None else (None, reason or different)
    return found


def _point(
    place: Place, layouts: dict[str, tuple[Layout | None, str]], kind: str, path: str
) -> tuple[tuple[Layout, Point] | None, str]:
    """The layout and its point by which a site is fused; else why it is not."""
    reasons = []
    described = False
    for layout in place.family.layouts:
        for point in layout.points:
            if point.place != kind or ".".join(filter(None, (layout.block, point.site))) != path:
                continue
            described = True
            known, reason = layouts.get(layout.block, (None, ""))
            if known is None:
                reasons.append(reason)
            if known is not layout:
                continue
            block = child_at(place.layer, layout.block)
            assert block is not None
            different = recognised_point(point, block)
            if different is None:
                return (layout, point), ""
            reasons.append(different)
    if reasons or not described:
        return None, next(filter(None, reasons), "")
    if kind in place.family.inside:
        return None, f"in this {type(place.layer).__name__} attention and FFN share one residual add"
    return None, ""


def _planned_block(place: Place, layout: Layout) -> PlannedBlock:
    block = child_at(place.layer, layout.block)
    assert block is not None
    if not layout.hands_on:
        return PlannedBlock(block, layout)
    link, norm = next_norm(place, layout)
    if link is None:
        return PlannedBlock(block, layout)
    assert isinstance(norm, nn.Module)
    return PlannedBlock(block, layout, link, norm, place.stack)


def _fused_with(block: PlannedBlock, point: Point, place: Place) -> tuple[str | None, str]:
    """What a point's edit is fused with, and why not with more."""
    if point.norm:
        own_norm = unusable(child_at(block.module, point.norm), "its own norm")
        if own_norm:
            return point.bare, own_norm
    if "{next}" not in point.fuses:
        return point.fuses, ""
    if block.norm is None:
        reason = next_norm(place, block.layout)[1]
        return point.alone or None, str(reason)
    spec = norm_spec(type(block.norm))
    assert spec is not None
    assert block.link is not None
    of = "next sublayer's" if block.layout.then else "final" if not block.link.enters else "next layer's"
    return point.fuses.format(next=f"{of} {spec.title}"), ""


def _width(site: nn.Module, place: Place, name: str) -> int:
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
