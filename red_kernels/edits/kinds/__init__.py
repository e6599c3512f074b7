"""The kinds of edit, one in a file: what each trains, computes and merges to. All else reads it from here."""

from .affine import ALL, BIAS, SCALING, affine_edit
from .kind import Dropout, Edit, Kind, Part, kind_named
from .ln import LN
from .registry import KINDS, PARTS, kind_with, register_kind

for _kind in (ALL, SCALING, BIAS, LN):
    register_kind(_kind)

__all__ = [
    "KINDS",
    "PARTS",
    "Dropout",
    "Edit",
    "Kind",
    "Part",
    "affine_edit",
    "kind_named",
    "kind_with",
    "register_kind",
]
