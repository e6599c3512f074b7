"""The configuration of a patch: its sites and its kind of edit."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..support.parse import checked_count, shown
from .kinds import KINDS, Kind, is_kind, kind_named, kind_names

__all__ = ["KINDS", "POSITIONS", "RedConfig"]

# Each position with the places in a layer that it edits; `models/` maps places to the modules of an architecture.
POSITIONS: dict[str, tuple[str, ...]] = {
    "ffn": ("ffn",),
    "attn": ("attn",),
    "ffn_attn": ("attn", "ffn"),
    "res": ("res",),
    "res_with_attn": ("attn_res", "res"),
    "more": ("qkv", "attn", "ffn"),
    "ia3": ("key", "value", "ffn_in"),
    "value": ("value",),
}
STACKS = ("text", "vision", "audio", "encoder", "decoder", "other", "all")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class RedConfig:
    """The edited sites of a model, and their kind of edit (RED, arXiv 2402.15179).

    Attributes:
        position: the edited places. `"ffn"`: the output of each FFN's last projection; `"attn"`: of each attention's
            output projection; `"ffn_attn"`: both; `"res"`: the residual stream behind each FFN (behind its norm in
            post-norm layers); `"res_with_attn"`: behind each attention as well; `"more"` (RED++): the query, key and
            value projections (one if they are joint) and both of `"ffn_attn"`; `"ia3"` (IA3, arXiv 2205.05638): the key
            and value projections, and the input of each FFN's last projection; `"value"` (BEFT): the value projections.
        kind: `"all"` (`scale * h + bias`), `"scaling"` (`scale * h`), `"bias"` (`h + bias`), `"ln"`
            (`LayerNorm(scale * h + bias)` with a trainable LayerNorm, initially not the identity), or a kind added by
            `rk.register_kind`.
        layers: indices of the layers to edit, a range or any iterable of integers from 0; None for all. They count the
            layers of a stack; in an encoder-decoder model they apply to the encoder and the decoder. Stored as a sorted
            tuple; 100,000 at most.
        dtype: of the vectors. In half precision an update smaller than half a rounding step at 1.0 is lost, so any
            dtype but float32 is for inference.
        sites: for unknown layouts: a glob, or several, for the names of the modules whose output is edited
            (`"*.mlp.down_proj"`; `*` matches dots too). Stored as a tuple. Not together with `layers`.
        train_head: keep the model's head trainable with the edits, in fp32: all parameters outside its base model. A
            head that was random when it was loaded needs this. By default it is frozen, and the report names it.
        stacks: the edited stacks of layers if a model has several: `"text"`, `"vision"`, `"audio"`, `"encoder"`,
            `"decoder"` or `"other"`, several of them, or `"all"`. None: the stacks of text, the encoder's and the
            decoder's; all stacks in a model without these.

    Raises:
        ValueError, TypeError: an invalid value of one of these.
    """

    position: str = "ffn"
    kind: str = "all"
    layers: Iterable[int] | None = None
    dtype: torch.dtype = torch.float32
    sites: str | Iterable[str] | None = field(default=None)
    train_head: bool = False
    stacks: str | Iterable[str] | None = None

    def __post_init__(self) -> None:
        if self.position not in tuple(POSITIONS):
            raise ValueError(f"position: got {shown(self.position)}, supported: {_listed(POSITIONS)}")
        if not is_kind(self.kind):
            raise ValueError(f"kind: got {shown(self.kind)}, supported: {kind_names()}")
        object.__setattr__(self, "kind", kind_named(self.kind).name)  # a default option is omitted
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {shown(self.dtype)}, supported: {', '.join(map(str, DTYPES))}")
        if not isinstance(self.train_head, bool):
            raise TypeError(f"train_head: got {shown(self.train_head)}, expected True or False")
        if self.layers is not None and self.sites is not None:
            raise ValueError("layers and sites: got both, expected one; sites= alone names the modules")
        if self.layers is not None:
            object.__setattr__(self, "layers", _indices(self.layers))
        if self.stacks is not None and self.sites is not None:
            raise ValueError("stacks and sites: got both, expected one; sites= alone names the modules")
        if self.stacks is not None:
            object.__setattr__(self, "stacks", _stacks(self.stacks))
        if self.sites is not None:
            object.__setattr__(self, "sites", _patterns(self.sites))

    @property
    def edit_kind(self) -> Kind:
        """The kind that `kind` names."""
        return kind_named(self.kind)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the tensors that `kind` trains at each site."""
        return self.edit_kind.names

    @property
    def places(self) -> tuple[str, ...]:
        """The places in a layer that `position` edits."""
        return POSITIONS[self.position]


def _indices(layers: Iterable[int]) -> tuple[int, ...]:
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: got {shown(layers)}, expected a range or a list of layer indices")
    found = []
    for layer in checked_count(layers, "layers"):
        if isinstance(layer, bool):
            raise TypeError(f"layers: got {layer!r}, expected integers")
        try:
            found.append(operator.index(layer))
        except TypeError:
            raise TypeError(f"layers: got {shown(layer)}, expected integers") from None
    if not found:
        raise ValueError("layers: got no layer, expected at least one; None selects all layers")
    if min(found) < 0:
        raise ValueError(f"layers: got {shown(min(found))}, expected indices from 0")
    if len(set(found)) != len(found):
        raise ValueError(f"layers: got {shown(found)}, expected each layer once")
    return tuple(sorted(found))


def _stacks(stacks: str | Iterable[str]) -> tuple[str, ...]:
    if not isinstance(stacks, Iterable):
        raise TypeError(f"stacks: got {shown(stacks)}, expected one of {_listed(STACKS)}, or several")
    found = (stacks,) if isinstance(stacks, str) else tuple(checked_count(stacks, "stacks"))
    if not found or not all(isinstance(stack, str) and stack in STACKS for stack in found):
        raise ValueError(f"stacks: got {shown(stacks)}, supported: {_listed(STACKS)}, or several")
    return found


def _patterns(sites: str | Iterable[str]) -> tuple[str, ...]:
    if not isinstance(sites, Iterable):
        raise TypeError(f"sites: got {shown(sites)}, expected a glob of module names, or several")
    patterns = (sites,) if isinstance(sites, str) else tuple(checked_count(sites, "sites"))
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"sites: got {shown(sites)}, expected a glob of module names, or several")
    return patterns


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
