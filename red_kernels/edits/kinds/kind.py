"""A kind of edit, and an edit as an argument of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...support.sharded import is_sharded, spread

Vectors = Mapping[str, Tensor | None]  # a part's name to its tensor; an absent part or None is the identity
Formula = Callable[[Tensor, Vectors], Tensor]
Folded = tuple[Tensor, Tensor | None]


def _row(width: int) -> tuple[int, ...]:
    return (width,)


@dataclass(frozen=True)
class Part:
    """One trained tensor of an edit.

    Attributes:
        name: as in `state_dict` and in files: letters, digits and `_`.
        start: the initial value of all its elements; with `draw`, the value with which the edit is the identity.
        shape: of the tensor, for the width of the site's output.
        key: its name in the files of RED's authors; None if they have none.
        row: whether these files store it as `[1, width]`.
        draw: fills an fp32 tensor on the CPU in place with random initial values, from torch's generator.
        like: the part of the same edit from which it takes its initial values.
    """

    name: str
    start: float = 0.0
    shape: Callable[[int], tuple[int, ...]] = _row
    key: str | None = None
    row: bool = False
    draw: Callable[[Tensor], object] | None = None
    like: str | None = None

    def made(self, width: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        """A tensor of this part with which the edit is the identity."""
        return torch.full(self.shape(width), self.start, dtype=dtype, device=device)

    def is_as(self, other: Part) -> bool:
        """Whether files and batches can treat both as one part: they may differ in their draw and size."""
        alike = (self.name, self.start, self.key, self.row) == (other.name, other.start, other.key, other.row)
        return alike and len(self.shape(64)) == len(other.shape(64))


@dataclass(frozen=True)
class Kind:
    """A kind of edit, as the whole package uses it.

    Kinds of one `formula` differ in their trained parts. Their edits can share a batch, one for each row.

    Attributes:
        name: as in `RedConfig`.
        parts: the trained parts.
        formula: `formula(h, vectors)`: the edited output, in plain PyTorch. `h` is `(..., width)`. A tensor of vectors
            has its part's shape, or that shape behind leading dimensions of `h` if each row has its own edit.
        help: the formula, for messages and help.
        kernel: the fused kernels that compute it: `"affine"` (also before an addition and a norm) or
            `"affine_layer_norm"`, or `"mix"` (also before an addition and a norm) or `"mix_mix"`, two reflections in
            sequence; None if only `formula` computes it.
        operands: the arguments of the kernel, computed from the vectors: `scale` and `bias`, and for a norm behind them
            `norm_weight` and `norm_bias`. None: the vectors themselves.
        fold: `fold(weight, bias, vectors)`: a linear layer's weight `(width, n)` and bias with the edit merged into
            them. None: no layer can express the edit, and merging is refused.
        chain: `chain(first, second)`: the vectors of one edit equal to two in sequence. None: an edit of this kind
            is applied alone.
        neutral: whether it is the identity with the `start` of all parts. If so, rows with the edit and rows
            without can share a batch.
        identity: whether it is initially the identity; None: as `neutral`.
        combines: whether edits can be combined by weights, part by part; None: as `neutral`.
        blocks: of the kernels of mixes, as in :class:`red_kernels.backends.arguments.Mix`.
        context: further arguments of the formula, in the same mapping: `"linear_bias"`, the bias of the site's
            linear layer (None if it has none), and `"initial"`, the input of the stack's first layer.
        requires: the entries of the context that must exist.
        fits: `fits(width)`: why an edit of outputs of this width is impossible, or None. None: all widths are
            possible.
        by_row: `by_row(h, vectors, ids)`: the formula for several edits, each tensor with one more leading
            dimension, if that is faster than tensors for each row.
        family: the name without an option, `"rotation"` of `"rotation:2"`.
        on_input: whether it edits the input of a linear layer, at any position. Its `fold` then gets that layer's
            weight `(n, width)` and bias.
        shared: whether all sites of a width in a model share their tensors.
        part_of: `part_of(kind, width, count)`: the kind of edit that each of `count` processes applies to its part of
            `width` columns, with the same part of each tensor. It raises ValueError with the reason if a part cannot be
            edited alone. None: all columns of a row are mixed.
    """

    name: str
    parts: tuple[Part, ...]
    formula: Formula
    help: str
    kernel: str | None = None
    operands: Callable[[Vectors], Vectors] | None = None
    fold: Callable[[Tensor, Tensor | None, Vectors], Folded] | None = None
    chain: Callable[[Vectors, Vectors], Vectors] | None = None
    neutral: bool = True
    identity: bool | None = None
    combines: bool | None = None
    blocks: int = 0
    context: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    fits: Callable[[int], str | None] | None = None
    by_row: Callable[[Tensor, Vectors, Tensor], Tensor] | None = None
    family: str = ""
    on_input: bool = False
    shared: bool = False
    part_of: Callable[[Kind, int, int], Kind] | None = None

    @property
    def starts_as_identity(self) -> bool:
        """Whether a new edit is the identity."""
        return self.neutral if self.identity is None else self.identity

    @property
    def combinable(self) -> bool:
        """Whether edits can be combined by weights."""
        return self.neutral if self.combines is None else self.combines

    def start(self, width: int, dtype: torch.dtype, device: torch.device | str | None) -> dict[str, Tensor]:
        """The tensors of a new edit, by part."""
        made: dict[str, Tensor] = {}
        for part in self.parts:
            made[part.name] = part.made(width, dtype, device)
            self._fill(part, made)
        return made

    def fill(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Set tensors to the values of a new edit, in place."""
        for part in self.parts:
            own = tensors.get(part.name)
            if own is not None:
                own.fill_(part.start)
                self._fill(part, tensors)

    def _fill(self, part: Part, tensors: Mapping[str, Tensor | None]) -> None:
        own: Any = tensors[part.name]
        if own is None or own.is_meta:
            return
        like = None if part.like is None else tensors.get(part.like)
        if like is not None:
            own.copy_(like)
        elif part.draw is not None:
            drawn = torch.empty(own.shape, dtype=torch.float32)
            part.draw(drawn)
            if is_sharded(own):  # all processes get the values drawn by one
                drawn = spread(drawn.to(own.device, own.dtype), own.device_mesh, own.placements, from_first=True)
            own.copy_(drawn)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of its parts."""
        return tuple(part.name for part in self.parts)

    def __reduce__(self) -> tuple[Callable[[str], Kind], tuple[str]]:
        return kind_named, (self.name,)  # formulas may be any callable, and a copy is the same kind

    def width(self, vectors: Vectors) -> int | None:
        """The output width of vectors of these shapes; None if they fit every width.

        Raises:
            ValueError: they fit no width.
        """
        held = ((part, vectors.get(part.name)) for part in self.parts)
        shapes = {part: tuple(vector.shape) for part, vector in held if vector is not None}

        def fit(width: int) -> bool:
            return all(tuple(part.shape(width)) == shape for part, shape in shapes.items())

        sizes = dict.fromkeys(size for shape in shapes.values() for size in shape)
        multiples = (factor * size for size in sizes for factor in (2, 0.5))  # of parts that are half or twice as long
        found = [int(size) for size in (*sizes, *multiples, 1) if size >= 1 and fit(int(size))]
        if not found:
            shown = {part.name: shape[0] if len(shape) == 1 else shape for part, shape in shapes.items()}
            raise ValueError(f"differ in width: {shown}")
        return None if fit(found[0] + 1) and fit(found[0] + 2) else found[0]

    def needs_bias(self, width: int) -> bool:
        """Whether merging this edit gives a linear layer without a bias one."""
        if self.fold is None or "linear_bias" in self.requires:
            return False
        vectors: dict[str, Tensor | None] = {part.name: part.made(width, torch.float32, "meta") for part in self.parts}
        vectors |= dict.fromkeys(self.context)
        shape = (1, width) if self.on_input else (width, 1)
        return self.fold(torch.empty(shape, device="meta"), None, vectors)[1] is not None

    def split(self, width: int, count: int) -> Kind:
        """The kind of edit of one of `count` processes, each with its part of the columns.

        Raises:
            ValueError: an edit of this kind cannot be split so; the message is the reason.
        """
        if self.part_of is None:
            raise ValueError("needs all columns of a row together")
        return self.part_of(self, width, count)

    @property
    def draws(self) -> bool:
        """Whether a new edit has random values."""
        return any(part.draw is not None for part in self.parts)

    @property
    def least_width(self) -> int:
        """A small width that outputs may have."""
        return next(width for width in (1 << power for power in range(24)) if not self.fits or not self.fits(width))

    def refuse_width(self, width: int, where: str) -> None:
        """Raise ValueError if outputs of this width cannot be edited; `where` names the argument or site."""
        reason = None if self.fits is None else self.fits(width)
        if reason is not None:
            raise ValueError(f"{where} has outputs of width {width}, and an edit of kind {self.name!r} {reason}")


class Family(NamedTuple):
    """Kinds of one formula that differ in a number, the option after the colon of `"rotation:2"`.

    Attributes:
        make: the kind of an option. Raises ValueError with the expected values.
        default: the option of the kind with the bare name.
        option: the meaning of the number, for help.
    """

    make: Callable[[int], Kind]
    default: int
    option: str


_KINDS: dict[str, Kind] = {}  # by name; `registry.py` fills it
_FAMILIES: dict[str, Family] = {}
_OPTIONS: dict[str, Kind] = {}  # made by families
FORMULAS: dict[str, Callable[[Kind], Formula]] = {}  # the result of each kernel, from its operands
_MOST = 1 << 20  # of an option


def kind_named(name: str) -> Kind:
    """The kind of that name, `"rotation"`, or with an option `"rotation:2"`.

    Raises:
        ValueError: it is not registered, or has no such option.
    """
    found = _KINDS.get(name) or _OPTIONS.get(name)
    if found is not None:
        return found
    family, _, option = str(name).partition(":")
    known = _FAMILIES.get(family)
    if known is None:
        raise ValueError(
            f"kind: got {name!r}, which is not registered, expected one of {', '.join(map(repr, _KINDS))}; import the "
            "package that registers it first (rk.register_kind)"
        )
    if not (option.isascii() and option.isdecimal() and 0 < int(option[:10]) <= _MOST):
        raise ValueError(f"kind: got {name!r}, expected {family!r} or '{family}:N', with N as {known.option}")
    number = int(option)
    if number == known.default or str(number) != option:
        return kind_named(family if number == known.default else f"{family}:{number}")
    return _OPTIONS.setdefault(name, known.make(number))


_by_name = kind_named  # its name in pickles


class Dropout(NamedTuple):
    """A dropout behind an edit.

    Attributes:
        p: the probability to drop an element.
        seed: of its mask: an int64 tensor of one element, on the device of the activation.
    """

    p: float
    seed: Tensor


class Edit(NamedTuple):
    """An edit as applied at one site, in one call.

    Attributes:
        kind: its kind; with other parts if edits of several kinds of one formula are combined.
        vectors: part to tensor.
        ids: with ids a tensor has one more leading dimension, and each row of the activation takes the entry of its id.
            int64, of the activation's shape without its last dimension.
        dropout: applied to the edited activation; None for none.
    """

    kind: Kind
    vectors: Vectors
    ids: Tensor | None = None
    dropout: Dropout | None = None

    @property
    def operands(self) -> Vectors:
        """The operands of the kind's kernel."""
        make = self.kind.operands
        return self.vectors if make is None else make(self.vectors)

    def plain(self, hidden: Tensor) -> Tensor:
        """`hidden` of shape `(..., width)` edited in plain PyTorch: in fp32 (fp64 for fp64), rounded once."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        kind, ids = self.kind, self.ids
        # Tensors that sites share are at one site, and the sites may be on several devices.
        device = hidden.device if self.kind.shared else None
        vectors: Vectors = {name: None if v is None else v.to(device, wide) for name, v in self.vectors.items()}
        if ids is None:
            return kind.formula(hidden.to(wide), vectors).to(hidden.dtype)
        if kind.by_row is not None:
            return kind.by_row(hidden.to(wide), vectors, ids).to(hidden.dtype)
        formula = kind.formula
        if kind.operands is not None and kind.kernel in FORMULAS:  # made once for each edit, not for each row
            vectors, formula = kind.operands(vectors), FORMULAS[kind.kernel](kind)
        rows = {name: None if v is None or name in kind.context else v[ids] for name, v in vectors.items()}
        rows |= {name: vectors[name] for name in kind.context if name in vectors}
        return formula(hidden.to(wide), rows).to(hidden.dtype)
