"""The form in which a family of models is described."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["Family", "Layout", "child_at", "walk"]


@dataclass(frozen=True)
class Layout:
    """A layer whose edit can be fused, and the forward that does it.

    Paths are relative to `block`, the module whose `forward` is replaced; `""` is the block itself.

    Attributes:
        key: the layout's name, by which pickled models find it again.
        block: path from the layer to the block.
        forward: `forward(block, own, *args, **kwargs)` with the site's `RedEdit` as `own`.
        known: path to the fingerprints its module's `forward` may have, for all that the fused forward stands in for.
        site: path from the block to the edited module.
        outer: the module that is called for the site's unedited output: the site or one that ends in it.
        dropouts: paths of `nn.Dropout` modules that the fused forward stands in for.
        fuses: what the edit is fused with, for the report; `{next}` is the next layer's norm.
        alone: the same where the next layer's norm is not to be had; empty where `fuses` does not need it.
        norm: path of the layer's own norm that the edit is fused with; empty where there is none.
        bare: as `fuses`, where that norm is not to be had; None for nothing.
        clamps_half: whether the layer clamps its output in float16, so that nobody sees the fused operation's.
        when: an attribute of the block and the value it must have, where one forward has two layouts.
    """

    key: str
    forward: Callable[..., Any]
    known: dict[str, tuple[str, ...]]
    site: str
    outer: str
    fuses: str
    alone: str = ""
    norm: str = ""
    bare: str | None = None
    block: str = ""
    dropouts: tuple[str, ...] = ()
    clamps_half: bool = False
    when: tuple[str, object] | None = None


@dataclass(frozen=True)
class Family:
    """Layers of one make.

    Attributes:
        name: for messages.
        layers: class names of the layer (a subclass is found by its base's name).
        site: path from the layer to the FFN's last projection; `-1` is the last of a list.
        layouts: those layouts of the layer that can be fused.
        first_norm: path of the modules that a layer's input passes until its first norm, which comes last; empty in
            post-norm layers.
        known: each of those paths, but the norm's, to the fingerprints its module's `forward` may have.
        final_norm: name of the norm behind the last layer, beside the list of layers.
    """

    name: str
    layers: tuple[str, ...]
    site: str
    layouts: tuple[Layout, ...]
    first_norm: tuple[str, ...] = ()
    known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    final_norm: str | None = None


def child_at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None. `-1` is the last child of a list."""
    found: nn.Module | None = module
    for part in path.split(".") if path else ():
        if part == "-1" and found is not None:
            part = next(reversed(found._modules), "")
        found = walk(found, [part])
    return found


def walk(module: nn.Module | None, parts: Iterable[str]) -> nn.Module | None:
    """The module at a path in parts, or None; quick."""
    for part in parts:
        if module is None:
            return None
        module = module._modules.get(part)
    return module
