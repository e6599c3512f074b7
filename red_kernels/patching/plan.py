"""Finding the sites of a model, and checking all of them before any change."""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, field

import torch
from torch import nn

from ..edits.config import RedConfig
from ..edits.find import wrapper_of
from ..edits.module import NAME, RedEdit
from ..fusion.norms import could_be_norm, norm_spec
from ..fusion.paths import child_at
from ..models import Block, blocks_in
from ..support.text import listed
from .module_facts import device_of, experts_in, experts_remark, input_width, linear_patterns, output_width
from .post_norm import with_norms
from .report import SiteReport
from .sites import ChosenSite, check_names, chosen
from .streams import CONDITIONAL, PlannedStream, plan_streams

__all__ = ["Plan", "PlannedSite", "make_plan", "plan_edited"]


@dataclass(frozen=True)
class PlannedSite:
    """One site to edit, by a hook on the module; `width` is that of the edited tensor."""

    module: nn.Module
    width: int
    device: torch.device
    report: SiteReport
    place: str = ""
    hooked: nn.Module | None = None  # its output is edited, if not the module's
    last: nn.Module | None = None  # the norm whose output is the module's
    inside: bool = False  # whether the edit is of the sum to which the output is added
    of_tuple: bool = False  # whether the module may return a tuple whose first entry is edited
    norm: str = ""  # name in the module of the norm that gives its output, to merge into
    bias_flag: str = ""  # attribute of the model's config that adds a bias to this linear layer
    caller: nn.Module | None = None  # its forward always calls the module; None if there is none
    caller_name: str = ""
    on_input: bool = False  # whether the input of the module is edited


@dataclass
class Plan:
    """All actions of `patch`."""

    sites: list[PlannedSite] = field(default_factory=list)
    blocks: list[nn.Module] = field(default_factory=list)  # values wait inside them
    stacks: list[nn.Module] = field(default_factory=list)  # a block's sum is handed to the next block inside them
    norms: list[nn.Module] = field(default_factory=list)  # they may read an edited tensor
    dropouts: list[nn.Module] = field(default_factory=list)  # they may be between a site and its addition
    # Last projections with an unedited output, each with an edited site.
    carriers: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    streams: list[PlannedStream] = field(default_factory=list)  # edits read their first input
    warnings: list[str] = field(default_factory=list)


def make_plan(model: nn.Module, config: RedConfig) -> Plan:
    """The plan of a patch. Raises ValueError as `red_kernels.patching.patch.patch` states; changes nothing."""
    for name, module in model.named_modules():
        if isinstance(module, RedEdit):
            raise ValueError(
                f"model: this {type(model).__name__} is already patched (at {name}); call rk.unpatch first. If it was "
                "patched through another model that shares these modules, unpatch that one"
            )
        wrapper = wrapper_of(module)
        if wrapper is not None:
            where = f"in {name!r}" if name else "around it"
            raise ValueError(f"model: has a {wrapper} {where}, which would not see the vectors; patch before wrapping")
    plan = _plan_known(model, config) if config.sites is None else _plan_named(model, config)
    check_names((site.module, site.report.site) for site in plan.sites)
    if "initial" in config.edit_kind.context:
        plan.streams = plan_streams(model, [(site.report.site, site.place, site.width) for site in plan.sites], config)
    return plan


def plan_edited(model: nn.Module) -> Plan:
    """How to fuse the existing edits of a model's sites; changes nothing."""
    plan = Plan()
    found = ((name, module._modules.get(NAME)) for name, module in model.named_modules())
    edits = {name: own for name, own in found if isinstance(own, RedEdit)}
    _plan_around(
        plan,
        model,
        blocks_in(model),
        {name: own.width for name, own in edits.items()},
        {name for name, own in edits.items() if own.on_input},
    )
    return plan


def _plan_known(model: nn.Module, config: RedConfig) -> Plan:
    plan = Plan()
    found = with_norms(chosen(model, config, plan.warnings))
    check_names((block.module, block.name) for block, _ in found)
    for block, sites in found:
        plan.sites += [_planned(model, block, site, config) for site in sites]
    _plan_sites(plan, model, [block for block, _ in found])
    return plan


def _planned(model: nn.Module, block: Block, site: ChosenSite, config: RedConfig) -> PlannedSite:
    module = child_at(block.module, site.path)
    assert module is not None
    name = f"{block.name}.{site.path}" if site.path else block.name
    width = site.width if site.on_input else output_width(module) or site.width
    if not width:
        side = "input" if site.on_input else "output"
        advice = f"; edits of kind {config.kind!r} are of the input of linear layers" if site.on_input else ""
        raise ValueError(f"model: the width of the {side} of {name}, a {type(module).__name__}, is unknown{advice}")
    reason = "" if config.edit_kind.kernel else _unfused(config)
    return PlannedSite(
        module,
        width,
        device_of(module, model),
        SiteReport(name, width, None, reason, site.remark, site.on_input),
        place=site.place,
        hooked=child_at(block.module, site.behind) if site.behind else None,
        last=child_at(block.module, site.last) if site.last else None,
        inside=site.inside,
        of_tuple=not site.on_input,
        norm=site.norm,
        bias_flag=site.bias_flag,
        caller=None if module is block.module or CONDITIONAL.search(site.path) else block.module,
        caller_name=block.name,
        on_input=site.on_input,
    )


def _unfused(config: RedConfig) -> str:
    return f"edits of kind {config.kind!r} have no fused kernel"


