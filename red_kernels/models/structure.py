"""The layers of any model and their sites, found by the structure of its modules, without running it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..edits.module import RedEdit
from . import names
from .anatomy import FoundSite, Shape, anatomy_of, holds_experts

__all__ = ["Block", "FoundSite", "blocks_in"]


@dataclass(frozen=True)
class Block:
    """A repeated layer.

    Attributes:
        name: dotted, in the model.
        module: the layer.
        stack: name of the module that owns the list.
        list_key: path of the list in the stack.
        index: number of the layer in the list.
        kind: the input of its stack, `"text"`, `"vision"`, `"audio"` or `"other"`, or its side of an encoder-decoder
            model, `"encoder"` or `"decoder"`.
        sites: in the order of the layer's modules, the residual stream behind the FFN last.
    """

    name: str
    module: nn.Module
    stack: str
    list_key: str
    index: int
    kind: str
    sites: tuple[FoundSite, ...]


def blocks_in(model: nn.Module) -> list[Block]:
    """The repeated layers of a model with an FFN or an attention, in the model's order, each once."""
    finder = _Finder(model)
    finder.search(model, finder.shape(model), "", _Owner("", "", getattr(model, "config", None)))
    return finder.blocks


@dataclass(frozen=True)
class _Owner:
    """The module that owns a list, the path of the list in it, and the next config above it."""

    name: str
    key: str
    config: Any


class _Finder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks: list[Block] = []
        self._shapes: dict[tuple[Any, ...], Shape] = {}
        self._shape_of: dict[int, Shape] = {}
        self._seen: set[int] = set()
        self._edited: dict[tuple[str, int], str] = {}

    def shape(self, module: nn.Module) -> Shape:
        known = self._shape_of.get(id(module))
        if known is not None:
            return known
        kind = type(module)
        facts = _facts(module, kind)
        parts: tuple[tuple[str, Shape], ...] = ()
        if not facts[0] and not facts[4]:
            parts = tuple(
                (name, self.shape(child))
                for name, child in module._modules.items()
                if child is not None and not isinstance(child, RedEdit)
            )
        if len(parts) == 1 and parts[0][1].out and not parts[0][1].torch_attention and names.is_wrapped(parts[0][0]):
            facts, parts = (parts[0][1].out, parts[0][1].into, *facts[2:]), ()  # a linear layer, like the one inside it
        key = (kind, facts, parts)
        found = self._shapes.get(key)
        if found is None:
            found = self._shapes[key] = Shape(kind, facts, parts)
        self._shape_of[id(module)] = found
        return found

    def search(self, module: nn.Module, shape: Shape, name: str, owner: _Owner) -> None:
        """Find the layers below a module."""
        if not shape.parts or id(module) in self._seen:
            return
        self._seen.add(id(module))
        if not shape.is_container:
            owner = _Owner(name, "", getattr(module, "config", None) or owner.config)
        numbered = shape.is_container and names.label_of(name.rpartition(".")[2], "") != names.SKIP
        for at, (key, part) in enumerate(shape.parts):
            child = module._modules[key]
            assert child is not None
            path = f"{name}.{key}" if name else key
            number = re.search(r"\d+$", key)
            if numbered and number is not None and _is_block(part):
                if id(child) not in self._seen:
                    self._seen.add(id(child))
                    index = int(number.group()) if key.isdigit() else at
                    self.blocks.append(self._block(path, child, part, owner, index))
            else:
                inner = _Owner(owner.name, f"{owner.key}.{key}" if owner.key else key, owner.config)
                self.search(child, part, path, inner)

    def _block(self, name: str, module: nn.Module, shape: Shape, owner: _Owner, index: int) -> Block:
        parallel = _runs_in_parallel(module)
        sites = []
        anatomy = anatomy_of(shape)
        width = getattr(owner.config, "hidden_size", None) if anatomy.by_norms else None
        for site in anatomy.sites:
            if parallel and site.place == "attn_res":
                continue
            target: Any = module
            for part in site.path.split(".") if site.path else ():
                target = target._modules[part]
            place = (site.place, id(target))
            if self._edited.setdefault(place, name) == name:  # some layers share an attention
                sites.append(replace(site, width=width) if type(width) is int and width > 0 else site)
        kind = _kind_of(owner, self.model)
        return Block(name, module, owner.name, owner.key, index, kind, tuple(sites))


