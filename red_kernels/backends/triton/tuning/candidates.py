"""The tiles tried instead of a rule's own: its neighbours, a few doublings away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from ..rules import Architecture, power_of_two
from ..tuned import RULES, Rule, tile_error

REACH = 2  # doublings and halvings in all
REACH_OF_PRODUCTS = 1  # they have many fields and compile slowly
MOST_HELD = 64  # elements of a tile for each thread; beyond, a kernel takes minutes to compile and spills


def candidates(rule: Rule, key: Mapping[str, int], architecture: Architecture, reach: int = REACH) -> list[Any]:
    """The tiles that differ from the factory's by at most ``reach`` doublings or halvings of their fields, nearest
    first; stages and splits change by one.

    Excluded are tiles that the rule's check refuses, and tiles with pieces twice as wide as the rows, with fewer
    elements than threads, or with more than ``MOST_HELD`` for each thread. If the rule may return None, None is tried
    too. If the factory does, the neighbours are those of a row in as many threads as a program can have. The factory's
    own result is not among them.
    """
    default = rule.factory(**key, architecture=architecture)
    start = default
    if default is None:
        start = RULES["wide_norm"].factory(key["width"], key["itemsize"], architecture)
        if rule.check(start, key, architecture.warp) is not None:
            start = replace(start, programs=1)
    if not hasattr(start, "chunk"):
        reach = min(reach, REACH_OF_PRODUCTS)
    found = {tile: None for tile in _around(start, key, reach) if _sensible(rule, tile, key, architecture.warp)}
    if rule.optional:
        found[None] = None
    found.pop(default, None)
    return list(found)


def _around(start: Any, key: Mapping[str, int], reach: int) -> Iterator[Any]:
    """In order of distance. The number of pieces follows from their size."""
    names = [field.name for field in fields(start) if field.name != "chunks"]
    if getattr(start, "programs", None) == 0:
        names.remove("programs")  # not a number, but a kind of grid
    moves = itertools.product(range(-reach, reach + 1), repeat=len(names))
    for move in sorted(moves, key=lambda steps: (sum(map(abs, steps)), steps)):
        if sum(map(abs, move)) > reach:
            return
        values = {name: _moved(name, getattr(start, name), steps) for name, steps in zip(names, move, strict=True)}
        if hasattr(start, "chunks"):
            values["chunks"] = -(-key["width"] // max(1, values["chunk"]))
        yield replace(start, **values)


def _moved(name: str, value: int, steps: int) -> int:
    if name in ("stages", "splits"):
        return value + steps
    return value << steps if steps >= 0 else value >> -steps


def _sensible(rule: Rule, tile: Any, key: Mapping[str, int], warp: int) -> bool:
    if tile_error(rule, tile, key, warp) is not None:
        return False
    if not hasattr(tile, "chunk"):
        return True  # a tile of another kind: its check decides
    if tile.chunk > power_of_two(key["width"]):
        return False
    elements, threads = tile.rows * tile.chunk, tile.warps * warp
    return elements >= threads and elements * getattr(tile, "chunks", 1) <= MOST_HELD * threads
