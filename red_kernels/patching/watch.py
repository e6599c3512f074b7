"""Checks that each edit runs: a site may be replaced, lose its hook or be skipped, which no other code would report.

After its forward each layer with sites checks whether its edits ran in this call. Layers of our classes do so
themselves, other layers by a hook. A hook before the patched model's forward checks that these layers are still in the
model. Removed layers, as in an early exit, give one warning. Any other loss is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backends import nodes
from ..edits.module import NAME, RedEdit
from ..fusion.former import INSIDE, refuse_inside
from ..fusion.inputs import input_hook
from ..fusion.paths import walk
from ..fusion.scopes import OWN_HOOKS, SCOPE, SITES
from ..fusion.site import edit_hook, take_reached
from ..fusion.stream import is_lost
from ..support.text import listed

__all__ = [
    "Site",
    "Watch",
    "after_model",
    "before_model",
    "check_layer",
    "layer_hook",
    "missing",
    "stop_watching",
    "watch",
]

_WATCH = "_red_kernels_watch"  # the attribute of a patched model with its `Watch`
_REMEDY = "restore it, or call rk.unpatch(model) and patch the present model"


@dataclass
class Site:
    """An edited site in a module that calls it: the full name, the path in that module, and the edits."""

    name: str
    path: tuple[str, ...]
    own: RedEdit


@dataclass
class Watch:
    """The expected content of a patched model: layers with watched sites, and sites that no layer answers for."""

    layers: list[tuple[tuple[str, ...], nn.Module]] = field(default_factory=list)
    alone: list[Site] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)  # layers outside the model that a warning has named


def watch(model: nn.Module, sites: Iterable[tuple[Site, nn.Module | None, str]]) -> None:
    """Start to watch sites of a model.

    Args:
        model: the patched model.
        sites: each with the layer that calls it in every call, and the layer's name in the model. Without such a layer,
            the site's path is from the model, and its call is checked only once.
    """
    found = Watch()
    for site, layer, name in sites:
        site.own.watched = True
        take_reached(site.own)  # others at this address may have run unchecked
        if layer is None:
            found.alone.append(site)
            continue
        if SITES not in layer.__dict__:
            layer.__dict__[SITES] = []
            if not _asks_itself(layer):
                nn.Module.register_forward_hook(layer, layer_hook)
            found.layers.append((tuple(name.split(".")) if name else (), layer))
        layer.__dict__[SITES].append(site)
    model.__dict__[_WATCH] = found
    nn.Module.register_forward_pre_hook(model, before_model)
    if found.alone:
        nn.Module.register_forward_hook(model, after_model)


def stop_watching(module: nn.Module) -> None:
    """Remove the marks of `watch` from a module."""
    module.__dict__.pop(SITES, None)
    module.__dict__.pop(_WATCH, None)
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook in (layer_hook, after_model, before_model)]:
            del hooks[key]


def missing(model: nn.Module) -> tuple[list[str], list[str]]:
    """The faults of a patched model's sites, each with its name; and the sites whose layer is not in the model."""
    found: Watch | None = model.__dict__.get(_WATCH)
    if found is None:
        return [], []
    wrong: list[str] = []
    left_out: list[str] = []
    for at, (path, layer) in enumerate(found.layers):
        sites: list[Site] = layer.__dict__.get(SITES, [])
        if walk(model, path) is not layer:
            moved = _path_to(model, layer)
            if moved is None:
                left_out += [site.name for site in sites]
                continue
            found.layers[at] = moved, layer
        wrong += [f"{site.name} ({what})" for site in sites if (what := _wrong(layer, site))]
        if not _asks(layer):
            wrong += [f"{site.name} (the hooks of its {type(layer).__name__} were removed)" for site in sites]
    return wrong + [f"{site.name} ({what})" for site in found.alone if (what := _wrong(model, site))], left_out


def before_model(model: nn.Module, args: Any) -> None:
    """The hook before a patched model: RuntimeError for lost edits, a warning for removed layers."""
    if torch.compiler.is_compiling():
        return
    found: Watch | None = model.__dict__.get(_WATCH)
    if found is None or "_is_replica" in model.__dict__:
        return
    if not found.alone and nodes.in_place is not None and nodes.in_place(model, found.layers):
        return
    for path, layer in found.layers:
        if SCOPE in layer.__dict__ and not _asks(layer):  # its forward was replaced
            nn.Module.register_forward_hook(layer, layer_hook)
        if walk(model, path) is not layer or not _asks(layer):
            break
    else:
        for site in found.alone:
            module = walk(model, site.path)
            if module is None or module._modules.get(NAME) is not site.own or _hook_is_lost(module, site.own):
                break
        else:
            return
    wrong, left_out = missing(model)
    if wrong:
        raise RuntimeError(f"model: edits that rk.patch made are gone: {listed(wrong)}; {_REMEDY}")
    new = [name for name in left_out if name not in found.left_out]
    if new:
        found.left_out.update(new)
        warnings.warn(
            f"the layers of the edits at {listed(new)} are not in the running model; if they are removed for good, "
            "call rk.unpatch(model) and patch the present model",
            stacklevel=2,
        )