def _facts(module: nn.Module, kind: type) -> tuple[Any, ...]:
    """The first facts of a `Shape`."""
    own = module.__dict__
    if type(own.get("embed_dim")) is int and _reads_weights(kind):
        return own["embed_dim"], 0, None, False, True, True
    out = own.get("out_features", own.get("nf") if "weight" in module._parameters else None)
    if out is None and hasattr(kind, "out_features"):
        out = getattr(module, "out_features", None)
    if type(out) is int and out > 0:
        into = own.get("in_features", own.get("nx"))
        if into is None and hasattr(kind, "in_features"):
            into = getattr(module, "in_features", None)
        of_tuple = "quant_mode" in own or kind.__name__ in names.RETURN_TUPLES
        return out, into if type(into) is int else 0, None, False, False, of_tuple
    if names.is_norm(kind.__name__) and (not module._modules or module._parameters):
        return 0, 0, _norm_width(module), False, False, False
    stacked = "kernel_size" not in own and any(
        parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1
        for parameter in module._parameters.values()
    )
    return 0, 0, None, stacked, False, False


@functools.lru_cache(maxsize=1024)
def _reads_weights(kind: type) -> bool:
    """Whether an attention passes the weights of its projections to torch's function, so they are not called."""
    if issubclass(kind, nn.MultiheadAttention):
        return True
    functions = [value for base in kind.__mro__ if base is not nn.Module for value in vars(base).values()]
    codes = [getattr(inspect.unwrap(value), "__code__", None) for value in functions if inspect.isfunction(value)]
    return any(code is not None and "multi_head_attention_forward" in code.co_names for code in codes)


def _norm_width(module: nn.Module) -> int:
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dim() == 1:
            return int(parameter.shape[0])
    shape = getattr(module, "normalized_shape", None) or (0,)
    return int(shape[-1]) if isinstance(shape, (tuple, list)) else 0


def _runs_in_parallel(module: nn.Module) -> bool:
    """Whether a layer's own switch makes its attention and its FFN read the same stream."""
    config = module.__dict__.get("config")
    for switch in ("use_parallel_residual", "parallel_residual", "parallel_attn", "new_decoder_architecture"):
        if module.__dict__.get(switch) is True or getattr(config, switch, None) is True:
            return True
    return False


def _kind_of(owner: _Owner, model: nn.Module) -> str:
    path = f"{owner.name}.{owner.key}"
    by_name = names.kind_by_path(path)
    if by_name:
        return by_name
    config = owner.config
    sides = [part for part in re.split(r"[._]", path.lower()) if part in ("encoder", "decoder")]
    whole = getattr(model, "config", None)
    if sides and (getattr(config, "is_encoder_decoder", False) or getattr(whole, "is_encoder_decoder", False)):
        return sides[-1]
    by_name = names.kind_by_path(str(getattr(config, "model_type", "")))
    if by_name:
        return by_name
    if config is not None:
        has = {key for key in ("vocab_size", "patch_size", "image_size", "num_mel_bins") if hasattr(config, key)}
        if has & {"patch_size", "image_size"} and not has & {"vocab_size"}:
            return "vision"
        if "num_mel_bins" in has or hasattr(config, "feat_extract_norm"):
            return "audio"
        if "vocab_size" in has:
            return "text"
    if type(model).__module__.partition(".")[0] in ("timm", "torchvision"):
        return "vision"
    return sides[-1] if sides else names.kind_by_path(type(model).__name__) or "other"


# The repeated level.


def _is_block(shape: Shape) -> bool:
    """Whether an entry of a list is a layer, not a stage of layers."""
    if shape.out or shape.torch_attention or not shape.parts:
        return False
    kinds = anatomy_of(shape).kinds
    return bool(kinds) and not any(_repeats(entries, kinds) for entries in _lists_within(shape))


def _repeats(entries: list[Shape], kinds: frozenset[str]) -> bool:
    """Whether a list contains layers of these kinds, or several of each."""
    found = [anatomy_of(entry).kinds for entry in entries]
    return any(kinds <= one for one in found) or all(sum(kind in one for one in found) > 1 for kind in kinds)


def _lists_within(shape: Shape) -> Iterator[list[Shape]]:
    """The entries of each list within a module, without experts."""
    inner = [
        (key, part)
        for key, part in shape.parts
        if part.parts and not names.is_experts(key, part.kind) and not holds_experts(part)
    ]
    if shape.is_container:
        yield [part for key, part in inner if key[-1:].isdigit()]
    for _, part in inner:
        yield from _lists_within(part)
