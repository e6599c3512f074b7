"""The kinds of edit, one file each: trained parts, formula and merging. All other code reads them from here."""

from .affine import ALL, BIAS, SCALING, SSF, affine_edit
from .generated import GENERATED
from .gift import GIFT
from .initial import INITIAL
from .kind import Dropout, Edit, Family, Kind, Part, kind_named
from .ln import LN
from .lowrank import DIRECT, LOWRANK
from .mixes import mix_edit
from .reflection import REFLECTION, REFLECTION_PAIR, REFLECTIONS
from .registry import (
    KINDS,
    PARTS,
    is_kind,
    kind_fitting,
    kind_names,
    kind_with,
    option_of,
    register_family,
    register_kind,
)
from .rotation import ROTATION

for _kind in (ALL, SCALING, BIAS, LN, SSF):
    register_kind(_kind)
for _name, _family in (
    ("rotation", ROTATION),
    ("reflection", REFLECTION),
    ("reflections", REFLECTIONS),
    ("reflection_pair", REFLECTION_PAIR),
    ("lowrank", LOWRANK),
    ("direct", DIRECT),
    ("generated", GENERATED),
    ("gift", GIFT),
    ("initial", INITIAL),
):
    register_family(_name, _family)

__all__ = [
    "KINDS",
    "PARTS",
    "Dropout",
    "Edit",
    "Family",
    "Kind",
    "Part",
    "affine_edit",
    "is_kind",
    "kind_fitting",
    "kind_named",
    "kind_names",
    "kind_with",
    "mix_edit",
    "option_of",
    "register_family",
    "register_kind",
]
