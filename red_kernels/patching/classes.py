"""The classes of patched blocks, stacks and norms: subclasses with the original's name, pickled by their base class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..backends import nodes
from ..edits.module import RedEdit, plain_only
from ..fusion.fingerprint import BASE
from ..fusion.former import LEFT
from ..fusion.norms import SPEC, norm_spec
from ..fusion.quick import prepare
from ..fusion.scopes import SCOPE, SITES, Scope, Verdict, collects, here
from ..fusion.site import BEHIND, CARRIER, RECORDS, carry_hook, norm_with_edit
from ..fusion.sums import norm_of_waiting, take_note
from ..fusion.waiting import Waiting
from ..ops.ambient import PLAIN, TANGENTS, ambient
from .watch import check_layer

__all__ = ["carry", "is_patched", "patch_dropout", "patch_norm", "patch_scope", "prepare_classes", "unpatch_module"]

_NORM, _SCOPE, _DROPOUT = "norm", "scope", "drop"
# Names in pickles of earlier releases; any other name is a block with its own forward.
_FORMER = {"": _NORM, "stack": _SCOPE}
_FORMER_DROPOUT = "dropout"  # which no longer needs a class of ours
prepare(check_layer)
_classes: dict[tuple[type, str, Callable[..., Any]], type[nn.Module]] = {}


def prepare_classes(scopes: list[nn.Module], norms: list[nn.Module], dropouts: list[nn.Module]) -> None:
    """Make the classes for all of these modules, so that an error occurs before any change."""
    for modules, key in ((scopes, _SCOPE), (norms, _NORM), (dropouts, _DROPOUT)):
        for module in modules:
            if not is_patched(module):
                _patched_class(type(module), key)


def patch_scope(module: nn.Module, stack: bool) -> None:
    """Make a block, or a stack of blocks, mark its running forward, and settle the values that leave it."""
    if is_patched(module):
        return
    _set_class(module, _patched_class(type(module), _SCOPE))
    module.__dict__[SCOPE] = Verdict(stack)


def patch_norm(norm: nn.Module, behind: tuple[RedEdit, nn.Module] | None = None) -> bool:
    """Make a norm take waiting values and notes, and apply the edit of its output. Returns whether it can.

    `behind` is the edit of a site whose output is the norm's output, and that site.
    """
    spec = norm_spec(norm)
    if spec is None:
        return False
    if not is_patched(norm):
        _set_class(norm, _patched_class(type(norm), _NORM))
        norm.__dict__[SPEC] = spec
    if behind is not None:
        norm.__dict__[BEHIND] = behind
    return True


def patch_dropout(dropout: nn.Module) -> None:
    """Let a dropout take a waiting value without torch's dispatch by class."""
    if nodes.run_scope is not None and not is_patched(dropout):
        _set_class(dropout, _patched_class(type(dropout), _DROPOUT))


def carry(module: nn.Module, own: RedEdit) -> None:
    """Let the output of an unedited projection wait, like that of a site; `own` is an edit of its layer."""
    if carry_hook not in module._forward_hooks.values():
        module.__dict__[CARRIER] = own
        nn.Module.register_forward_hook(module, carry_hook, prepend=True)


def is_patched(module: nn.Module) -> bool:
    """Whether the module's class is one of ours."""
    return BASE in type(module).__dict__


def unpatch_module(module: nn.Module) -> None:
    """Give a module its former class back, and stop its output from waiting; no-op for an unpatched module."""
    for name in (RECORDS, *LEFT):
        module.__dict__.pop(name, None)
    if module.__dict__.pop(CARRIER, None) is not None:
        for key in [key for key, hook in module._forward_hooks.items() if hook is carry_hook]:
            del module._forward_hooks[key]
    if is_patched(module):
        _set_class(module, type(module).__dict__[BASE])
        for name in (SCOPE, SPEC, BEHIND):
            module.__dict__.pop(name, None)


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)  # a module's own __setattr__ may refuse


def _patched_class(base: type[nn.Module], key: str) -> type[nn.Module]:
    made = _classes.get((base, key, base.forward))
    if made is None:
        forward = _FORWARDS[key](base)
        namespace = {
            "forward": forward,
            "__reduce_ex__": _reduce_ex,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            BASE: base,
            "_red_kernels_key": key,
        }
        made = _classes[base, key, base.forward] = type(base.__name__, (base,), namespace)
    return made


def _reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    ours = next(kind for kind in type(self).__mro__ if BASE in kind.__dict__)
    base: type[nn.Module] = ours.__dict__[BASE]
    reduced: Any = base.__reduce_ex__(self, protocol)
    if ours is not type(self):  # another class derives from ours
        return reduced
    return _restore, (base, ours.__dict__["_red_kernels_key"]), *reduced[2:]


def _restore(base: type[nn.Module], key: str) -> nn.Module:
    if key == _FORMER_DROPOUT:
        return base.__new__(base)
    key = _FORMER.get(key, key)
    kind = _patched_class(base, key if key in _FORWARDS else _SCOPE)
    return kind.__new__(kind)


def _norm_forward(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = base.forward  # may have been replaced since
        if len(args) != 1 or kwargs or current is not original:
            return current(self, *args, **kwargs)
        x = args[0]
        if not is_dynamo_compiling():
            normed = nodes.normed(self, x)
            if normed is not None:
                return normed
        if torch.compiler.is_compiling():
            return current(self, x)
        if type(x) is Tensor:
            if BEHIND in self.__dict__:
                return current(self, x) if plain_only() else norm_with_edit(self, x, current)
            normed = take_note(self, x)
        elif type(x) is Waiting and not ambient() & PLAIN:
            if BEHIND in self.__dict__:
                return norm_with_edit(self, x.settle(), current)
            normed = norm_of_waiting(self, x)
        else:
            normed = None
        return current(self, x) if normed is None else normed

    return forward


def _dropout_forward(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = base.forward  # may have been replaced since
        if len(args) == 1 and not kwargs and current is original and not is_dynamo_compiling():
            dropped = nodes.dropped(self, args[0])
            if dropped is not None:
                return dropped
        return current(self, *args, **kwargs)

    return forward


def _scope_forward(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        verdict: Verdict | None = self.__dict__.get(SCOPE)
        if verdict is None or is_dynamo_compiling():
            return base.forward(self, *args, **kwargs)
        if nodes.run_scope is not None:
            return nodes.run_scope(self, base, verdict, args, kwargs)
        output = _run(self, base, verdict, args, kwargs)
        if SITES in self.__dict__ and "forward" not in self.__dict__ and not torch.compiler.is_compiling():
            check_layer(self)
        return output

    return forward


def _run(
    block: nn.Module, base: type[nn.Module], verdict: Verdict, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if torch.compiler.is_compiling() or ambient() & (PLAIN + TANGENTS):  # no value waits there
        return base.forward(block, *args, **kwargs)
    scopes = here.scopes
    depth = len(scopes)
    scope = Scope(block, verdict, verdict.stack and collects(block, kwargs))
    scopes.append(scope)
    try:
        output = base.forward(block, *args, **kwargs)
        return scope.close(output) if scope.made or scope.left or scope.undecided else output
    finally:
        scope.end()
        del scopes[depth:]


_FORWARDS = {_NORM: _norm_forward, _SCOPE: _scope_forward, _DROPOUT: _dropout_forward}
