"""RED itself, fused and naive, each also compiled, the other kinds of edit, and their frozen baselines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import red_kernels as rk
from red_kernels.edits.find import edit_modules
from red_kernels.edits.kinds import KINDS, kind_named
from red_kernels.finetune.measure import pass_gradients
from red_kernels.patching.naive import naive_edit
from red_kernels.patching.plan import make_plan

from .frame import Method, Prepared


def edited_sites(model: nn.Module, position: str = "ffn") -> dict[str, int]:
    """Name and width of every site that `rk.patch` edits at a position, in the model's order; changes nothing.

    Raises ValueError if it would refuse the model.
    """
    return {site.report.site: site.width for site in make_plan(model, rk.RedConfig(position=position)).sites}


def _frozen(model: nn.Module) -> Prepared:
    first = next(iter(edited_sites(model)))
    model.requires_grad_(False)
    pass_gradients(model, [first])
    return Prepared(model, [])


def _frozen_fused(model: nn.Module) -> Prepared:
    """The floor: the fused residual additions and norms without an edit; the backward is the edited model's.

    `rk.disable_edits` would run the library's own layers, so instead no edit is active.
    """
    rk.patch(model)
    _pass_gradients_unhooked(model.get_submodule(next(iter(rk.edit_parameters(model)))))
    for own in model.parameters():  # the vectors, which no operation reads
        own.requires_grad_(False)
    for edits in edit_modules(model).values():
        edits.selection.chosen = None
    return Prepared(model, [])


def _pass_gradients_unhooked(site: Any) -> None:
    """As `pass_gradients`, without a hook: with a foreign hook a site's output is not fused."""
    forward = site.forward

    def passing(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        return output

    site.forward = passing


def _red(model: nn.Module) -> Prepared:
    rk.patch(model)
    return Prepared(model, [own for parts in rk.edit_parameters(model).values() for own in parts.values()])


def _edited(config: rk.RedConfig) -> Callable[[nn.Module], Prepared]:
    def apply(model: nn.Module) -> Prepared:
        rk.patch(model, config)
        trained = {id(own): own for parts in rk.edit_parameters(model).values() for own in parts.values()}
        return Prepared(model, list(trained.values()), as_frozen=kind_named(config.kind).starts_as_identity)

    return apply


def _naive(model: nn.Module) -> Prepared:
    sites = edited_sites(model)
    return Prepared(model, naive_edit(model, sites, widths=sites).vectors())


def _compiled(inner: Callable[[nn.Module], Prepared]) -> Callable[[nn.Module], Prepared]:
    def apply(model: nn.Module) -> Prepared:
        prepared = inner(model)
        return Prepared(torch.compile(prepared.model, dynamic=False), prepared.trained, prepared.active, prepared.held)

    return apply


METHODS = (
    Method("frozen-fused", "frozen, fused norms (floor)", _frozen_fused),
    Method("frozen", "frozen", _frozen),
    Method("frozen-compile", "frozen under torch.compile", _compiled(_frozen)),
    Method("red", "RED, fused (ours)", _red),
    Method("red-compile", "RED, ours under torch.compile", _compiled(_red)),
    Method("naive", "RED, eager hooks", _naive),
    Method("naive-compile", "RED, hooks under torch.compile", _compiled(_naive)),
)
# The other kinds at position `ffn`, like RED itself; `all` is RED.
KIND_METHODS = tuple(
    Method(name, f"edits of kind {name}, ours", _edited(rk.RedConfig(kind=name))) for name in KINDS if name != "all"
)
# RED at the other positions; at `more` it is the paper's RED++.
POSITION_METHODS = tuple(
    Method(f"red-{position}", f"RED at position {position} (ours)", _edited(rk.RedConfig(position=position)))
    for position in ("attn", "more", "res")
)
