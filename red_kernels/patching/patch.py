"""Patching a model: its sites get vectors, its layers run the fused operations, and `unpatch` undoes all of it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..edits.config import RedConfig
from ..edits.find import STATE, PatchState, patches_of, wrapper_of
from ..edits.lies import spread_vectors
from ..edits.module import EDITED, NAME, SITE, Edited, RedEdit, refuse_site
from ..edits.selection import Selection
from ..edits.stream import STREAM, Stream, close_stream, open_stream
from ..fusion.fingerprint import BASE
from ..fusion.inputs import input_hook
from ..fusion.paths import child_at
from ..fusion.site import BEHIND, behind_hook, edit_hook
from ..support.text import listed
from .classes import carry, is_patched, patch_dropout, patch_norm, patch_scope, prepare_classes, unpatch_module
from .expect import expected
from .heads import find_head, release_head
from .plan import Plan, PlannedSite, make_plan
from .pretrained import unwrap_saving, wrap_saving
from .report import IN_FRONT, PatchReport, SiteReport, count_parameters
from .split import Split, mesh_of, split_of
from .watch import Site, missing, stop_watching, watch

__all__ = ["attach", "edit_config", "fuse", "patch", "patch_with", "unpatch"]


def patch(model: nn.Module, config: RedConfig | None = None, *, example: Any = None) -> PatchReport:
    """Edit a model in place, as RED does (arXiv 2402.15179): freeze it and give each site a trainable scale and bias.

    A site is the module whose output is edited; at position `"ia3"` it may also be one whose input is edited. It gets a
    child `red_edit` with the Parameters `scale` and `bias` of shape `(width,)`, on its device. The structure of the
    model determines the sites, whatever its architecture. The addition and the norm behind a site apply its edit in one
    pass. If another function takes the output, the edit is a pass of its own. Only this instance is changed. No random
    numbers are drawn.

    Args:
        model: any model whose layers have an FFN or an attention, or modules named by `config.sites`. Patch before
            wrapping it for distributed training.
        config: the position, the kind and more; `RedConfig()` if None.
        example: the arguments of a call of the model: a dict, a tuple, or a single one. With it the report states the
            expected fusion before the first forward; transformers' models need none.

    Returns:
        A `PatchReport`; `print` shows a table.

    Raises:
        TypeError: model or config has another type.
        ValueError: the model is patched already, has no sites, or none of the requested layers, stacks or sites; one
            layer is in two places; or it has no head to train (`train_head`). Nothing is changed then.
    """
    return patch_with(model, config, {}, stacklevel=3, example=example)


def patch_with(
    model: nn.Module,
    config: RedConfig | None,
    edits: Mapping[str, RedEdit],
    stacklevel: int = 2,
    example: Any = None,
) -> PatchReport:
    """As `patch`, with the former edits of sites of these names; the other sites get new ones."""
    config = RedConfig() if config is None else config
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(config, RedConfig):
        raise TypeError(f"config: got {type(config).__name__}, expected a RedConfig")
    plan = make_plan(model, config)
    for site in plan.sites:
        _check_free(site)
        refuse_site(config.edit_kind, site.module, site.width, f"model: {site.report.site}", site.on_input)
    splits = _splits(model, plan.sites, config)
    head = find_head(model, [site.report.site for site in plan.sites], config)
    with torch.inference_mode(False):  # a Parameter made in inference mode can never be trained
        made = _made(plan.sites, config, edits, splits)
    prepare_classes([*plan.blocks, *plan.stacks], plan.norms, plan.dropouts)
    parameters = {name: own for name, own in model.named_parameters() if own.requires_grad}
    state = PatchState(config, set(parameters), {site.report.site: (site.norm, site.bias_flag) for site in plan.sites})

    model.__dict__[STATE] = state
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        head.train(model)
        for site, edit in zip(plan.sites, made, strict=True):
            attach(site, edit, edit.root.lies is not None)
            edit.__dict__[SITE] = site.report.site
        for planned in plan.streams:
            stream = Stream(planned.name)
            open_stream(stream, planned.owner, planned.layers)
            for site, edit in zip(plan.sites, made, strict=True):
                if site.report.site in planned.sites:
                    edit.__dict__[STREAM] = stream
        fuse(plan)
        wrap_saving(model, [site.report.site for site in plan.sites], config)
        watch(model, [_watched(site, edit) for site, edit in zip(plan.sites, made, strict=True)])
        foreseen = expected(model, example)
    except BaseException:  # raised by a foreign class or Parameter
        _take_back(model, state)
        raise
    for text in plan.warnings:
        warnings.warn(text, stacklevel=stacklevel)
    trainable, total = count_parameters(model)
    return PatchReport(
        type(model).__name__,
        config,
        tuple(_foreseen(_told(site, split), foreseen) for site, split in zip(plan.sites, splits, strict=True)),
        trainable,
        total,
        tuple(plan.warnings),
        trained_head=head.trained_modules,
        frozen_head=head.frozen_modules,
        edits={site.report.site: weakref.ref(edit) for site, edit in zip(plan.sites, made, strict=True)},
    )


def _splits(model: nn.Module, sites: list[PlannedSite], config: RedConfig) -> list[Split | None]:
    """How tensor parallelism splits the sites; None for each if the model is whole in this process."""
    mesh = mesh_of(model)
    return [None] * len(sites) if mesh is None else [*split_of(model, sites, config.edit_kind, mesh)]


def _made(
    sites: list[PlannedSite], config: RedConfig, edits: Mapping[str, RedEdit], splits: list[Split | None]
) -> list[RedEdit]:
    """The edits of the sites: their former ones, or new ones."""
    selection, kind = Selection(), config.edit_kind
    made: list[RedEdit] = []
    leads: dict[int, RedEdit] = {}
    for site, split in zip(sites, splits, strict=True):
        edit = edits.get(site.report.site)
        if edit is None:
            lead = leads.get(site.width)
            edit = RedEdit(site.width, kind, config.dtype, site.device, selection, lead=lead)
            if split is not None and lead is None:
                spread_vectors(edit, split.mesh, (split.placement,))
                edit.lies = split.lies
        if kind.shared:
            leads.setdefault(site.width, edit)
        made.append(edit)
    return made


def _told(site: PlannedSite, split: Split | None) -> SiteReport:
    remark = "" if split is None else split.remark
    return replace(site.report, remark="; ".join(filter(None, (site.report.remark, remark))))


def _foreseen(site: SiteReport, found: Mapping[str, tuple[str | None, str]]) -> SiteReport:
    if site.of_input:
        return replace(site, reason="; ".join(filter(None, (site.reason or IN_FRONT, site.remark))))
    if site.site not in found:
        unknown = site.reason or "its fusion is known after the first forward"
        return replace(site, reason="; ".join(filter(None, (unknown, site.remark))))
    fused, reason = found[site.site]
    return replace(site, fused=fused, reason="; ".join(filter(None, (reason or site.reason, site.remark))))


def unpatch(model: nn.Module) -> None:
    """Undo a patch: restore classes, forwards and `requires_grad`, and remove the vectors.

    Raises:
        ValueError: the model is not patched, or was wrapped for distributed training since, or a patched layer was
            wrapped otherwise. Nothing is changed then.
    """
    patches = patches_of(model)
    for name, module in model.named_modules():
        subclassed = not is_patched(module) and any(BASE in kind.__dict__ for kind in type(module).__mro__)
        if subclassed or wrapper_of(module) is not None:
            where = f"{name} was" if name else "it was"
            raise ValueError(f"model: {where} wrapped after patching, in {type(module).__name__}; unwrap it first")
    lost: list[str] = []
    for holder, state in patches.values():
        lost += _take_back(holder, state)
    if lost:
        warnings.warn(
            f"parameters that were trainable before patching have other names now and stay frozen: {listed(lost)}",
            stacklevel=2,
        )


def edit_config(model: nn.Module) -> RedConfig:
    """The config that a model was patched with.

    Raises:
        ValueError: the model is not patched, its parts were patched by different configs, or a site was replaced or has
            lost its hook.
    """
    patches = patches_of(model)
    for holder, _ in patches.values():
        wrong, left_out = missing(holder)
        if wrong:
            raise ValueError(
                f"model: edits that rk.patch made are gone: {listed(wrong)}; call rk.unpatch and patch it again"
            )
        if left_out:
            warnings.warn(f"the layers of the edits at {listed(left_out)} are no longer in the model", stacklevel=3)
    configs = [state.config for _, state in patches.values()]
    if any(config != configs[0] for config in configs):
        raise ValueError(
            f"model: the parts of this {type(model).__name__} were patched by different configs: "
            f"{listed(list(patches))}; pass each part by itself"
        )
    return configs[0]


def attach(site: PlannedSite, edit: RedEdit, parallel: bool = False) -> None:
    """Give a site its vectors and the hook that applies them.

    With `parallel`, other hooks of the module may turn this process's part into a DTensor and back; the edit is of the
    plain tensor outside of these hooks.
    """
    edit.train(site.module.training)
    edit.of_tuple, edit.place, edit.on_input = site.of_tuple, site.place, site.on_input
    edit.inside = site.inside or site.hooked is not None
    site.module._modules[NAME] = edit
    edit.__dict__[EDITED] = Edited(site.module)
    if site.on_input:
        if input_hook not in site.module._forward_pre_hooks.values():
            nn.Module.register_forward_pre_hook(site.module, input_hook, prepend=parallel, with_kwargs=True)
        return
    hooked, hook = (site.module, edit_hook) if site.hooked is None else (site.hooked, behind_hook)
    if site.hooked is not None:
        site.hooked.__dict__[BEHIND] = edit, site.hooked
    if hook not in hooked._forward_hooks.values():
        nn.Module.register_forward_hook(hooked, hook, prepend=not parallel)


def fuse(plan: Plan) -> None:
    """Let values wait in the planned blocks, and let the norms take them."""
    for module in plan.stacks:
        patch_scope(module, stack=True)
    for module in plan.blocks:
        patch_scope(module, stack=False)
    for norm in plan.norms:
        patch_norm(norm)
    for dropout in plan.dropouts:
        patch_dropout(dropout)
    for module, edited in plan.carriers:
        own: Any = edited._modules[NAME]
        if own.place != "res":
            carry(module, own)
    for site in plan.sites:
        inner = child_at(site.module, "" if site.norm == "." else site.norm) if site.norm else site.hooked or site.last
        if inner is not None:
            edit: Any = site.module._modules[NAME]
            patch_norm(inner, (edit, site.hooked or site.module))


def _check_free(site: PlannedSite) -> None:
    if NAME in site.module._modules or hasattr(site.module, NAME):
        raise ValueError(
            f"model: {site.report.site}, a {type(site.module).__name__}, has an attribute {NAME!r} of its own, the "
            "name of the edit; rename the attribute, or choose other layers by layers="
        )


def _watched(site: PlannedSite, edit: RedEdit) -> tuple[Site, nn.Module | None, str]:
    name, caller = site.report.site, site.caller
    inner = name if caller is None else name.removeprefix(site.caller_name).removeprefix(".")
    return Site(name, tuple(inner.split(".")) if inner else (), edit), caller, site.caller_name


def _take_back(holder: nn.Module, state: PatchState) -> list[str]:
    """Undo one patch; returns the names of trainable parameters that no longer exist."""
    for module in list(holder.modules()):
        unpatch_module(module)
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if hook in (edit_hook, behind_hook)]:
            del hooks[key]
        before = module._forward_pre_hooks
        for key in [key for key, hook in before.items() if hook is input_hook]:
            del before[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        module.__dict__.pop(BEHIND, None)
        if isinstance(module._modules.get(NAME), RedEdit):
            del module._modules[NAME]
        close_stream(module)
        stop_watching(module)
        unwrap_saving(module)
    release_head(holder)
    parameters = dict(holder.named_parameters())
    for name in state.were_trainable & parameters.keys():
        parameter = parameters[name]
        with torch.inference_mode(parameter.is_inference()):  # torch refuses it otherwise
            parameter.requires_grad = True
    del holder.__dict__[STATE]
    return sorted(state.were_trainable - parameters.keys())
