"""Whether foreign hooks see a module's input or output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .norms import is_own

__all__ = ["chain", "hooked", "observed"]

_CAPTURING = "transformers.utils.output_capturing"


def observed(module: nn.Module, entering: bool = True, leaving: bool = True) -> bool:
    """Whether foreign hooks see a module's input or output."""
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if entering and module._forward_pre_hooks and any(map(_observes, module._forward_pre_hooks.values())):
        return True
    return bool(leaving and module._forward_hooks and any(map(_observes, module._forward_hooks.values())))


def hooked(module: nn.Module) -> bool:
    """Whether there are foreign hooks, which may observe at times."""
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    return not all(map(is_own, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def _observes(hook: Callable[..., Any]) -> bool:
    """Whether a hook may observe a value: any, except ours and transformers' own, which stay after their first use."""
    if is_own(hook):
        return False
    if getattr(hook, "__module__", None) != _CAPTURING:
        return True
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    if collector is None:
        return True
    collected = collector.get()
    if not collected or not torch.is_grad_enabled():
        return False
    names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
    held = dict(zip(names, getattr(hook, "__closure__", None) or (), strict=False))
    try:
        key, index = held["key"].cell_contents, held["index"].cell_contents
    except (KeyError, ValueError):
        return "hidden_states" in collected
    # Of other outputs it keeps those next to the value, for example attention weights.
    return key in collected and (key == "hidden_states" or index == 0)


def chain(outer: nn.Module, inner: nn.Module) -> Iterator[nn.Module]:
    """The modules between two, the second one included; empty if it is not inside the first."""
    for name, module in outer.named_modules():
        if module is inner and name:
            between: nn.Module = outer
            for part in name.split("."):
                between = between._modules[part]  # type: ignore[assignment]
                yield between
            return
