"""The form in which a family of models is described."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..edits.module import RedEdit

__all__ = [
    "PLACES",
    "RES",
    "TO_NEXT",
    "Edits",
    "Family",
    "Layout",
    "Point",
    "attention_points",
]

PLACES = ("ffn", "attn", "qkv", "res", "attn_res")


class Edits(NamedTuple):
    """What a fused forward applies itself; None where there is no edit, or where the site's hook applies it."""

    ffn: RedEdit | None = None
    attn: RedEdit | None = None
    res: RedEdit | None = None
    attn_res: RedEdit | None = None


@dataclass(frozen=True)
class Point:
    """An edit that a fused forward applies itself.

    Paths are relative to the layout's block; `""` is the block.

    Attributes:
        place: the name in `Edits` by which the forward gets it.
        site: path of the edited module; one of those that the family names for the place.
        outer: the module that is called for the site's unedited output: the site or one that ends in it.
        known: path to the fingerprints its module's `forward` may have, for all between `outer` and the site; `a:b` is
            the method `b` of the module at `a`.
        fuses: what the edit is fused with, for the report; `{next}` is the norm that comes next.
        alone: the same where the next norm is not to be had; empty where `fuses` does not need it.
        norm: path of the block's own norm that the edit is fused with; empty where there is none.
        bare: as `fuses`, where that norm is not to be had; None for nothing.
        dropout: path of an `nn.Dropout` inside `outer`, behind the site, that the fused forward takes over.
        inside: whether the forward itself has to apply the edit, as no module's output is the site.
    """

    place: str
    site: str
    outer: str
    fuses: str
    alone: str = ""
    norm: str = ""
    bare: str | None = None
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropout: str = ""
    inside: bool = False


@dataclass(frozen=True)
class Layout:
    """A block whose edits can be fused, and the forward that does it.

    Attributes:
        key: the layout's name, by which pickled models find it again.
        block: path from the layer to the module whose `forward` is replaced; `""` is the layer. Other paths are
            relative to that block.
        forward: `forward(block, edits, *args, **kwargs)` with `Edits`.
        known: the fingerprints that the block's `forward` may have.
        points: the edits that it applies itself.
        dropouts: paths of `nn.Dropout` modules that the fused forward stands in for.
        then: path (from the layer) of the modules that the output passes until the next norm in the same layer, which
            comes last; empty where that is the next layer's.
        hands_on: whether the forward leaves the next norm's output as a note on its own output.
        clamps_half: whether the layer clamps that output in float16, so that nobody sees the fused operation's.
        when: a dotted attribute of the block, or `a or b`, and the value it must have, where one forward has two
            layouts.
    """

    key: str
    forward: Callable[..., Any]
    known: tuple[str, ...]
    points: tuple[Point, ...]
    block: str = ""
    dropouts: tuple[str, ...] = ()
    then: tuple[str, ...] = ()
    hands_on: bool = False
    clamps_half: bool = False
    when: tuple[str, object] | None = None


@dataclass(frozen=True)
class Family:
    """Layers of one make.

    Attributes:
        name: for messages.
        layers: class names of the layer (a subclass is found by its base's name); one that others have too with the
            end of its module's name before it, `modeling_x.Block`.
        sites: place (`"ffn"`, `"attn"`, `"qkv"`, `"res"`, `"attn_res"`) to the paths of the edited modules in the
            layer. `-1` is the last child of a list; `""` is the layer; `a|b` is the first of the two that is there;
            `a with b` is `a` if that has a child `b`; a path that ends in `?` may be missing.
        layouts: those layouts of the layer's blocks that can be fused.
        inside: places whose edits no hook can apply, only a layout's forward.
        first_norm: path of the modules that a layer's input passes until its first norm, which comes last and may be
            `a|b`; empty in post-norm layers.
        known: each of those paths, but the norm's, to the fingerprints its module's `forward` may have.
        final_norm: name of the norm behind the last layer, beside the list of layers.
        norms: path of a site to that of the norm in it by which its output ends: an edit there can be merged into it.
        bias_flags: path of a site to the attribute of the model's config that gives that linear layer a bias.
        remarks: path of a site to what the report says of it.
    """

    name: str
    layers: tuple[str, ...]
    sites: dict[str, tuple[str, ...]]
    layouts: tuple[Layout, ...] = ()
    inside: tuple[str, ...] = ()
    first_norm: tuple[str, ...] = ()
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    final_norm: str | None = None
    norms: dict[str, str] = field(default_factory=dict)
    bias_flags: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)


# What pre-norm layers have alike: the FFN's edit goes into the next norm, and so does one of the whole layer's output.
TO_NEXT: dict[str, Any] = {"fuses": "dropout + residual add + {next}", "alone": "dropout + residual add"}
RES = Point("res", "", "", fuses="{next} behind the residual add")


def attention_points(
    site: str,
    outer: str,
    known: tuple[str, ...],
    norm: str,
    *,
    adds: str = "dropout + residual add",
    title: str = "LayerNorm",
    dropout: str = "",
) -> tuple[Point, Point]:
    """The edits at an attention in front of the layer's own `norm`: of its output, and of the stream behind it.

    `adds` and `title` are what the edit is fused with, for the report; the others are as for `Point`.
    """
    attention = Point(
        "attn",
        site,
        outer,
        known={outer: known},
        fuses=f"{adds} + {title}",
        norm=norm,
        bare=adds,
        dropout=dropout,
    )
    stream = Point("attn_res", outer, "", fuses=f"{title} behind the residual add", norm=norm, inside=True)
    return attention, stream
