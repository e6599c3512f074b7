"""The kinds by name. Other packages can add kinds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from .kind import _FAMILIES, _KINDS, Family, Kind, Part, Vectors, kind_named

_PARTS: dict[str, Part] = {}
KINDS: Mapping[str, Kind] = MappingProxyType(_KINDS)
PARTS: Mapping[str, Part] = MappingProxyType(_PARTS)  # of all kinds, by name, in the order of files and reports
# Names that no part may have: the module with the parts adds its attributes.
RESERVED = {"default", "training", "frozen", "lent", "gate", "kind"}
# The fused kernels and the vectors that each takes.
KERNELS = {
    "affine": ("scale", "bias"),
    "affine_layer_norm": ("scale", "bias", "norm_weight", "norm_bias"),
    "mix": ("first", "second", "bias"),
    "mix_mix": ("inner", "outer", "bias"),
}


def register_kind(kind: Kind) -> None:
    """Register a kind of edit for `RedConfig`, checkpoints, merging, PEFT and the command line.

    Args:
        kind: with a new name. A part may share its name with another kind's part if both are equal.

    Raises:
        TypeError: it is not a `Kind`, its parts are not a tuple of `Part`, or its formula is not callable.
        ValueError: its name is taken or empty; it has no parts; a part's name is invalid or reserved; another kind
            has a part of that name with other values, or all of its parts and another formula; its kernel is unknown,
            or does not accept its operands.
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"kind: got {type(kind).__name__}, expected a red_kernels.edits.kinds.Kind")
    if not isinstance(kind.parts, tuple) or not all(isinstance(part, Part) for part in kind.parts):
        raise TypeError(f"kind: got the parts {kind.parts!r}, expected a tuple of red_kernels.edits.kinds.Part")
    if not callable(kind.formula):
        raise TypeError(f"kind: got the formula {kind.formula!r}, expected a function of h and the vectors")
    if not kind.name or not isinstance(kind.name, str) or ":" in kind.name or _KINDS.get(kind.name, kind) != kind:
        raise ValueError(f"kind: got the name {kind.name!r}, expected one that no other kind has")
    if not kind.parts or len(set(kind.names)) < len(kind.parts):
        raise ValueError(f"kind: {kind.name!r} has the parts {list(kind.names)}, expected at least one, none twice")
    for part in kind.parts:
        if not re.fullmatch(r"[A-Za-z]\w*", part.name) or part.name in RESERVED:
            raise ValueError(f"kind: got a part named {part.name!r}, expected a valid attribute name")
        if not _PARTS.get(part.name, part).is_as(part):
            raise ValueError(f"kind: another kind has a part {part.name!r} with another start, shape, key or row")
    same = kind_with(kind.names)
    if same is not None and same.formula is not kind.formula and _KINDS.get(kind.name) != kind:
        raise ValueError(
            f"kind: {kind.name!r} has the parts of {same.name!r} and another formula; give its parts other names: "
            "files of PEFT and of RED's authors identify a kind by its parts"
        )
    if kind.kernel is not None:
        if kind.kernel not in KERNELS:
            raise ValueError(f"kind: got the kernel {kind.kernel!r}, expected None or one of {', '.join(KERNELS)}")
        _check_operands(kind, kind.kernel)
    _KINDS[kind.name] = kind
    for part in kind.parts:
        _PARTS.setdefault(part.name, part)


def register_family(name: str, family: Family) -> None:
    """Register kinds that differ in a number: the default by the bare name, others as `name:number`.

    Raises:
        TypeError, ValueError: as in :func:`register_kind`, for the default kind.
    """
    register_kind(family.make(family.default))
    _FAMILIES[name] = family


def is_kind(name: object) -> bool:
    """Whether :func:`kind_named` knows a name."""
    try:
        return isinstance(name, str) and kind_named(name) is not None
    except ValueError:
        return False


def kind_names() -> str:
    """All valid names of kinds, quoted, for messages."""
    return ", ".join(f"'{name}'" + (f" or '{name}:N'" if name in _FAMILIES else "") for name in _KINDS)


def kind_fitting(vectors: Mapping[str, Tensor]) -> Kind | None:
    """The kind with these tensors; of several that differ in their option, the default or else the first match.

    None for no kind. Raises ValueError, as `Kind.width`, if the kind of these parts has no such shapes.
    """
    kind = kind_with(vectors)
    if kind is None or kind.family not in _FAMILIES:
        return kind
    sizes = sorted({size for vector in vectors.values() for size in vector.shape})
    for name in (kind.name, *(f"{kind.family}:{size}" for size in (1, 2, 4, *sizes))):
        try:
            other = kind_named(name)
            other.width(vectors)
            return other
        except ValueError:
            continue
    kind.width(vectors)
    return kind


def option_of(name: str) -> str:
    """The meaning of a kind's option, with its default; empty for a kind without one."""
    family = _FAMILIES.get(name)
    return "" if family is None else f"{family.option} (default {family.default})"


def _check_operands(kind: Kind, kernel: str) -> None:
    """Raise if a kernel would get unknown vectors, and would ignore them."""
    width = kind.least_width
    vectors: Vectors = {part.name: part.made(width, torch.float32, "cpu") for part in kind.parts}
    vectors = {**vectors, **{name: torch.zeros(width) for name in kind.requires}}
    given = vectors if kind.operands is None else kind.operands(vectors)
    known = KERNELS[kernel]
    if not given or not set(given) <= set(known):
        raise ValueError(
            f"kind: {kind.name!r} gives the kernel {kernel!r} the vectors {sorted(given)}, expected some of "
            f"{', '.join(known)}; `operands` computes these from other parts"
        )


def kind_with(parts: Iterable[str]) -> Kind | None:
    """The kind with exactly these parts, the first registered one; None for none."""
    wanted = set(parts)
    return next((kind for kind in _KINDS.values() if set(kind.names) == wanted), None)
