"""Where a block's output goes: through which modules, and into which norm."""

from __future__ import annotations

from torch import nn

from ..fusion.fingerprint import unwrapped
from ..fusion.handoff import NextNorm, Step
from ..fusion.paths import child_at, first_path
from ..models import Layout, family_of
from .recognise import unknown_forward, unusable
from .sites import Place, resolved

__all__ = ["next_norm"]


def next_norm(place: Place, layout: Layout) -> tuple[NextNorm | None, nn.Module | str]:
    """The way of a block's output into the next norm, and that norm; or None and why there is none to be had."""
    family, own = place.family, (place.list_key, str(place.index))
    block = (*own, *resolved(place.layer, layout.block)) if layout.block else own
    leaves = [Step(block, layout.known)]
    if layout.then:
        found: tuple[str, ...] | str = _in_layer(place, layout)
    else:
        found = _behind_layer(place)
        if layout.block:
            found = unknown_forward(place.layer, family.known[""]) or found
            leaves.append(Step(own, family.known[""]))
    if isinstance(found, str):
        return None, found
    norm = child_at(place.stack, found[-1])
    if norm is None:
        return None, "the next norm is missing"
    wrong = unusable(norm, "the next norm")
    if wrong:
        return None, wrong
    paths = [tuple(path.split(".")) for path in found]
    steps = [Step(path, family.known[".".join(path[len(own) :])]) for path in paths[:-1]]
    return NextNorm(tuple(leaves), tuple(steps), paths[-1], layout.clamps_half), norm


def _in_layer(place: Place, layout: Layout) -> tuple[str, ...] | str:
    """The modules that the output passes until the next norm in the same layer, named in the stack; or why not."""
    library = _library(place.stack)
    if library:
        return library
    different = unknown_forward(place.layer, place.family.known[""])
    if different is not None:
        return different
    for path in layout.then[:-1]:
        module = child_at(place.layer, path)
        different = f"it has no {path}" if module is None else unknown_forward(module, place.family.known[path])
        if different is not None:
            return f"in the next sublayer: {different}"
    return tuple(f"{place.list_key}.{place.index}.{path}" for path in layout.then)


def _behind_layer(place: Place) -> tuple[str, ...] | str:
    """The modules that a layer's output passes until the next norm, named in the stack; or why there is none."""
    library = _library(place.stack)
    if library:
        return library
    family = place.family
    layers = place.stack._modules[place.list_key]
    assert layers is not None
    following = layers._modules.get(str(place.index + 1))
    if following is None:
        return "no norm follows the last layer" if family.final_norm is None else (family.final_norm,)
    if family_of(type(following)) is not family:
        return f"the next layer is a {type(following).__name__}"
    *passed, norm = family.first_norm or ("",)
    for path in passed:
        module = child_at(following, path)
        different = f"it has no {path}" if module is None else unknown_forward(module, family.known[path])
        if different is not None:
            return f"in the next layer: {different}"
    first = first_path(following, norm) if norm else None
    if first is None:
        return "the next layer begins with no norm"
    prefix = f"{place.list_key}.{place.index + 1}"
    return tuple(f"{prefix}.{path}" if path else prefix for path in (*passed, first))


def _library(stack: nn.Module) -> str:
    forward = unwrapped(type(stack).forward)
    if "forward" in stack.__dict__ or not forward.__globals__["__name__"].startswith("transformers.models."):
        return f"the forward of {type(stack).__name__} is not the library's own"
    return ""
