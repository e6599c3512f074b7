"""Modules by their paths in a layer or a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

__all__ = ["child_at", "first_path", "walk"]


def first_path(layer: nn.Module, paths: str) -> str | None:
    """The first existing path of an entry of `Family.sites`; None for none."""
    for entry in paths.removesuffix("?").split("|"):
        path, _, inner = entry.partition(" with ")
        found = child_at(layer, path)
        if found is not None and (not inner or child_at(found, inner) is not None):
            return path
    return None


def child_at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None. `-1` is the last child of a list."""
    found: nn.Module | None = module
    for part in path.split(".") if path else ():
        if part == "-1" and found is not None:
            part = next(reversed(found._modules), "")
        found = walk(found, [part])
    return found


def walk(module: nn.Module | None, parts: Iterable[str]) -> nn.Module | None:
    """The module at a path in parts, or None; fast."""
    for part in parts:
        if module is None:
            return None
        module = module._modules.get(part)
    return module
