"""The hook that edits the input of a site, before its forward; and the hooks of `edits` that are ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..edits.module import NAME, RedEdit
from ..edits.stream import enter_hook, given_hook, leave_hook
from .scopes import OWN_HOOKS
from .site import reach
from .waiting import Waiting

__all__ = ["input_hook"]


def input_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook before a module whose first argument is edited, by position or by any name."""
    own: Any = module._modules.get(NAME)
    if own is None:
        return None
    assert isinstance(own, RedEdit)
    if own.watched and not torch.compiler.is_compiling():
        reach(own)
    key = None if args else next(iter(kwargs), None)
    given = args[0] if args else kwargs.get(key) if key is not None else None
    # A module call: hooks that move its parameters to the device must run.
    edited = own(given.settle() if type(given) is Waiting else given)
    if edited is given:
        return None
    return (args, {**kwargs, key: edited}) if key is not None else ((edited, *args[1:]), kwargs)


OWN_HOOKS.update((input_hook, enter_hook, given_hook, leave_hook))
