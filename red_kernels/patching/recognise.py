"""Whether a layer is laid out as a family says, and by which of its points a site is fused; else why not."""

from __future__ import annotations

from torch import nn

from ..fusion.fingerprint import BASE, class_fingerprint, fingerprint
from ..fusion.norms import norm_spec
from ..fusion.paths import child_at
from ..models import Layout, Point
from .sites import Place

__all__ = ["is_dropout", "layouts_of", "point_of", "recognised", "recognised_point", "unknown_forward", "unusable"]


def recognised(layout: Layout, block: nn.Module) -> str | None:
    """None where a block is laid out as described; else what is different, for the report."""
    different = unknown_forward(block, layout.known)
    if different is not None:
        return different
    if layout.when is not None and _attribute(block, layout.when[0]) != layout.when[1]:
        return f"{type(block).__name__} has another {layout.when[0]}"
    for path in layout.dropouts:
        if not is_dropout(child_at(block, path)):
            return f"{type(block).__name__}.{path} is no nn.Dropout"
    return None


def recognised_point(point: Point, block: nn.Module) -> str | None:
    """None where all between `outer` and the site of a point is as described; else what is different."""
    for path, known in point.known.items():
        at, _, method = path.partition(":")
        module = child_at(block, at)
        if module is None:
            return f"{type(block).__name__} has no {at}"
        if method:
            function = getattr(type(module), method, None)
            found = None if function is None else fingerprint(function)
            different = None if found in known else f"{type(module).__name__}.{method} is not one that is known"
        else:
            different = unknown_forward(module, known)
        if different is not None:
            return different
    if point.dropout and not is_dropout(child_at(block, point.dropout), nn.Identity):
        return f"{type(block).__name__}.{point.dropout} is no nn.Dropout"
    return None


def is_dropout(module: nn.Module | None, *others: type) -> bool:
    kind = type(module)
    return getattr(kind, BASE, kind) in (nn.Dropout, *others)


def _attribute(block: nn.Module, names: str) -> object:
    value: object = None
    for name in names.split(" or "):
        value = block
        for part in name.split("."):
            value = getattr(value, part, None)
        if value:
            break
    return value


def unknown_forward(module: nn.Module, known: tuple[str, ...]) -> str | None:
    """None where a module's `forward` has one of the fingerprints; else what is wrong with it, for the report."""
    if "forward" in module.__dict__:
        return f"the forward of {type(module).__name__} was replaced"
    found = class_fingerprint(type(module))
    if found in known:
        return None
    shown = "whose source cannot be read" if found is None else f"fingerprint {found}"
    return f"{type(module).__name__}.forward is not one that is known ({shown})"


def unusable(norm: nn.Module | None, what: str) -> str:
    """Why a fused operation cannot stand in for a norm, or nothing."""
    if norm is None:
        return f"{what} is missing"
    if "forward" in norm.__dict__:
        return f"the forward of {what}, a {type(norm).__name__}, was replaced"
    if norm_spec(type(norm)) is None:
        return f"{type(norm).__name__}.forward is not one that is known"
    return ""


def layouts_of(place: Place) -> dict[str, tuple[Layout | None, str]]:
    """The layout of each block of a layer by the block's path, or why it has none that is known."""
    found: dict[str, tuple[Layout | None, str]] = {}
    if "forward" in place.layer.__dict__:
        reason = f"the forward of {type(place.layer).__name__} was replaced"
        return {layout.block: (None, reason) for layout in place.family.layouts}
    for layout in place.family.layouts:
        former, reason = found.get(layout.block, (None, ""))
        block = child_at(place.layer, layout.block)
        if former is not None or block is None:
            continue
        different = recognised(layout, block)
        found[layout.block] = (layout, "") if different is None else (None, reason or different)
    return found


def point_of(
    place: Place, layouts: dict[str, tuple[Layout | None, str]], kind: str, path: str
) -> tuple[tuple[Layout, Point] | None, str]:
    """The layout and its point by which a site is fused; else why it is not."""
    reasons = []
    described = False
    for layout in place.family.layouts:
        for point in layout.points:
            if point.place != kind or ".".join(filter(None, (layout.block, point.site))) != path:
                continue
            described = True
            known, reason = layouts.get(layout.block, (None, ""))
            if known is None:
                reasons.append(reason)
            if known is not layout:
                continue
            block = child_at(place.layer, layout.block)
            assert block is not None
            different = recognised_point(point, block)
            if different is None:
                return (layout, point), ""
            reasons.append(different)
    if reasons or not described:
        return None, next(filter(None, reasons), "")
    if kind in place.family.inside:
        return None, f"in this {type(place.layer).__name__} attention and FFN share one residual add"
    return None, ""
