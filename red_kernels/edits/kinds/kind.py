"""What a kind of edit is, and an edit as a call carries it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

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
        start: the value of all its elements at the start.
        shape: of the tensor, given the width of the site's output.
        key: its name in the files of RED's authors; None if they have none.
        row: whether these files have it as `[1, width]`.
    """

    name: str
    start: float = 0.0
    shape: Callable[[int], tuple[int, ...]] = _row
    key: str | None = None
    row: bool = False

    def made(self, width: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        """A tensor of this part as it starts."""
        return torch.full(self.shape(width), self.start, dtype=dtype, device=device)


@dataclass(frozen=True)
class Kind:
    """A kind of edit: all that the package knows of it.

    Kinds of one `formula` differ in the parts that they train. Their edits can be in one batch, one for each row.

    Attributes:
        name: as in `RedConfig`.
        parts: what is trained.
        formula: `formula(h, vectors)`: the edited output, in plain PyTorch. `h` is `(..., width)`; a tensor of vectors
            has its part's shape, or that shape behind leading dimensions of `h` where each row has its own edit.
        help: what it computes, for messages and help.
        kernel: the fused kernels that compute it: `"affine"` (in front of an addition and a norm too) or
            `"affine_layer_norm"`; None where `formula` is all there is.
        operands: what such a kernel takes, made of the vectors: `scale` and `bias`, and for a norm behind them
            `norm_weight` and `norm_bias`. None: the vectors themselves.
        fold: `fold(weight, bias, vectors)`: a linear layer's weight `(width, n)` and bias with the edit merged into
            them. None: no layer can stand in for the edit, and merging is refused.
        chain: `chain(first, second)`: the vectors of one edit that does what two do one after the other. None: an edit
            of this kind is applied alone.
        neutral: whether it is the identity at the start. If so, rows with the edit and rows without can be in one
            batch, and edits can be combined by weights.
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

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of its parts."""
        return tuple(part.name for part in self.parts)

    def __reduce__(self) -> tuple[Callable[[str], Kind], tuple[str]]:
        return kind_named, (self.name,)  # formulas may be of any make, and a copy is the same kind

    def width(self, vectors: Vectors) -> int | None:
        """The width of the output that vectors of these shapes are for; None where they fit every width.

        Raises:
            ValueError: they fit none.
        """
        held = ((part, vectors.get(part.name)) for part in self.parts)
        shapes = {part: tuple(vector.shape) for part, vector in held if vector is not None}

        def fit(width: int) -> bool:
            return all(tuple(part.shape(width)) == shape for part, shape in shapes.items())

        sizes = dict.fromkeys(size for shape in shapes.values() for size in shape)
        found = [size for size in (*sizes, 1) if fit(size)]
        if not found:
            shown = {part.name: shape[0] if len(shape) == 1 else shape for part, shape in shapes.items()}
            raise ValueError(f"differ in width: {shown}")
        return None if fit(found[0] + 1) else found[0]

    def needs_bias(self, width: int) -> bool:
        """Whether a linear layer without a bias gets one when this edit is merged into it."""
        if self.fold is None:
            return False
        vectors = {part.name: part.made(width, torch.float32, "meta") for part in self.parts}
        return self.fold(torch.empty(width, 1, device="meta"), None, vectors)[1] is not None


_KINDS: dict[str, Kind] = {}  # by name; `registry.py` fills it


def kind_named(name: str) -> Kind:
    """The kind of that name. Raises ValueError for one that nobody has registered."""
    if name not in _KINDS:
        raise ValueError(
            f"kind: got {name!r}, which is not registered, expected one of {', '.join(map(repr, _KINDS))}; import the "
            "package that registers it first (rk.register_kind)"
        )
    return _KINDS[name]


_by_name = kind_named  # as pickles name it


class Dropout(NamedTuple):
    """A dropout behind an edit.

    Attributes:
        p: the probability of an element to be dropped.
        seed: of its mask: an int64 tensor of one element, on the device of the activation.
    """

    p: float
    seed: Tensor


class Edit(NamedTuple):
    """An edit as it is applied at one site, in one call.

    Attributes:
        kind: which; with other parts where edits of several kinds of its formula come together.
        vectors: part to tensor.
        ids: with them a tensor has one more dimension in front, and each row of the activation takes the entry that its
            id names. int64, of the activation's shape without its last dimension.
        dropout: what is done to the edited activation; None for nothing.
    """

    kind: Kind
    vectors: Vectors
    ids: Tensor | None = None
    dropout: Dropout | None = None

    @property
    def operands(self) -> Vectors:
        """What the kind's kernel takes."""
        make = self.kind.operands
        return self.vectors if make is None else make(self.vectors)

    def plain(self, hidden: Tensor) -> Tensor:
        """`hidden` of shape `(..., width)` edited in plain PyTorch: in fp32 (fp64 for fp64), rounded once."""
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        vectors = {
            name: None if vector is None else vector.to(wide) if self.ids is None else vector.to(wide)[self.ids]
            for name, vector in self.vectors.items()
        }
        return self.kind.formula(hidden.to(wide), vectors).to(hidden.dtype)
