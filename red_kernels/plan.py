"""Finding what to edit in a model, and checking all of it before anything is changed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .config import RedConfig
from .edit_module import RedEdit
from .models import FAMILIES, Family, Layout, child_at, family_of
from .models.fingerprint import unwrapped
from .models.handoff import NextNorm, Step
from .models.norms import norm_spec
from .patched import recognised, unknown_forward
from .report import SiteReport, listed

__all__ = ["Plan", "PlannedSite", "make_plan", "wrapper_of"]

_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


@dataclass(frozen=True)
class PlannedSite:
    """One site to edit; `block` is what to fuse it in, with `norm` and `stack` if the next layer's norm takes part."""

    module: nn.Module
    width: int
    device: torch.device
    report: SiteReport
    block: tuple[nn.Module, Layout, NextNorm | None] | None = None
    norm: nn.Module | None = None
    stack: nn.Module | None = None


@dataclass
class Plan:
    """All that `patch` is going to do."""

    sites: list[PlannedSite] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Place:
    """A layer of a known family: in the list `stack.<key>`, at `index`."""

    name: str
    layer: nn.Module
    family: Family
    stack: nn.Module
    list_key: str
    index: int


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


def wrapper_of(module: nn.Module) -> str | None:
    """The name of the class that has wrapped a module for distributed training, or None."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), None)


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
                f"{_linear_patterns(model)}"
            )
        chosen.update(matched)
    for name, module in modules.items():
        if name not in chosen:
            continue
        width = _output_width(module)
        if width is None:
            raise ValueError(
                f"sites: {name!r} is a {type(module).__name__}, whose output is not known to be one tensor of a fixed "
                f"width; name linear layers or norms{_experts_remark(module, name)}"
            )
        report = SiteReport(name, width, None, "named by sites=")
        plan.sites.append(PlannedSite(module, width, _device(module, model), report))
    experts = _experts(model)
    if experts:
        plan.warnings.append(f"not edited, as their weights are one 3-D Parameter for all experts: {listed(experts)}")
    return plan


def _plan_known(model: nn.Module, config: RedConfig) -> Plan:
    places = list(_places(model))
    if not places:
        raise ValueError(_no_sites(model))
    _only_one_name((place.layer, place.name) for place in places)
    wanted = None if config.layers is None else set(config.layers)
    plan = Plan()
    unknown = _unknown_layers(places)
    asked = [name for name, index in unknown.items() if wanted is None or index in wanted]
    if asked:
        raise ValueError(
            f"model: the layers {listed(asked)} beside known ones are not known; patch before wrapping layers, choose "
            "others by layers=, or name modules by sites="
        )
    if unknown:
        plan.warnings.append(f"not edited, as these layers are not known: {listed(list(unknown))}")
    if wanted is not None:
        missing = sorted(wanted - {place.index for place in places})
        if missing:
            last = max(place.index for place in places)
            raise ValueError(f"layers: {missing} are not in this {type(model).__name__}, whose layers are 0 to {last}")
        places = [place for place in places if place.index in wanted]
    lost: list[str] = []
    for place in places:
        site = child_at(place.layer, place.family.site)
        if site is None:
            lost.append(place.name)
        else:
            plan.sites.append(_planned(model, place, site))
    if lost:
        experts = [name for name in _experts(model) if any(name.startswith(f"{layer}.") for layer in lost)]
        remark = f": the weights of all experts are one 3-D Parameter in {listed(experts)}" if experts else ""
        raise ValueError(
            f"model: the layers {listed(lost)} have no {places[0].family.site} to edit{remark}; choose others by "
            "layers=, or name modules by sites="
        )
    lists = _unknown_lists(model)
    if lists:
        plan.warnings.append(f"not edited, as their layers are not known: {listed(lists)}")
    return plan


def _places(model: nn.Module) -> Iterator[_Place]:
    for stack_name, stack in model.named_modules():
        for list_key, children in stack.named_children():
            if not isinstance(children, nn.ModuleList):
                continue
            for key, layer in children._modules.items():  # named_children would leave out a layer's second place
                family = None if layer is None else family_of(type(layer))
                if layer is not None and family is not None:
                    name = ".".join(part for part in (stack_name, list_key, key) if part)
                    yield _Place(name, layer, family, stack, list_key, int(key))


def _unknown_layers(places: list[_Place]) -> dict[str, int]:
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
    return any(_output_width(part) is not None for part in module.modules())


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


def _planned(model: nn.Module, place: _Place, site: nn.Module) -> PlannedSite:
    name = ".".join((place.name, *_resolved(place.layer, place.family.site)))
    width = _output_width(site) or _stream_width(place)
    if width is None:
        raise ValueError(f"model: the width of the output of {name}, a {type(site).__name__}, cannot be told")
    device = _device(site, model)
    layout, reason = _layout(place)
    if layout is None:
        return PlannedSite(site, width, device, SiteReport(name, width, None, reason))
    block = child_at(place.layer, layout.block)
    assert block is not None
    own_norm = _unusable(child_at(block, layout.norm), "its own norm") if layout.norm else ""
    if own_norm:
        report = SiteReport(name, width, layout.bare, own_norm)
        return PlannedSite(site, width, device, report, (block, layout, None))
    if "{next}" not in layout.fuses:
        return PlannedSite(site, width, device, SiteReport(name, width, layout.fuses), (block, layout, None))
    enters, found = _next_norm(place)
    known = place.family.known
    if layout.block:
        found = unknown_forward(place.layer, known[""]) or found
    if isinstance(found, str):
        report = SiteReport(name, width, layout.alone, found)
        return PlannedSite(site, width, device, report, (block, layout, None))
    own = (place.list_key, str(place.index))
    leaves = [Step((*own, *_resolved(place.layer, layout.block)) if layout.block else own, layout.known[""])]
    if layout.block:
        leaves.append(Step(own, known[""]))
    *passed, norm = (tuple(path.split(".")) for path in enters)
    steps = [Step(path, known[".".join(path[len(own) :])]) for path in passed]
    link = NextNorm(tuple(leaves), tuple(steps), norm, layout.clamps_half)
    spec = norm_spec(type(found))
    assert spec is not None
    of = "final" if len(enters) == 1 else "next layer's"
    report = SiteReport(name, width, layout.fuses.format(next=f"{of} {spec.title}"))
    return PlannedSite(site, width, device, report, (block, layout, link), found, place.stack)


def _layout(place: _Place) -> tuple[Layout | None, str]:
    """The layout of a layer, or why it has none that is known."""
    reason = ""
    if "forward" in place.layer.__dict__:
        return None, f"the forward of {type(place.layer).__name__} was replaced"
    for layout in place.family.layouts:
        block = child_at(place.layer, layout.block)
        if block is None:
            reason = reason or f"{type(place.layer).__name__} has no {layout.block}"
            continue
        if layout.when is not None and getattr(block, layout.when[0], None) != layout.when[1]:
            continue
        different = recognised(layout, block)
        if different is None:
            return layout, ""
        reason = reason or different
    return None, reason or f"no layout of {type(place.layer).__name__} is known"


def _next_norm(place: _Place) -> tuple[tuple[str, ...], nn.Module | str]:
    """The modules that the layer's output passes until the next norm, named in the stack; and the norm, or why not."""
    forward = unwrapped(type(place.stack).forward)
    if "forward" in place.stack.__dict__ or not forward.__globals__["__name__"].startswith("transformers.models."):
        return (), f"the forward of {type(place.stack).__name__} is not the library's own"
    layers = place.stack._modules[place.list_key]
    assert layers is not None
    following = layers._modules.get(str(place.index + 1))
    if following is not None:
        prefix = f"{place.list_key}.{place.index + 1}"
        enters = tuple(f"{prefix}.{path}" if path else prefix for path in place.family.first_norm)
        if family_of(type(following)) is not place.family:
            return (), f"the next layer is a {type(following).__name__}"
        for path, known in place.family.known.items():
            module = child_at(following, path)
            different = unknown_forward(module, known) if module is not None else f"it has no {path}"
            if different is not None:
                return (), f"in the next layer: {different}"
    elif place.family.final_norm is None:
        return (), "no norm follows the last layer"
    else:
        enters = (place.family.final_norm,)
    norm = child_at(place.stack, enters[-1]) if enters else None
    if norm is None:
        return (), "no norm follows the last layer" if following is None else "the next layer begins with no norm"
    unusable = _unusable(norm, "the next norm")
    return ((), unusable) if unusable else (enters, norm)


