"""What the patch knows of each architecture: where the sites are, and how a layer's forward is fused.

Each file describes layers of one shape. A fused forward stands in for a library's forward only where that is recognised
by its fingerprint; where it is not, the site is edited all the same, unfused.
"""

from __future__ import annotations

from . import classic, decoders, t5
from .description import Family, Layout, child_at

__all__ = ["FAMILIES", "LAYOUTS", "Family", "Layout", "child_at", "family_of"]

FAMILIES: tuple[Family, ...] = decoders.FAMILIES + classic.FAMILIES + t5.FAMILIES
LAYOUTS: dict[str, Layout] = {layout.key: layout for family in FAMILIES for layout in family.layouts}
_BY_LAYER = {name: family for family in FAMILIES for name in family.layers}


def family_of(kind: type) -> Family | None:
    """The family of a layer's class, by its name or a base's."""
    return next((_BY_LAYER[base.__name__] for base in kind.__mro__ if base.__name__ in _BY_LAYER), None)
