"""The search for one rule's tile: candidates are checked and timed in turn with the factory's own, the best again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....support.clocks import Clock, Quartiles, interleaved, quartiles
from .. import launch
from ..rules import Architecture
from ..tuned import RULES, Key, Rule
from .candidates import REACH, candidates
from .workloads import Launches, Result, Workload, input_sets, record

FINALISTS = 3
_DEFAULT = "default"  # this name among the tiles of measurements


@dataclass(frozen=True)
class Bench:
    """The device and the clock, the bytes that inputs must exceed, rounds to choose and to confirm.

    The latter run ``passes`` times, each with new inputs, launches and graphs.
    """

    device: torch.device
    clock: Clock
    cache_bytes: int
    rounds: int = 10
    confirming_rounds: int = 10
    passes: int = 3
    reach: int = REACH
    how: str = "the caller's clock"

    @property
    def architecture(self) -> Architecture:
        """The device type."""
        return launch.architecture(torch.empty(0, device=self.device))

    def synchronize(self) -> None:
        """Wait for the device, if it is asynchronous."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Target:
    """A rule with its arguments, and all workloads that its tile is measured on."""

    rule: Rule
    arguments: tuple[Any, ...]
    workloads: tuple[Workload, ...]

    @property
    def key(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.rule.parameters, self.arguments, strict=True))

    def __str__(self) -> str:
        return ", ".join([self.rule.name, *(f"{name} {value}" for name, value in self.key.items())])


@dataclass(frozen=True)
class Case:
    """The times of a tile and of the factory's own on one workload."""

    workload: Workload
    tile: Quartiles
    default: Quartiles

    @property
    def ratio(self) -> float:
        """The default's time over the tile's, by medians."""
        return self.default.median / self.tile.median


@dataclass(frozen=True)
class Outcome:
    """The result of a search: the winning tile with its times, if ``won``; and why candidates were excluded."""

    target: Target
    default: Any
    tried: int
    won: bool = False
    tile: Any = None
    cases: tuple[Case, ...] = ()
    left_out: Mapping[Any, str] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The geometric mean of the cases."""
        return geometric_mean([case.ratio for case in self.cases])


def targets(workloads: Sequence[Workload], bench: Bench) -> list[Target]:
    """The rules that affect the workloads' launches, each with its workloads, in order of occurrence."""
    found: dict[Key, list[Workload]] = {}
    for workload in workloads:
        probe = workload.probe()
        call = partial(probe.call, probe.tensors(bench.device, 0))
        plain, asked = record(call, {})
        for name, *arguments in asked:
            rule = RULES[name]
            tiles = candidates(
                rule, dict(zip(rule.parameters, arguments, strict=True)), bench.architecture, bench.reach
            )
            if any(record(call, {name: tile})[0].shapes() != plain.shapes() for tile in tiles):
                found.setdefault((name, *arguments), []).append(workload)
    return [Target(RULES[key[0]], key[1:], tuple(having)) for key, having in found.items()]


def search(target: Target, bench: Bench) -> Outcome:
    """Find a tile that beats the factory's by more than the noise.

    All candidates are timed in turn on every workload. The best few are timed again in separate rounds, which decide:
    in at least one workload the tile's upper quartile must be below the default's lower quartile, and in none the
    reverse. Of several the one with the greatest mean ratio wins.
    """
    rule = target.rule
    default = rule.factory(**target.key, architecture=bench.architecture)
    tiles = candidates(rule, target.key, bench.architecture, bench.reach)
    tried, left_out = len(tiles), dict[Any, str]()
    first = [_times(target, workload, tiles, left_out, bench, bench.rounds, 1) for workload in target.workloads]
    tiles = [tile for tile in tiles if tile not in left_out]
    means = {tile: geometric_mean([times[_DEFAULT].median / times[tile].median for times in first]) for tile in tiles}
    best = [tile for tile in sorted(tiles, key=lambda tile: -means[tile]) if means[tile] > 1][:FINALISTS]
    plain = Outcome(target, default, tried, left_out=left_out)
    if not best:
        return plain
    again = [
        _times(target, workload, best, left_out, bench, bench.confirming_rounds, bench.passes)
        for workload in target.workloads
    ]
    outcomes = []
    for tile in best:
        if tile in left_out:
            continue
        cases = tuple(
            Case(workload, times[tile], times[_DEFAULT])
            for workload, times in zip(target.workloads, again, strict=True)
        )
        if any(c.tile.beats(c.default) for c in cases) and not any(c.default.beats(c.tile) for c in cases):
            outcomes.append(replace(plain, won=True, tile=tile, cases=cases))
    return max(outcomes, key=lambda outcome: outcome.ratio, default=plain)