def _plan_named(model: nn.Module, config: RedConfig) -> Plan:
    plan = Plan()
    assert config.sites is not None
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for pattern in config.sites:
        matched = {name: module for name, module in modules.items() if name and fnmatch.fnmatchcase(name, pattern)}
        if not matched:
            raise ValueError(
                f"sites: {pattern!r} matches no module of this {type(model).__name__}; its linear layers are "
                f"{linear_patterns(model)}"
            )
        found.update(matched)
    for name, module in modules.items():
        if name not in found:
            continue
        parent, _, _ = name.rpartition(".")
        if isinstance(modules[parent], nn.MultiheadAttention):
            raise ValueError(
                f"sites: {name!r} is inside an nn.MultiheadAttention, which reads its weights without calling it: an "
                "edit there would never be applied"
            )
        on_input = config.edit_kind.on_input
        width = input_width(module) if on_input else output_width(module)
        if width is None and on_input:
            raise ValueError(
                f"sites: {name!r} is a {type(module).__name__}, but edits of kind {config.kind!r} are of the input of "
                "linear layers; name linear layers"
            )
        if width is None:
            raise ValueError(
                f"sites: {name!r} is a {type(module).__name__}, whose output may not be one tensor of a fixed width; "
                f"name linear layers or norms{experts_remark(module, name)}"
            )
        # A module in a list may be called or not.
        caller = None if isinstance(modules[parent], (nn.ModuleList, nn.ModuleDict)) else modules[parent]
        reason = "" if not on_input or config.edit_kind.kernel else _unfused(config)
        report = SiteReport(name, width, None, reason, "named by sites=", on_input)
        device = device_of(module, model)
        plan.sites.append(
            PlannedSite(module, width, device, report, caller=caller, caller_name=parent, on_input=on_input)
        )
    experts = [name for name in experts_in(model) if not any(name.startswith(f"{site}.") for site in found)]
    if experts:
        plan.warnings.append(
            f"not edited, because their weights are one 3-D Parameter for all experts: {listed(experts)}"
        )
    _plan_sites(plan, model, blocks_in(model))
    return plan


def _plan_sites(plan: Plan, model: nn.Module, blocks: list[Block]) -> None:
    """`_plan_around` the sites of a plan."""
    widths = {site.report.site: site.width for site in plan.sites}
    if len(widths) < len(plan.sites):
        names = [site.report.site for site in plan.sites]
        raise ValueError(
            f"model: {listed([name for name in widths if names.count(name) > 1])} would have an edit of the input and "
            "one of the output; expected one edit for each module"
        )
    _plan_around(plan, model, blocks, widths, {site.report.site for site in plan.sites if site.on_input})


def _plan_around(plan: Plan, model: nn.Module, blocks: list[Block], widths: dict[str, int], inputs: set[str]) -> None:
    """Plan the blocks around some sites, the stacks around them, and the norms that may read edited tensors.

    `inputs` are the sites whose input is edited. Their output waits for its addition like that of an unedited
    projection.
    """
    modules = dict(model.named_modules())
    known = sorted(blocks, key=lambda block: -len(block.name))
    scopes: dict[str, nn.Module] = {}
    stacks: dict[str, nn.Module] = {}
    for name in widths:
        block = next((one for one in known if name == one.name or name.startswith(f"{one.name}.")), None)
        if block is not None:
            scopes[block.name] = block.module
            stacks[block.stack] = modules[block.stack]
            continue
        entry = _entry(name, modules)
        if entry:
            scopes[entry] = modules[entry]
            owner = _owner(entry, modules)
            stacks[owner] = modules[owner]
    _plan_carriers(plan, blocks, modules, widths, inputs)
    wanted = {width for name, width in widths.items() if name not in inputs}
    wanted.update(width for module, _ in plan.carriers if (width := output_width(module)) is not None)
    for name in list(stacks):  # the norm behind a stack may belong to its owner
        while name:
            name = name.rpartition(".")[0]
            if any(could_be_norm(child) and output_width(child) in wanted for child in modules[name].children()):
                stacks[name] = modules[name]
    plan.blocks = [module for name, module in scopes.items() if name not in stacks]
    plan.stacks = list(stacks.values())
    for stack in dict.fromkeys((*plan.stacks, *plan.blocks)):
        for module in stack.modules():
            if could_be_norm(module) and output_width(module) in (*wanted, None) and norm_spec(module) is not None:
                plan.norms.append(module)
    plan.norms = list(dict.fromkeys(plan.norms))
    inside_blocks = (module for block in plan.blocks for module in block.modules())
    plan.dropouts = [module for module in dict.fromkeys(inside_blocks) if type(module) is nn.Dropout]


def _plan_carriers(
    plan: Plan, blocks: list[Block], modules: dict[str, nn.Module], widths: dict[str, int], inputs: set[str]
) -> None:
    for block in blocks:
        inside = [name for name in widths if name == block.name or name.startswith(f"{block.name}.")]
        for site in block.sites if inside else ():
            name = f"{block.name}.{site.path}" if site.path else block.name
            module = modules[name]
            unedited = name not in widths or name in inputs
            if site.place in ("attn", "ffn") and unedited and not isinstance(module, nn.MultiheadAttention):
                plan.carriers.append((module, modules[inside[0]]))


def _entry(name: str, modules: dict[str, nn.Module]) -> str:
    """The outermost numbered module around a site: the repeated one, if the structure does not show it."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        inner = ".".join(parts[:count])
        if re.fullmatch(r"[0-9]+", parts[count - 1]) and not isinstance(modules[inner], (nn.ModuleList, nn.Sequential)):
            return inner
    return ".".join(parts[:-1]) if len(parts) > 1 else ""


def _owner(entry: str, modules: dict[str, nn.Module]) -> str:
    """The module that owns the list of an entry."""
    name = entry
    while name:
        name = name.rpartition(".")[0]
        if not isinstance(modules[name], (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            break
    return name
