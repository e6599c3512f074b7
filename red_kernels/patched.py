"""The classes of patched layers and norms: subclasses of the same name, which pickle by what they are made from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .edit_module import NAME, RedEdit, plain_only
from .models import LAYOUTS, Layout, child_at
from .models.compose import LINK, may_defer
from .models.description import walk
from .models.fingerprint import BASE, CAPTURED, class_fingerprint
from .models.handoff import TAKES_NOTES, NextNorm, running, take_note
from .models.norms import globally_hooked, unobserved

__all__ = ["is_patched", "patch_block", "patch_norm", "patch_stack", "recognised", "unknown_forward", "unpatch_module"]

_NORM, _STACK = "", "stack"  # the keys of patched norms and stacks, where patched layers have their layout's
_classes: dict[tuple[type, str, Callable[..., Any]], type[nn.Module]] = {}


def recognised(layout: Layout, block: nn.Module) -> str | None:
    """None where a block is laid out as described; else what is different, for the report."""
    for path, known in layout.known.items():
        module = child_at(block, path)
        if module is None:
            return f"{type(block).__name__} has no {path}"
        different = unknown_forward(module, known)
        if different is not None:
            return different
    for path in layout.dropouts:
        if type(child_at(block, path)) is not nn.Dropout:
            return f"{type(block).__name__}.{path} is no nn.Dropout"
    return None


def unknown_forward(module: nn.Module, known: tuple[str, ...]) -> str | None:
    """None where a module's `forward` has one of the fingerprints; else what is wrong with it, for the report."""
    if "forward" in module.__dict__:
        return f"the forward of {type(module).__name__} was replaced"
    found = class_fingerprint(type(module))
    if found in known:
        return None
    shown = "whose source cannot be read" if found is None else f"fingerprint {found}"
    return f"{type(module).__name__}.forward is not one that is known ({shown})"


def patch_block(block: nn.Module, layout: Layout, link: NextNorm | None) -> None:
    """Make a block run its layout's fused forward."""
    block.__class__ = _patched_class(type(block), layout.key)
    block.__dict__[LINK] = link


def patch_norm(norm: nn.Module) -> None:
    """Make a norm take the notes that are left for it."""
    norm.__class__ = _patched_class(type(norm), _NORM)


def patch_stack(stack: nn.Module) -> None:
    """Make a stack of layers say while its forward runs: notes are left at no other time."""
    stack.__class__ = _patched_class(type(stack), _STACK)


def is_patched(module: nn.Module) -> bool:
    """Whether the module's class is one of ours."""
    return BASE in type(module).__dict__


def unpatch_module(module: nn.Module) -> None:
    """Give a module back the class it had; nothing if it is not patched."""
    if is_patched(module):
        module.__class__ = type(module).__dict__[BASE]
        module.__dict__.pop(LINK, None)


def _patched_class(base: type[nn.Module], key: str) -> type[nn.Module]:
    made = _classes.get((base, key, base.forward))
    if made is None:
        makers = {_NORM: _norm_forward, _STACK: _stack_forward}
        forward = makers[key](base) if key in makers else _block_forward(base, LAYOUTS[key])
        namespace = {
            "forward": forward,
            "__reduce_ex__": _reduce_ex,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            BASE: base,
            CAPTURED: base.forward,
            "_red_kernels_key": key,
            TAKES_NOTES: key == _NORM,
        }
        made = _classes[base, key, base.forward] = type(base.__name__, (base,), namespace)
    return made


def _reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    ours = next(kind for kind in type(self).__mro__ if BASE in kind.__dict__)
    base: type[nn.Module] = ours.__dict__[BASE]
    reduced: Any = base.__reduce_ex__(self, protocol)
    if ours is not type(self):  # somebody has made a subclass of ours
        return reduced
    return _restore, (base, ours.__dict__["_red_kernels_key"]), *reduced[2:]


def _restore(base: type[nn.Module], key: str) -> nn.Module:
    kind = _patched_class(base, key)
    return kind.__new__(kind)


def _norm_forward(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = base.forward  # may have been replaced since
        if current is original and len(args) == 1 and not torch.compiler.is_compiling():
            normed = take_note(self, args[0])
            if normed is not None:
                return normed
        return current(self, *args, **kwargs)

    return forward


def _stack_forward(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = base.forward
        if current is not original or torch.compiler.is_compiling():
            return current(self, *args, **kwargs)
        with running(self):
            return current(self, *args, **kwargs)

    return forward


def _block_forward(base: type[nn.Module], layout: Layout) -> Callable[..., Any]:
    original, fused = base.forward, layout.forward
    find = _finder(layout)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = base.forward
        if current is original and not plain_only():
            own = find(self)
            if own is not None:
                return fused(self, own, *args, **kwargs)
        return current(self, *args, **kwargs)

    return forward


def _finder(layout: Layout) -> Callable[[nn.Module], RedEdit | None]:
    """A function from the block to the edit that its fused forward may apply, or None where the library's must run."""
    outer_path = layout.outer.split(".")
    # From the module that is called to the site it ends in; empty where it is the site.
    site_path = [part for part in layout.site.removeprefix(layout.outer).split(".") if part]
    known = layout.known.get(layout.outer)
    dropouts = [path.split(".") for path in layout.dropouts]

    def find(block: nn.Module) -> RedEdit | None:
        if globally_hooked():
            return None
        outer = walk(block, outer_path)
        site = walk(outer, site_path)
        if outer is None or site is None or (known is not None and class_fingerprint(type(outer)) not in known):
            return None
        own = site._modules.get(NAME)
        if type(own) is not RedEdit or not may_defer(outer, site, own):
            return None
        for path in dropouts:
            dropout = walk(block, path)
            if type(dropout) is not nn.Dropout or not unobserved(dropout):
                return None
        return own

    return find
