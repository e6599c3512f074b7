"""What the patch knows of each architecture: where the sites are, and how a layer's forward is fused.

Each file describes layers of one shape. A fused forward stands in for a library's forward only where that is recognised
by its fingerprint; where it is not, the site is edited all the same, unfused. Another package adds a family of its own
by `register_family`.
"""

from __future__ import annotations

from . import classic, decoders, encoders, parallel, t5
from .description import PLACES, Edits, Family, Layout, Point, child_at, first_path

__all__ = [
    "FAMILIES",
    "LAYOUTS",
    "Edits",
    "Family",
    "Layout",
    "Point",
    "child_at",
    "family_of",
    "first_path",
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
        ValueError: a layer's class or a layout's key is known already, a place does not exist or has no site.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family: got {type(family).__name__}, expected a Family")
    classes = [name.rpartition(".")[::2] for name in family.layers]
    known = [name for _, name in classes if name in _BY_LAYER]
    if known or not family.layers:
        raise ValueError(f"family: the layers {', '.join(known) or '(none)'} are known already, or none was given")
    wrong = [place for place in (*family.sites, *family.inside) if place not in PLACES]
    if wrong or not family.sites or not all(family.sites.values()):
        raise ValueError(f"family: got sites for {list(family.sites)}, expected paths for some of {list(PLACES)}")
    if any(isinstance(paths, str) for paths in family.sites.values()):
        raise ValueError(f"family: got sites {family.sites}, expected a tuple of paths for each place")
    keys = [layout.key for layout in family.layouts]
    taken = [key for key in keys if key in LAYOUTS or keys.count(key) > 1]
    if taken:
        raise ValueError(f"family: the layouts' keys {', '.join(taken)} are taken; give each one of its own")
    FAMILIES.append(family)
    LAYOUTS.update({layout.key: layout for layout in family.layouts})
    _BY_LAYER.update({name: (module, family) for module, name in classes})


def family_of(kind: type) -> Family | None:
    """The family of a layer's class, by its name or a base's."""
    for base in kind.__mro__:
        module, family = _BY_LAYER.get(base.__name__, ("", None))
        if family is not None and base.__module__.endswith(module):
            return family
    return None


for _family in decoders.FAMILIES + classic.FAMILIES + encoders.FAMILIES + parallel.FAMILIES + t5.FAMILIES:
    register_family(_family)