def _times(
    target: Target,
    workload: Workload,
    tiles: Sequence[Any],
    left_out: dict[Any, str],
    bench: Bench,
    rounds: int,
    passes: int,
) -> dict[Any, Quartiles]:
    """The times of the default and of usable tiles; ``left_out`` gets the reasons of others."""
    runs = [_one_pass(target, workload, tiles, left_out, bench, rounds) for _ in range(passes)]
    return {tile: quartiles([run[tile] for run in runs]) for tile in runs[-1]}


def _one_pass(
    target: Target, workload: Workload, tiles: Sequence[Any], left_out: dict[Any, str], bench: Bench, rounds: int
) -> dict[Any, list[float]]:
    sets = input_sets(workload, bench.device, bench.cache_bytes)
    name = target.rule.name
    default = [_recorded(workload, tensors, {}) for tensors in sets]
    for launches in default:
        launches.run()
    bench.synchronize()
    expected = tuple(None if t is None else t.clone() for t in default[0].results)
    measures = {_DEFAULT: bench.clock([launches.runner(name) for launches in default])}
    for tile in tiles:
        if tile in left_out:
            continue
        found = [_recorded(workload, tensors, {name: tile}) for tensors in sets]
        reason = _unusable(found[0], default[0], expected, workload, bench)
        if reason is not None:
            left_out[tile] = f"{reason} ({workload})"
            continue
        for launches, of_default in zip(found, default, strict=True):
            launches.write_into(of_default.results)
            launches.run()
        bench.synchronize()
        measures[tile] = bench.clock([launches.runner(name) for launches in found])
    return interleaved(measures, rounds)


def _recorded(workload: Workload, tensors: Mapping[str, Tensor], tiles: Mapping[str, Any]) -> Launches:
    return record(partial(workload.call, tensors), tiles)[0]


def _unusable(found: Launches, default: Launches, expected: Result, workload: Workload, bench: Bench) -> str | None:
    """Run a candidate once; why it must not be timed, or None. Raises if the device fails after it."""
    poison(found.results)
    try:
        found.run()
        bench.synchronize()
    except Exception as error:  # any refusal of a tile by the compiler or the driver
        default.run()
        bench.synchronize()  # raises if the device has failed
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return found.spilling() or difference(found.results, expected, workload.terms)


def poison(results: Result) -> None:
    """Fill results with NaN, to detect elements that a kernel does not write."""
    for t in results:
        if t is not None:
            t.fill_(math.nan)


def difference(found: Result, expected: Result, terms: int, roundings: float = 0.0) -> str | None:
    """The first difference beyond one rounding and sums of ``terms`` fp32 terms in another order; or None.

    ``roundings`` is the relative size of further differences.
    """
    for place, (own, other) in enumerate(zip(found, expected, strict=True)):
        if own is None or other is None:
            continue
        distance = float((own.double() - other.double()).norm() / other.double().norm())
        bound = roundings + torch.finfo(other.dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps
        if not distance <= bound:  # also true for NaN
            return f"wrong: result {place} is off by {distance:.1e}, more than {bound:.1e}"
    return None


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))
