"""The forward hook by which a site's output is edited, and how a caller keeps it from that for one call.

The site itself (a linear layer of any make) stays a black box. A caller that fuses the edit into its own next operation
asks the hook to leave the output alone: `call_unedited`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.module import NAME, RedEdit

__all__ = [
    "INSIDE",
    "OWN_HOOKS",
    "applied_inside",
    "call_unedited",
    "edit_hook",
    "edited_output",
    "skips_dropout",
    "take_reached",
]

INSIDE = "_red_kernels_inside"  # in a layer whose forward applies an edit that no hook could: the path of its site


class _Deferred(threading.local):
    def __init__(self) -> None:
        self.reached: set[int] = set()  # ids of watched edits that have run

    edit: RedEdit | None = None  # the edit that the caller applies itself
    dropout: nn.Module | None = None  # the dropout behind it, which the caller applies as well
    output: tuple[RedEdit, Tensor] | None = None  # an edit that is in this output already
    inside: RedEdit | None = None  # an edit that the forward of its layer has applied


_deferred = _Deferred()


def edit_hook(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of an edited module."""
    own = module._modules.get(NAME)
    compiling = torch.compiler.is_compiling()
    if INSIDE in module.__dict__ and not compiling:
        _check_inside(module)
    if own is None:
        return None
    assert isinstance(own, RedEdit)
    if own.watched and not compiling:
        _deferred.reached.add(id(own))
    first = output[0] if own.of_tuple and type(output) is tuple else output
    if not compiling:
        if _deferred.edit is own:
            _deferred.edit = None
            return None
        done, _deferred.output = _deferred.output, None
        if done is not None and done[0] is own and done[1] is first:
            return None
    # Called as a module: hooks that bring its parameters to the device must fire.
    edited = own(first)
    return edited if first is output else (edited, *output[1:])


OWN_HOOKS: set[Callable[..., Any]] = {edit_hook}  # of this package: they do not keep `z`


def take_reached(own: RedEdit) -> bool:
    """Whether watched edits have run in this thread since this was asked before."""
    reached = _deferred.reached
    if id(own) in reached:
        reached.discard(id(own))
        return True
    return False


def _check_inside(layer: nn.Module) -> None:
    applied, _deferred.inside = _deferred.inside, None
    site: Any = layer
    for part in layer.__dict__[INSIDE]:
        site = site._modules[part]
    own = site._modules[NAME]
    if applied is not own and not own.off:
        raise RuntimeError(
            f"the forward of this {type(layer).__name__} was replaced after patching, and the new one leaves out the "
            "edit behind the residual add of its attention; replace it before patching"
        )


def call_unedited(
    module: nn.Module, own: RedEdit | None, *args: Any, without: nn.Module | None = None, **kwargs: Any
) -> Any:
    """Call a module that ends in the site of `own`, leaving out the edit: the caller applies it. With None, just call.

    `without` is a dropout between the site and the module's end that is left out as well, with the edit.
    """
    if own is None:
        return module(*args, **kwargs)
    outer = _deferred.edit, _deferred.dropout  # of a call that this one is inside of: a hook may run a model
    _deferred.edit, _deferred.dropout = own, without
    try:
        return module(*args, **kwargs)
    finally:
        _deferred.edit, _deferred.dropout = outer


def skips_dropout(dropout: nn.Module) -> bool:
    """Whether this call of a dropout is to be left out."""
    if _deferred.dropout is not dropout:
        return False
    _deferred.dropout = None
    return True


def edited_output(own: RedEdit | None, output: Tensor) -> Tensor:
    """Tell the hook of a block, whose forward has applied its edit to what it returns, to leave that alone."""
    if own is not None:
        _deferred.output = own, output
    return output


def applied_inside(own: RedEdit) -> None:
    """Say that a forward has applied this edit: the hook of the layer, where no hook could, and whoever watches it."""
    if own.inside:
        _deferred.inside = own
    if own.watched:
        _deferred.reached.add(id(own))
