"""The kinds by name. Others can be added from outside of the package."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from .kind import _KINDS, Kind, Part, Vectors

_PARTS: dict[str, Part] = {}
KINDS: Mapping[str, Kind] = MappingProxyType(_KINDS)
PARTS: Mapping[str, Part] = MappingProxyType(_PARTS)  # of all kinds, by name, in the order that files and reports have
# Names that no part may have: the module that holds the parts adds its attributes.
RESERVED = {"default", "training", "frozen", "lent", "gate", "kind"}
# The fused kernels and the vectors that each takes.
KERNELS = {"affine": ("scale", "bias"), "affine_layer_norm": ("scale", "bias", "norm_weight", "norm_bias")}


def register_kind(kind: Kind) -> None:
    """Make a kind of edit known: to `RedConfig`, checkpoints, merging, PEFT and the command line.

    Args:
        kind: with a name that no other kind has. A part may share its name with another kind's if both are the same.

    Raises:
        TypeError: it is no `Kind`, its parts are no tuple of `Part`, or its formula cannot be called.
        ValueError: its name is taken or empty; it has no parts; a part's name is not valid or is reserved; another kind
            has a part of that name with other values, or all of its parts and another formula; its kernel is not known,
            or does not take what it is given.
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"kind: got {type(kind).__name__}, expected a red_kernels.edits.kinds.Kind")
    if not isinstance(kind.parts, tuple) or not all(isinstance(part, Part) for part in kind.parts):
        raise TypeError(f"kind: got the parts {kind.parts!r}, expected a tuple of red_kernels.edits.kinds.Part")
    if not callable(kind.formula):
        raise TypeError(f"kind: got the formula {kind.formula!r}, expected a function of h and the vectors")
    if not kind.name or not isinstance(kind.name, str) or _KINDS.get(kind.name, kind) != kind:
        raise ValueError(f"kind: got the name {kind.name!r}, expected one that no other kind has")
    if not kind.parts or len(set(kind.names)) < len(kind.parts):
        raise ValueError(f"kind: {kind.name!r} has the parts {list(kind.names)}, expected at least one, none twice")
    for part in kind.parts:
        if not re.fullmatch(r"[A-Za-z]\w*", part.name) or part.name in RESERVED:
            raise ValueError(f"kind: got a part named {part.name!r}, expected a name that an attribute can have")
        if _PARTS.get(part.name, part) != part:
            raise ValueError(f"kind: another kind has a part {part.name!r} with another start, shape, key or row")
    same = kind_with(kind.names)
    if same is not None and same.formula is not kind.formula:
        raise ValueError(
            f"kind: {kind.name!r} has the parts of {same.name!r} and another formula; give its parts names of their "
            "own, as files of PEFT and of RED's authors tell a kind by them"
        )
    if kind.kernel is not None:
        if kind.kernel not in KERNELS:
            raise ValueError(f"kind: got the kernel {kind.kernel!r}, expected None or one of {', '.join(KERNELS)}")
        _check_operands(kind, kind.kernel)
    _KINDS[kind.name] = kind
    _PARTS.update((part.name, part) for part in kind.parts)


def _check_operands(kind: Kind, kernel: str) -> None:
    """Raise where a kernel would be given vectors that it does not know, and leave out the edit."""
    vectors: Vectors = {part.name: part.made(4, torch.float32, "cpu") for part in kind.parts}
    given = vectors if kind.operands is None else kind.operands(vectors)
    known = KERNELS[kernel]
    if not given or not set(given) <= set(known):
        raise ValueError(
            f"kind: {kind.name!r} gives the kernel {kernel!r} the vectors {sorted(given)}, expected some of "
            f"{', '.join(known)}; `operands` makes these of other parts"
        )


def kind_with(parts: Iterable[str]) -> Kind | None:
    """The kind that has exactly these parts, the first that was registered; None for none."""
    wanted = set(parts)
    return next((kind for kind in _KINDS.values() if set(kind.names) == wanted), None)
