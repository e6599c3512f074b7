"""The classes of patched layers and norms: subclasses of the same name, which pickle by what they are made from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..edits.module import NAME, SITE, RedEdit, plain_only
from ..fusion.compose import ARGUMENTS, LINK, arguments_of, may_defer
from ..fusion.deferral import edit_hook, skips_dropout
from ..fusion.fingerprint import BASE, CAPTURED, class_fingerprint
from ..fusion.handoff import TAKES_NOTES, NextNorm, running, take_note
from ..fusion.norms import globally_hooked, unobserved
from ..fusion.paths import child_at, walk
from ..models import LAYOUTS, Edits, Layout
from .recognise import is_dropout

__all__ = [
    "is_patched",
    "patch_block",
    "patch_norm",
    "patch_stack",
    "prepare_classes",
    "unpatch_module",
]

_NORM, _STACK, _DROPOUT = "", "stack", "dropout"  # the keys of what is no block, where that has its layout's
_classes: dict[tuple[type, str, Callable[..., Any]], type[nn.Module]] = {}


def prepare_classes(block: nn.Module, layout: Layout, norm: nn.Module | None, stack: nn.Module | None) -> None:
    """Make the classes that a fused block takes, so that an error of making them changes nothing yet."""
    for point in layout.points:
        dropout: nn.Module | None = child_at(block, point.dropout) if point.dropout else None
        if dropout is not None and type(dropout) is nn.Dropout:
            _patched_class(type(dropout), _DROPOUT)
    for module, key in ((block, layout.key), (norm, _NORM), (stack, _STACK)):
        if module is not None and not is_patched(module):
            _patched_class(type(module), key)


def patch_block(block: nn.Module, layout: Layout, link: NextNorm | None) -> None:
    """Make a block run its layout's fused forward."""
    for point in layout.points:
        dropout: nn.Module | None = child_at(block, point.dropout) if point.dropout else None
        if dropout is not None and type(dropout) is nn.Dropout:
            _subclass(dropout, _DROPOUT)
    _subclass(block, layout.key)
    block.__dict__[LINK] = link


def patch_norm(norm: nn.Module) -> None:
    """Make a norm take the notes that are left for it."""
    _subclass(norm, _NORM)


def patch_stack(stack: nn.Module) -> None:
    """Make a stack of layers say while its forward runs: notes are left at no other time."""
    _subclass(stack, _STACK)


def is_patched(module: nn.Module) -> bool:
    """Whether the module's class is one of ours."""
    return BASE in type(module).__dict__


def unpatch_module(module: nn.Module) -> None:
    """Give a module back the class it had; nothing if it is not patched."""
    if is_patched(module):
        _set_class(module, type(module).__dict__[BASE])
        module.__dict__.pop(LINK, None)


def _subclass(module: nn.Module, key: str) -> None:
    _set_class(module, _patched_class(type(module), key))


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    object.__setattr__(module, "__class__", kind)  # a module's own __setattr__ may refuse


def _patched_class(base: type[nn.Module], key: str) -> type[nn.Module]:
    made = _classes.get((base, key, base.forward))
    if made is None:
        makers = {_NORM: _norm_forward, _STACK: _stack_forward, _DROPOUT: _dropout_forward}
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
        if key not in makers:
            namespace[ARGUMENTS] = arguments_of(base.forward)
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
        if current is not original or torch.compiler.is_compiling() or _collects(self, kwargs):
            return current(self, *args, **kwargs)
        with running(self):
            return current(self, *args, **kwargs)

    return forward


def _collects(stack: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a stack's own forward hands out what lies between its layers, with gradients."""
    if not torch.is_grad_enabled():
        return False
    asked = kwargs.get("output_hidden_states")
    return bool(getattr(getattr(stack, "config", None), "output_hidden_states", False) if asked is None else asked)


def _dropout_forward(base: type[nn.Module]) -> Callable[..., Any]:
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, input: Tensor) -> Any:
        if not torch.compiler.is_compiling() and skips_dropout(self):
            return input
        return base.forward(self, input)

    return forward


def _block_forward(base: type[nn.Module], layout: Layout) -> Callable[..., Any]:
    original, fused = base.forward, layout.forward
    find = _finder(layout)

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = base.forward
        if current is original:
            edits = find(self)
            if edits is not None:
                return fused(self, edits, *args, **kwargs)
        return current(self, *args, **kwargs)

    return forward


class _Path(NamedTuple):
    """A `Point`, its paths in parts."""

    place: str
    site: list[str]
    outer: list[str]  # of the module that is called, which ends in the site
    known: tuple[str, ...] | None  # fingerprints of that module's forward
    dropout: list[str]
    inside: bool


def _finder(layout: Layout) -> Callable[[nn.Module], Edits | None]:
    """A function from the block to the edits that its fused forward applies, or None where the library's must run."""
    points = [
        _Path(
            point.place,
            _parts(point.site),
            _parts(point.outer),
            point.known.get(point.outer) if point.outer else layout.known,
            _parts(point.dropout),
            point.inside,
        )
        for point in layout.points
    ]
    dropouts = [_parts(path) for path in layout.dropouts]

    def find(block: nn.Module) -> Edits | None:
        compiling = torch.compiler.is_compiling()
        usable = not (plain_only() or globally_hooked())
        for path in dropouts if usable else ():
            dropout = walk(block, path)
            usable = usable and is_dropout(dropout) and dropout is not None and unobserved(dropout)
        found: dict[str, RedEdit] = {}
        for point in points:
            site: nn.Module | None = block
            for part in point.site:  # no call: this runs for every layer, mostly to find nothing
                site = None if site is None else site._modules.get(part)
            own = None if site is None else site._modules.get(NAME)
            if site is None or not isinstance(own, RedEdit):
                continue
            if not (compiling or point.inside or edit_hook in site._forward_hooks.values()):
                raise RuntimeError(
                    f"model: the edit at {own.__dict__.get(SITE, type(site).__name__)} was not applied: its hook "
                    "was removed; put it back, or call rk.unpatch(model) and patch what is there now"
                )
            if own.off:  # then the layer runs as it did before patching, to the bit
                continue
            if point.inside or (usable and _deferrable(block, site, own, point)):
                found[point.place] = own
        return Edits(**found) if found else None

    return find


def _deferrable(block: nn.Module, site: nn.Module, own: RedEdit, point: _Path) -> bool:
    outer = walk(block, point.outer)
    if outer is None or (point.known is not None and class_fingerprint(type(outer)) not in point.known):
        return False
    if outer is block and "forward" in block.__dict__:
        return False  # what is wrapped around this forward may return something else, and that is to be edited
    if point.dropout:
        dropout = walk(block, point.dropout)
        # A dropout that was put there after patching would not be left out.
        if dropout is None or not (type(dropout) is nn.Identity or is_patched(dropout)) or not unobserved(dropout):
            return False
    # The block is running, and whoever has hooks on it sees it return: only ours may stand behind the edit.
    return may_defer(site if outer is block else outer, site, own)


def _parts(path: str) -> list[str]:
    return [part for part in path.split(".") if part]