def after_model(model: nn.Module, args: Any, output: Any) -> None:
    """The hook after a patched model, for sites that are optional: a warning for sites never reached."""
    found: Watch | None = model.__dict__.get(_WATCH)
    if torch.compiler.is_compiling() or found is None or "_is_replica" in model.__dict__:
        return
    never = []
    for site in found.alone:
        if not take_reached(site.own) and not site.own.seen and _excuse(model, site) is None:
            never.append(site.name)
        site.own.seen = True
    if never:
        warnings.warn(
            f"the edits at {listed(never)} were not applied: this forward did not call these modules; does another "
            "module compute their output?",
            stacklevel=2,
        )


def layer_hook(layer: nn.Module, args: Any, output: Any) -> None:
    """The hook after a layer. Raises RuntimeError if one of its edits did not run in this call."""
    if torch.compiler.is_compiling() or _asks_itself(layer):
        return
    check_layer(layer)


def check_layer(layer: nn.Module) -> None:
    """As `layer_hook`."""
    if INSIDE in layer.__dict__:
        refuse_inside(layer)
    for site in layer.__dict__.get(SITES, ()):
        if not take_reached(site.own):
            _explain(layer, site)
        if site.own.inside and is_lost(site.own):
            raise RuntimeError(
                f"model: the edit of the residual stream behind {site.name} cannot be applied: its output was not "
                "added to the stream in its block"
            )


OWN_HOOKS.add(layer_hook)


def _asks_itself(layer: nn.Module) -> bool:
    """Whether the forward of a layer's class checks its edits; it may have been replaced."""
    return SCOPE in layer.__dict__ and "forward" not in layer.__dict__


def _asks(layer: nn.Module) -> bool:
    return _asks_itself(layer) or layer_hook in layer._forward_hooks.values()


def _explain(layer: nn.Module, site: Site) -> None:
    if "_is_replica" in layer.__dict__:  # of DataParallel, which copies modules one by one
        return
    wrong = _wrong(layer, site)
    if not wrong:
        excuse = _excuse(layer, site)
        if excuse is not None:
            return
        wrong = f"the forward of its {type(layer).__name__} did not call the module"
    raise RuntimeError(f"model: the edit at {site.name} was not applied: {wrong}; {_REMEDY}")


def _wrong(layer: nn.Module, site: Site) -> str:
    """Why the edits of a site cannot run, or nothing; `site.path` is updated."""
    module = walk(layer, site.path)
    if module is None or module._modules.get(NAME) is not site.own:
        holder = _path_to(layer, site.own)
        if holder is None:
            return "it is gone" if module is None else f"its module was replaced by a {type(module).__name__}"
        site.path = holder[:-1]  # a wrapper was put around the module
        module = walk(layer, site.path)
        assert module is not None
    return "its hook was removed" if _hook_is_lost(module, site.own) else ""


def _hook_is_lost(module: nn.Module, own: RedEdit) -> bool:
    if own.on_input:
        return input_hook not in module._forward_pre_hooks.values()
    return not own.inside and edit_hook not in module._forward_hooks.values()


def _path_to(model: nn.Module, wanted: nn.Module) -> tuple[str, ...] | None:
    return next((tuple(name.split(".")) for name, module in model.named_modules() if module is wanted), None)


def _excuse(layer: nn.Module, site: Site) -> nn.Module | None:
    """A compiled module between a layer and its site: compiled code does not report."""
    module: nn.Module | None = layer
    for part in (*site.path, ""):
        if module is None:
            return None
        forward = module.__dict__.get("forward", type(module).forward)
        if (
            module._compiled_call_impl is not None
            or "_orig_mod" in module._modules  # torch.compile's wrapper
            or hasattr(forward, "_torchdynamo_orig_callable")
            or hasattr(forward, "_torchdynamo_inline")
        ):
            return module
        module = module._modules.get(part)
    return None
