"""Stacks with edits that read the input of their first layer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from ..edits.config import RedConfig
from ..models import Block, blocks_in

__all__ = ["CONDITIONAL", "PlannedStream", "plan_streams"]

# Parts that a layer does not always call: attention to an optional encoder, or to global tokens.
CONDITIONAL = re.compile(r"cross|enc_?(oder)?_?(dec)?_?att|_global\b|[ew]2[ew]", re.IGNORECASE)


@dataclass(frozen=True)
class PlannedStream:
    """A stack with these edits: the module that calls its layers, the layers, and the names of its sites."""

    name: str
    owner: nn.Module
    layers: tuple[nn.Module, ...]
    sites: frozenset[str]


def plan_streams(model: nn.Module, sites: list[tuple[str, str, int]], config: RedConfig) -> list[PlannedStream]:
    """The stacks of the sites, each given by its name, place and width.

    Raises:
        ValueError: a site is in no stack of layers, has another width than its stack's stream, or reads another
            sequence.
    """
    blocks = blocks_in(model)
    modules = dict(model.named_modules())
    inner = sorted(blocks, key=lambda block: -len(block.name))
    found: dict[tuple[str, str], set[str]] = {}
    for name, place, width in sites:
        block = next((one for one in inner if name == one.name or name.startswith(f"{one.name}.")), None)
        why = f"but an edit of kind {config.kind!r} reads the input of its stack's first layer"
        if block is None:
            raise ValueError(f"model: {name} is in no stack of layers, {why}")
        stream = _width(block)
        if stream != width:
            raise ValueError(f"model: {name} is {width} wide, {why}, which is {stream or 'perhaps not as'} wide")
        if place in ("qkv", "key", "value") and CONDITIONAL.search(name.removeprefix(block.name)):
            raise ValueError(f"model: {name} may be of another sequence, {why}; choose another position")
        found.setdefault((block.stack, block.list_key), set()).add(name)
    return [
        PlannedStream(
            f"{stack}.{key}".strip(".") or type(model).__name__,
            _caller(stack, modules),
            tuple(block.module for block in blocks if (block.stack, block.list_key) == (stack, key)),
            frozenset(names),
        )
        for (stack, key), names in found.items()
    ]


def _width(block: Block) -> int:
    """The width of the residual stream of a layer; 0 if unknown."""
    widths = {site.place: site.width for site in block.sites}
    return next((widths[place] for place in ("res", "ffn", "attn") if widths.get(place)), 0)


def _caller(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The module whose forward calls a stack's layers: its owner, or the module around a pure container."""
    while name and type(modules[name]).forward is nn.Module.forward:
        name = name.rpartition(".")[0]
    return modules[name]
