"""The kinds by name. Others can be added from outside of the package."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from .kind import _KINDS, Kind, Part

KERNELS = ("affine", "affine_layer_norm")
_PARTS: dict[str, Part] = {}
KINDS: Mapping[str, Kind] = MappingProxyType(_KINDS)
PARTS: Mapping[str, Part] = MappingProxyType(_PARTS)  # of all kinds, by name, in the order that files and reports have
_RESERVED = ("training", "frozen", "lent", "gate", "kind")  # attributes of the module that holds the parts


def register_kind(kind: Kind) -> None:
    """Make a kind of edit known: to `RedConfig`, checkpoints, merging, PEFT and the command line.

    Args:
        kind: with a name that no other kind has. A part may share its name with another kind's if both are the same.

    Raises:
        TypeError: it is no `Kind`.
        ValueError: its name is taken or empty; it has no parts; the name of a part is none, or is that of another
            part; its kernel is not known.
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"kind: got {type(kind).__name__}, expected a red_kernels.edits.kinds.Kind")
    if not kind.name or not isinstance(kind.name, str) or _KINDS.get(kind.name, kind) != kind:
        raise ValueError(f"kind: got the name {kind.name!r}, expected one that no other kind has")
    if not kind.parts or len(set(kind.names)) < len(kind.parts):
        raise ValueError(f"kind: {kind.name!r} has the parts {list(kind.names)}, expected at least one, none twice")
    for part in kind.parts:
        if not re.fullmatch(r"[A-Za-z]\w*", part.name) or part.name in _RESERVED:
            raise ValueError(f"kind: got a part named {part.name!r}, expected a name that an attribute can have")
        if _PARTS.get(part.name, part) != part:
            raise ValueError(f"kind: another kind has a part {part.name!r} with another start or shape")
    if kind.kernel is not None and kind.kernel not in KERNELS:
        raise ValueError(f"kind: got the kernel {kind.kernel!r}, expected None or one of {', '.join(KERNELS)}")
    _KINDS[kind.name] = kind
    _PARTS.update((part.name, part) for part in kind.parts)


def kind_with(parts: Iterable[str]) -> Kind | None:
    """The kind that has exactly these parts, the first that was registered; None for none."""
    wanted = set(parts)
    return next((kind for kind in _KINDS.values() if set(kind.names) == wanted), None)
