"""The sites of a model, found by its structure, for any architecture; and facts that only names show.

The computation of a model is not described here: edits are fused with their takers (`fusion/`).
"""

from __future__ import annotations

import warnings

from torch import nn

from .family import NARROWER, ON_INPUT, PLACES, Family
from .names import serves_alone
from .structure import Block, FoundSite, blocks_in
from .table import TABLE

__all__ = [
    "FAMILIES",
    "NARROWER",
    "ON_INPUT",
    "Block",
    "Family",
    "FoundSite",
    "blocks_in",
    "family_of",
    "register_family",
    "registered",
    "serves_alone",
]

FAMILIES: list[Family] = list(TABLE)  # those of the table, and registered ones
_BY_LAYER: dict[str, tuple[str, Family]] = {}  # class name to the end of its module's name, and the family


def register_family(family: Family) -> None:
    """Describe the sites of layers of one class, instead of finding them by structure.

    .. deprecated:: 0.1
       The sites of any architecture are found, and edits are fused where possible. This is for layers with a misleading
       structure; `RedConfig(sites=...)` names modules without it.

    Args:
        family: the description; see `Family`.

    Raises:
        TypeError: it is not a `Family`.
        ValueError: a layer's class is known already, or a place does not exist or has no site.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family: got {type(family).__name__}, expected a Family")
    if isinstance(family.layers, str) or not family.layers:
        raise ValueError(f"family: got layers {family.layers!r}, expected a tuple of class names")
    classes = [name.rpartition(".")[::2] for name in family.layers]
    names = [name for _, name in classes]
    known = [name for name in names if name in _BY_LAYER or names.count(name) > 1]
    if known:
        raise ValueError(f"family: the layers {', '.join(known)} are known already, or occur twice")
    wrong = [place for place in (*family.sites, *family.inside) if place not in PLACES]
    if wrong or not family.sites or not all(family.sites.values()):
        raise ValueError(f"family: got sites for {list(family.sites)}, expected paths for some of {list(PLACES)}")
    if any(isinstance(paths, str) for paths in family.sites.values()):
        raise ValueError(f"family: got sites {family.sites}, expected a tuple of paths for each place")
    warnings.warn(
        "rk.register_family is deprecated: sites are found by structure, and fused without a description; "
        "RedConfig(sites=...) names modules where that fails",
        DeprecationWarning,
        stacklevel=2,
    )
    _add(family)
    FAMILIES.append(family)
    _REGISTERED.append(family)


_REGISTERED: list[Family] = []


def _add(family: Family) -> None:
    for entry in family.layers:
        module, _, name = entry.rpartition(".")
        _BY_LAYER[name] = module, family


def family_of(kind: type[nn.Module]) -> Family | None:
    """The family of a layer's class, by its name or a base's."""
    for base in kind.__mro__:
        module, family = _BY_LAYER.get(base.__name__, ("", None))
        if family is not None and base.__module__.endswith(module):
            return family
    return None


def registered(kind: type[nn.Module]) -> Family | None:
    """The registered family of a layer's class, if it is not from the table: its sites are used for the layer."""
    found = family_of(kind)
    return found if found in _REGISTERED else None


for _family in TABLE:
    _add(_family)
