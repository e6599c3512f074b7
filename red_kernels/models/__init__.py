"""What the patch knows of each architecture: where the sites are, and how a layer's forward is fused.

Each file describes layers of one shape. A fused forward stands in for a library's forward only where that is recognised
by its fingerprint; where it is not, the site is edited all the same, unfused. Another package adds a family of its own
by `register_family`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..fusion import norms
from . import classic, decoders, encoders, parallel, t5
from .description import PLACES, Edits, Family, Layout, Point
from .modules import NORMS

__all__ = [
    "FAMILIES",
    "LAYOUTS",
    "Edits",
    "Family",
    "Layout",
    "Point",
    "family_of",
    "register_family",
]

FAMILIES: list[Family] = []
LAYOUTS: dict[str, Layout] = {}
_BY_LAYER: dict[str, tuple[str, Family]] = {}  # class name to the end of its module's name, and the family


def register_family(family: Family) -> None:
    """Make the layers of an architecture known to `rk.patch`.

    A family needs no more than the class names of its layers and the paths of its sites; with layouts its edits are
    fused. Layouts of the families here may be used again under a key of their own (`dataclasses.replace`).

    Args:
        family: the description; see `Family`.

    Raises:
        TypeError: it is no `Family`.
        ValueError: a layer's class or a layout's key is known already, a place does not exist or has no site, or a
            layout has a point elsewhere.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family: got {type(family).__name__}, expected a Family")
    if isinstance(family.layers, str) or not family.layers:
        raise ValueError(f"family: got layers {family.layers!r}, expected a tuple of class names")
    classes = [name.rpartition(".")[::2] for name in family.layers]
    names = [name for _, name in classes]
    known = [name for name in names if name in _BY_LAYER or names.count(name) > 1]
    if known:
        raise ValueError(f"family: the layers {', '.join(known)} are known already, or come twice")
    wrong = [place for place in (*family.sites, *family.inside) if place not in PLACES]
    if wrong or not family.sites or not all(family.sites.values()):
        raise ValueError(f"family: got sites for {list(family.sites)}, expected paths for some of {list(PLACES)}")
    if any(isinstance(paths, str) for paths in family.sites.values()):
        raise ValueError(f"family: got sites {family.sites}, expected a tuple of paths for each place")
    for layout in family.layouts:
        for point in layout.points:
            path = ".".join(filter(None, (layout.block, point.site)))
            if point.place not in Edits._fields or path not in _paths(family.sites.get(point.place, ())):
                raise ValueError(
                    f"family: layout {layout.key!r} has a point for {point.place!r} at {path!r}, which is none of the "
                    f"family's sites that a forward can apply: {family.sites}"
                )
    keys = [layout.key for layout in family.layouts]
    taken = [key for key in keys if key in LAYOUTS or keys.count(key) > 1]
    if taken:
        raise ValueError(f"family: the layouts' keys {', '.join(taken)} are taken; give each one of its own")
    FAMILIES.append(family)
    LAYOUTS.update({layout.key: layout for layout in family.layouts})
    _BY_LAYER.update({name: (module, family) for module, name in classes})


def _paths(entries: Iterable[str]) -> set[str]:
    return {path.partition(" with ")[0] for entry in entries for path in entry.removesuffix("?").split("|")}


def family_of(kind: type) -> Family | None:
    """The family of a layer's class, by its name or a base's."""
    for base in kind.__mro__:
        module, family = _BY_LAYER.get(base.__name__, ("", None))
        if family is not None and base.__module__.endswith(module):
            return family
    return None


norms.KNOWN.update(NORMS)
for _family in decoders.FAMILIES + classic.FAMILIES + encoders.FAMILIES + parallel.FAMILIES + t5.FAMILIES:
    register_family(_family)
