"""Finding what to edit in a model, and checking all of it before anything is changed."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

import torch
from torch import nn

from ..edits.config import RedConfig
from ..edits.find import wrapper_of
from ..edits.kinds import Kind
from ..edits.module import NAME, RedEdit
from ..fusion.handoff import NextNorm
from ..fusion.norms import norm_spec
from ..fusion.paths import child_at
from ..models import Layout, Point
from ..support.text import listed
from .classes import is_patched
from .module_facts import device_of, experts_in, experts_remark, linear_patterns, output_width
from .next_norm import next_norm
from .recognise import layouts_of, point_of, recognised_point, unusable
from .report import SiteReport
from .sites import Place, check_names, chosen, norm_inside, places_in, resolved, unknown_lists, width_of

__all__ = ["Plan", "PlannedBlock", "PlannedSite", "make_plan", "plan_edited"]


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
    """What to do to patch a model. Raises ValueError as `red_kernels.patching.patch.patch` says; changes nothing."""
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
    check_names((site.module, site.report.site) for site in plan.sites)
    return plan


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
    for place, sites in chosen(model, config, plan.warnings):
        _plan_layer(plan, model, place, sites, config.edit_kind)
    lists = unknown_lists(model)
    if lists:
        plan.warnings.append(f"not edited, as their layers are not known: {listed(lists)}")
    return plan


def plan_edited(model: nn.Module) -> Plan:
    """How to fuse the edits that a model's sites have already, but for blocks that are; changes nothing."""
    plan = Plan()
    for place in places_in(model):
        for path, (layout, _) in layouts_of(place).items():
            block = child_at(place.layer, path)
            if layout is None or block is None or is_patched(block):
                continue
            if any(_edited(block, point) for point in layout.points):
                plan.blocks.append(_planned_block(place, layout))
    return plan


def _edited(block: nn.Module, point: Point) -> bool:
    site = child_at(block, point.site)
    edited = site is not None and isinstance(site._modules.get(NAME), RedEdit)
    return edited and recognised_point(point, block) is None


def _plan_layer(plan: Plan, model: nn.Module, place: Place, sites: list[tuple[str, str]], edit: Kind) -> None:
    """Plan the sites of one layer, and the blocks of it that can be fused."""
    layouts = layouts_of(place)
    blocks: dict[str, PlannedBlock] = {}
    for kind, path in sites:
        site = child_at(place.layer, path)
        assert site is not None
        inside = kind in place.family.inside
        found, reason = point_of(place, layouts, kind, path)
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
        report = SiteReport(name, width_of(site, place, name), fused, "; ".join(filter(None, (reason, remark))))
        plan.sites.append(
            PlannedSite(
                site,
                report.width,
                device_of(site, model),
                report,
                layer=place.layer if inside else None,
                path=tuple(resolved(place.layer, path)) if inside else (),
                of_tuple=kind in ("res", "attn_res"),
                norm=norm_inside(place, path),
                bias_flag=place.family.bias_flags.get(path, ""),
                caller=None if site is place.layer or inside else place.layer,
                caller_name=place.name,
            )
        )
    plan.blocks.extend(blocks.values())


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
