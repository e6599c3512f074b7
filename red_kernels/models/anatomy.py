"""The parts of a layer: its attentions and FFNs, and the sites in them, by the shapes of its modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import names

__all__ = ["Anatomy", "FoundSite", "Shape", "anatomy_of", "holds_experts"]

_NORM_BEHIND = "sa_layer_norm"  # the norm behind an attention that gives the stream, under its only clear name


@dataclass(frozen=True)
class FoundSite:
    """A module of a layer whose output may be edited.

    Attributes:
        place: `"ffn"`, `"attn"`, `"qkv"`, `"res"` or `"attn_res"`.
        path: dotted, relative to the layer; `""` is the layer.
        width: of the output.
        of_tuple: whether the module may return a tuple, whose first entry is edited.
        inside: for `"attn_res"`, whether the layer adds the module's output to the stream: no module gives the sum.
    """

    place: str
    path: str
    width: int
    of_tuple: bool
    inside: bool = False


class Shape:
    """The relevant facts of a module. Equal modules share one, so that results for it are found once.

    Attributes:
        kind: name of the class.
        out: width of the output of a linear layer, and 0 of others.
        into: width of its input, 0 if unknown.
        norm: width of a norm, 0 if unknown, None if it is not a norm.
        torch_attention: whether it is an attention like torch's own, which reads its projections' weights without
            calling them.
        is_list: whether it contains layers, and has no output of its own.
        is_container: whether it may be a list of layers.
        of_tuple: whether a linear layer returns a tuple, its output first.
        stacked: whether one Parameter has the weights of several experts, or of several heads.
        parts: its children and their names.
    """

    __slots__ = (
        "anatomy",
        "into",
        "is_container",
        "is_list",
        "kind",
        "norm",
        "of_tuple",
        "out",
        "parts",
        "stacked",
        "torch_attention",
    )

    def __init__(self, kind: type[nn.Module], facts: tuple[Any, ...], parts: tuple[tuple[str, Shape], ...]) -> None:
        self.kind = kind.__name__
        self.out, self.into, self.norm, self.stacked, self.torch_attention, self.of_tuple = facts
        holds = issubclass(kind, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        self.is_container = holds and any(key[-1:].isdigit() for key, _ in parts)
        self.is_list = holds and kind.forward is nn.Module.forward
        self.parts = parts
        self.anatomy: Anatomy | None = None


def holds_experts(shape: Shape) -> bool:
    """Whether a module is a mixture: it owns the experts, or their weights."""
    inside = False
    for name, part in shape.parts:
        if _are_experts(name, part):
            return True
        inside = inside or (bool(part.parts) and holds_experts(part))
    return inside and any(names.is_router(name) for name, _ in shape.parts)


def _are_experts(name: str, shape: Shape) -> bool:
    return not shape.out and (
        (shape.stacked and names.label_of(name, shape.kind) not in (names.ATTENTION, names.MIXER, names.SKIP))
        or names.is_experts(name, shape.kind)
    )


@dataclass
class _Leaf:
    """A linear layer."""

    path: str
    order: int
    out: int
    into: int
    label: str = ""

    @property
    def name(self) -> str:
        """The last meaningful name on its path."""
        return names.name_of(self.path)


@dataclass
class _Attention:
    path: str
    order: int
    mixer: bool
    whole: int = 0  # the width, if no linear layer gives the output: torch's own reads its weights
    of_experts: bool = False
    leaves: list[_Leaf] = field(default_factory=list)
    out: list[_Leaf] = field(default_factory=list)
    qkv: list[_Leaf] = field(default_factory=list)


class Anatomy:
    """The attentions and FFNs of a layer, and their sites."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.order: dict[str, int] = {"": -1}
        self.attentions: list[_Attention] = []
        self.ffns: list[tuple[str, int, bool]] = []  # path, width, whether a mixture
        self.direct: list[_Leaf] = []  # of an attention, directly in the layer
        self.width = _stream_width(shape)
        self.joint = False  # whether one projection ends attention and FFN
        self.by_norms = False  # whether only norms show the width
        rest = self._visit(shape, "", "", None)
        told = [width for _, width, mixture in self.ffns if not mixture]
        if told and self.width not in told:
            self.width = told[-1]
        self._settle_attentions(rest)
        self._settle_ffns(rest)
        self.kinds = frozenset(
            kind for kind, found in ((names.ATTENTION, self.attentions), (names.FFN, self.ffns)) if found
        )
        self.sites = self._sites() if self.kinds else ()

    def _visit(self, shape: Shape, path: str, label: str, attention: _Attention | None) -> list[_Leaf]:
        """Take the parts of a module to their attentions and FFNs; return the linear layers left over."""
        free: list[_Leaf] = []
        for name, part in shape.parts:
            at = f"{path}.{name}" if path else name
            self.order[at] = len(self.order)
            if part.out and attention is not None and not part.torch_attention:
                attention.leaves.append(_Leaf(at, self.order[at], part.out, part.into, label))
                continue
            own = names.label_of(name, part.kind)
            if own == names.SKIP and (attention is None or name != "heads"):
                continue
            if part.torch_attention:
                self.attentions.append(_Attention(at, self.order[at], False, whole=part.out))
            elif part.out:
                leaf = _Leaf(at, self.order[at], part.out, part.into, label)
                if not label:
                    leaf.label = names.leaf_label(leaf.name)
                (self.direct if leaf.label == names.ATTENTION else free).append(leaf)
            elif part.parts or part.stacked:
                free += self._visit_part(name, part, at, label if own in ("", names.SKIP) else own, attention)
        taken = self._chains(free)
        return [leaf for leaf in free if leaf.path not in taken]

    def _visit_part(self, name: str, part: Shape, at: str, label: str, attention: _Attention | None) -> list[_Leaf]:
        mixture = holds_experts(part) or _are_experts(name, part) or (names.is_mixture(part.kind) and bool(part.parts))
        if attention is not None and label == names.FFN and not mixture and _count(part) < 2:  # a wrapped projection
            label = names.ATTENTION
        if label in (names.ATTENTION, names.MIXER):
            if attention is None and not part.is_list:
                attention = _Attention(at, self.order[at], label == names.MIXER)
                self.attentions.append(attention)
            return self._visit(part, at, label, attention)
        if mixture:
            if attention is not None:
                attention.of_experts = True
            elif not part.is_list:
                self.ffns.append((at, 0, True))  # as wide as the stream
            return []
        return self._visit(part, at, label, None)

    def _chains(self, leaves: list[_Leaf]) -> set[str]:
        """Take the complete FFNs among some linear layers; return the paths of their modules."""
        named = any(leaf.label == names.FFN for leaf in leaves)
        pairs = [
            (up, down)
            for down in leaves
            for up in leaves
            if up is not down
            and up.into == down.out
            and down.into != down.out
            and up.out in (down.into, 2 * down.into)
            and (down.into > down.out or (named and up.order < down.order))
        ]
        pairs = [pair for pair in pairs if pair[1].out == self.width] or [
            pair for pair in pairs if pair[1].into > pair[1].out
        ]
        if not pairs and named:
            pairs = self._even_chain(leaves)
        downs = {down.path: down for _, down in pairs}
        self.ffns += [(path, down.out, False) for path, down in downs.items()]
        inner = {down.into for down in downs.values()}
        even = any(down.into == down.out for down in downs.values())
        return set(downs) | {
            leaf.path
            for leaf in leaves
            if (leaf.out in inner or leaf.out // 2 in inner) and (leaf.label == names.FFN or not even)
        }

    def _even_chain(self, leaves: list[_Leaf]) -> list[tuple[_Leaf, _Leaf]]:
        """An FFN as wide as the stream: names identify its last projection, else the order does."""
        even = [leaf for leaf in leaves if leaf.into == leaf.out or leaf.into * 2 == leaf.out]
        if len(even) < 2:
            return []
        called = [leaf for leaf in even if names.is_down(leaf.path.rpartition(".")[2])]
        down = called[-1] if called else leaves[-1]
        if down.into != down.out or (self.width and down.out != self.width):
            return []
        ups = [leaf for leaf in even if leaf is not down and leaf.into == down.out]
        return [(ups[0], down)] if ups else []

    def _settle_attentions(self, rest: list[_Leaf]) -> None:
        """Distinguish each attention's output from its inputs."""
        if self.direct:
            own = _Attention("", -1, False, leaves=list(self.direct))
            if not any(names.is_output(leaf.name) for leaf in own.leaves):
                named = [leaf for leaf in rest if names.is_output(leaf.name)]
                own.leaves += (named or [leaf for leaf in rest if names.is_output_by_order(leaf.name)])[:1]
            self.attentions.append(own)
        found: list[_Attention] = []
        for one in self.attentions:
            found += _apart(one)
        for one in found:
            if not one.whole:
                _settle(one, self.width)
            if one.of_experts and not one.out:
                one.whole = self.width
        found = [one for one in found if one.whole or one.out or one.qkv]
        if any(not one.mixer for one in found):
            found = [one for one in found if not one.mixer]
        self.attentions = found

    def _settle_ffns(self, rest: list[_Leaf]) -> None:
        """Keep the sites that add to the stream."""
        widths = Counter(leaf.out for one in self.attentions for leaf in one.out)
        widths.update(one.whole for one in self.attentions if one.whole)
        mixtures = bool(self.ffns) and all(mixture for _, _, mixture in self.ffns)
        if not self.width or not self.ffns or (mixtures and self.width not in widths):  # some norms are of other widths
            widths.update(width for _, width, _ in self.ffns if width)
            self.width = widths.most_common(1)[0][0] if widths else self.width
        self.by_norms = mixtures and not widths
        if not self.ffns and self.attentions:
            self.ffns = [(path, self.width, False) for path in self._wider(rest)]
        self.ffns = [(path, width or self.width, mixture) for path, width, mixture in self.ffns]
        if any(width == self.width for _, width, _ in self.ffns):
            self.ffns = [one for one in self.ffns if one[1] == self.width]

    def _wider(self, rest: list[_Leaf]) -> list[str]:
        """The last projections of FFNs with an input besides the stream, or that also project attention's values."""
        beside = {
            down.path: down
            for up in rest
            for down in rest
            if up.order < down.order
            and up.label == down.label == names.FFN
            and up.into > down.out == self.width
            and up.out in (down.into, 2 * down.into)
        }
        if beside or any(one.out or one.whole for one in self.attentions):
            return list(beside)
        self.joint = True
        return [down.path for down in rest if down.into > down.out and any(up.into == down.out < up.out for up in rest)]

    def _sites(self) -> tuple[FoundSite, ...]:
        sites = [
            FoundSite("ffn", path, width, mixture or self._gives_tuple(path)) for path, width, mixture in self.ffns
        ]
        for one in self.attentions:
            if one.whole:
                sites.append(FoundSite("attn", one.path, one.whole, True))
            sites += [FoundSite("attn", leaf.path, leaf.out, self._gives_tuple(leaf.path)) for leaf in one.out]
            sites += [FoundSite("qkv", leaf.path, leaf.out, self._gives_tuple(leaf.path)) for leaf in one.qkv]
        sites += self._streams()
        return tuple(sorted(sites, key=lambda site: (site.place == "res", self.order[site.path])))

    def _streams(self) -> Iterator[FoundSite]:
        """The modules that give the stream behind an attention or the FFN; none if unknown."""
        keys = {key for key, _ in self.shape.parts}
        if self.shape.is_list or "bottleneck" in keys or _has_copies(self.shape) or self._has_two_streams():
            return
        if any(part.kind == "Conv2d" for _, part in self.shape.parts):  # its output has the channels first
            return
        for one in self.attentions:
            ends = one.path if one.whole else (one.out[0].path if one.out else "")
            normed = self._ends_in_norm(ends) if ends else ""
            given = normed or (ends and self._sublayer(ends, bool(one.whole)))
            path, inside = (given, False) if given else self._behind(one)
            if path:
                yield FoundSite(
                    "attn_res", path, self.width, self._gives_tuple(ends) or path not in (normed, _NORM_BEHIND), inside
                )
        if self.ffns:
            last, _, mixture = max(self.ffns, key=lambda one: self.order[one[0]])
            normed = self._ends_in_norm(last) if len(self.ffns) == 1 else ""
            path = normed or self._sublayer(last, mixture)
            yield FoundSite("res", path, self.width, not normed or self._gives_tuple(last))

    def _gives_tuple(self, path: str) -> bool:
        return bool(_at(self.shape, path).of_tuple)

    def _has_two_streams(self) -> bool:
        """Whether a layer carries a stream of context next to its own: its output has both."""
        paths = [path for path, _, _ in self.ffns] + [leaf.path for one in self.attentions for leaf in one.out]
        aside = [path for path in paths if re.search(r"context|txt|add_out|visn|layout", path)]
        added = any("add_k_proj" in leaf.path for one in self.attentions for leaf in one.qkv)
        return added or self.joint or 0 < len(aside) < len(paths)

    def _ends_in_norm(self, site: str) -> str:
        """The module that ends in the stream's norm, if it has only a projection before that."""
        path, _, name = site.rpartition(".")
        if not path:
            return ""
        parts = _at(self.shape, path).parts
        keys = [key for key, _ in parts]
        behind = [part for _, part in parts[keys.index(name) + 1 :]]
        alone = sum(bool(part.out) for _, part in parts) == 1
        normed = any(part.norm == self.width and not part.kind.startswith("BatchNorm") for part in behind)
        return path if alone and normed else ""

    def _sublayer(self, site: str, whole: bool) -> str:
        """The entry of a list of sublayers with a site: it has the norm in front, and adds to the stream."""
        parts = site.split(".")
        if len(parts) < 4 - whole or not parts[1].isdigit() or not _at(self.shape, parts[0]).is_list:
            return ""
        start = f"{parts[0]}."
        if not all(one.path.startswith(start) for one in self.attentions) or not all(
            path.startswith(start) for path, _, _ in self.ffns
        ):
            return ""
        entry = _at(self.shape, ".".join(parts[:2]))
        return ".".join(parts[:2]) if any(part.norm is not None for _, part in entry.parts) else ""

    def _behind(self, attention: _Attention) -> tuple[str, bool]:
        """The path of the stream behind an attention, and whether only the layer itself has that stream."""
        path = attention.path
        if not path or not self.ffns or path in names.READ_BEFORE:
            return "", False
        if any(ffn.startswith(f"{path}.") for ffn, _, _ in self.ffns):
            return "", False
        own = [key for key, part in self.shape.parts if part.norm is not None or names.stands_for_norm(key, part.kind)]
        if len(own) > len(self.attentions):
            return (_NORM_BEHIND, False) if _NORM_BEHIND in own else (path, True)
        if self._adds_itself(attention):
            return path, False
        if any(norm == self.width for norm in _norms_within(_at(self.shape, path))):
            return "", False
        in_ffn = any(
            norm == self.width
            for key, part in self.shape.parts
            if any(ffn.startswith(f"{key}.") for ffn, _, mixture in self.ffns if not mixture)
            for norm in _norms_within(part)
        )
        return (path, True) if in_ffn and len(own) == len(self.attentions) else ("", False)

    def _adds_itself(self, attention: _Attention) -> bool:
        """Whether an attention ends in the stream's norm: it adds to the stream before that."""
        if not attention.path or not attention.out:
            return False
        last = [key for key, part in _at(self.shape, attention.path).parts if part.norm == self.width]
        return any(self.order[f"{attention.path}.{key}"] > attention.out[0].order for key in last)


def anatomy_of(shape: Shape) -> Anatomy:
    if shape.anatomy is None:
        shape.anatomy = Anatomy(shape)
    return shape.anatomy


def _at(shape: Shape, path: str) -> Shape:
    for part in path.split("."):
        shape = dict(shape.parts)[part]
    return shape


def _has_copies(shape: Shape) -> bool:
    """Whether a layer has several streams, mixed by hyper-connections: as wide as all of them together."""
    return any("hyper_connection" in key for key, _ in shape.parts)


def _stream_width(shape: Shape) -> int:
    """The width of the residual stream, by the layer's own norms, else by inner ones; 0 for unknown."""
    if _has_copies(shape):
        return 0
    found = (
        Counter(part.norm for _, part in shape.parts if part.norm)
        or Counter(_norms_within(shape, aside=True))
        or Counter(_norms_within(shape))
    )
    return int(found.most_common(1)[0][0]) if found else 0


def _norms_within(shape: Shape, aside: bool = False) -> Iterator[int]:
    """The widths of the norms in a module, except those of queries and keys; `aside` leaves out those in FFNs."""
    for name, part in shape.parts:
        if part.norm and not names.is_norm_of_heads(name):
            yield part.norm
        elif part.parts and not re.search(r"bottleneck|lora|router|experts", name):
            if aside and names.label_of(name, part.kind) == names.FFN:
                continue
            yield from _norms_within(part, aside)


def _count(shape: Shape) -> int:
    """The number of linear layers in a module."""
    return sum(1 if part.out else _count(part) for _, part in shape.parts)


def _apart(attention: _Attention) -> list[_Attention]:
    """An attention, or those of a module with several."""
    groups: dict[str, list[_Leaf]] = {}
    depth = attention.path.count(".") + 1 if attention.path else 0
    for leaf in attention.leaves:
        groups.setdefault(leaf.path.split(".")[depth], []).append(leaf)
    whole = [
        key
        for key, leaves in groups.items()
        if len(leaves) > 1
        and any(names.is_qkv(leaf.name) for leaf in leaves)
        and any(names.is_output(leaf.name) or names.is_output_by_order(leaf.name) for leaf in leaves)
    ]
    if len(whole) < 2:
        return [attention]
    found = []
    for key in whole:
        path = f"{attention.path}.{key}" if attention.path else key
        found += _apart(_Attention(path, groups[key][0].order, attention.mixer, leaves=groups[key]))
    return found


def _settle(attention: _Attention, width: int) -> None:
    """Distinguish the output projections of an attention from its queries, keys and values."""
    leaves = attention.leaves
    attention.qkv = [leaf for leaf in leaves if names.is_qkv(leaf.name, attention.mixer)]
    rest = [leaf for leaf in leaves if leaf not in attention.qkv and not names.is_other(leaf.name)]
    called = [leaf for leaf in rest if names.is_output(leaf.name)]
    plain = [leaf for leaf in rest if any(map(names.is_output_by_order, (leaf.name, leaf.path.rpartition(".")[2])))]
    wide = [leaf for leaf in rest if leaf.out == width or not width]
    out = called or plain[-1:] or wide[-1:]
    attention.out = out if attention.qkv or len(leaves) > 1 else []