def _unusable(norm: nn.Module | None, what: str) -> str:
    """Why a fused operation cannot stand in for a norm, or nothing."""
    if norm is None:
        return f"{what} is missing"
    if "forward" in norm.__dict__:
        return f"the forward of {what}, a {type(norm).__name__}, was replaced"
    if norm_spec(type(norm)) is None:
        return f"{type(norm).__name__}.forward is not one that is known"
    return ""


def _resolved(layer: nn.Module, path: str) -> list[str]:
    """The parts of a path, `-1` replaced by the name it stands for."""
    parts: list[str] = []
    module: nn.Module | None = layer
    for part in path.split("."):
        if part == "-1" and module is not None:
            part = next(reversed(module._modules), "")
        parts.append(part)
        module = None if module is None else module._modules.get(part)
    return parts


def _output_width(module: nn.Module) -> int | None:
    """The width of a module's one output tensor, where it can be told: linear layers of any make, and norms."""
    for name in ("out_features", "nf"):
        width = getattr(module, name, None)
        if isinstance(width, int) and width > 0:
            return width
    if isinstance(module, nn.LayerNorm) or norm_spec(type(module)) is not None:
        weight = getattr(module, "weight", None)
        shape: Any = weight.shape if isinstance(weight, torch.Tensor) else getattr(module, "normalized_shape", ())
        return int(shape[-1]) if len(shape) == 1 else None
    return None


def _stream_width(place: _Place) -> int | None:
    """The width of the residual stream, by the layer's first norm: for a wrapped site that does not say its own."""
    for module in place.layer.modules():
        if norm_spec(type(module)) is not None:
            return _output_width(module)
    return None


def _device(site: nn.Module, model: nn.Module) -> torch.device:
    tensors = (*site.parameters(), *site.buffers())
    device = tensors[0].device if tensors else next((p.device for p in model.parameters()), torch.device("cpu"))
    hook = getattr(site, "_hf_hook", None)
    if device.type == "meta" and hook is not None:  # accelerate keeps the weights elsewhere and brings them here
        for one in (hook, *getattr(hook, "hooks", ())):
            execution = getattr(one, "execution_device", None)
            if execution is not None:
                return torch.device(execution)
    return device


def _experts(model: nn.Module) -> list[str]:
    """Names of the modules whose weights are one 3-D Parameter for all experts."""
    return [
        name
        for name, module in model.named_modules()
        if not hasattr(module, "kernel_size")  # a convolution
        and any(p is not None and p.dim() == 3 and p.shape[0] > 1 for p in module._parameters.values())
    ]


def _experts_remark(module: nn.Module, name: str) -> str:
    inner = [f"{name}.{inner}" if inner else name for inner in _experts(module)]
    return f"; the weights of all experts are one 3-D Parameter in {listed(inner)}" if inner else ""


def _no_sites(model: nn.Module) -> str:
    supported = "; ".join(family.name for family in FAMILIES)
    experts = _experts(model)
    remark = (
        f" The weights of all experts are one 3-D Parameter in {listed(experts)}: no module gives their output."
        if experts
        else ""
    )
    return (
        f"model: {type(model).__name__} has no layers that are known; supported: {supported}.{remark} For another "
        f"layout name the modules whose output is to be edited, as in RedConfig(sites='*.down_proj'); its linear "
        f"layers are {_linear_patterns(model)}"
    )


def _linear_patterns(model: nn.Module) -> str:
    """The names of the linear layers, layer numbers replaced by `*`."""
    names = [name for name, module in model.named_modules() if name and _output_width(module) is not None]
    patterns = dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names)
    return listed(list(patterns)) if patterns else "none"
