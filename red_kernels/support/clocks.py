"""The time of calls: replays of CUDA graphs, or the wall clock."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], object]
Clock = Callable[[Sequence[Call]], Callable[[], float]]
"""Takes calls, which are made one after the other, and returns a function that measures one call's seconds."""

REPLAY_SECONDS = 5e-4  # of one measurement at least: far beyond the resolution of the events
MOST_REPLAYS = 100


@dataclass(frozen=True)
class Quartiles:
    """Seconds of a call over some rounds."""

    low: float
    median: float
    high: float

    def beats(self, other: Quartiles) -> bool:
        """Whether this is faster by more than the noise: its upper quartile is below the other's lower quartile."""
        return self.high < other.low

    def microseconds(self) -> dict[str, float]:
        """The quartiles for a table, with three decimals."""
        return {name: round(value * 1e6, 3) for name, value in asdict(self).items()}


def quartiles(passes: Sequence[Sequence[float]]) -> Quartiles:
    """The quartiles of two or more numbers, over all passes."""
    seconds = [value for one in passes for value in one]
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Quartiles(low, median, high)


def wall_clock(calls: Sequence[Call]) -> Callable[[], float]:
    """A :data:`Clock` of the host, for calls that return when they are done."""

    def measure() -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)

    return measure


def graph_clock(calls: Sequence[Call]) -> Callable[[], float]:
    """A :data:`Clock` of the current GPU: a CUDA graph of the calls is replayed between two events, without host time.

    The calls must have run before, on this device, and must not wait for it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def seconds(replays: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / replays

    seconds(1)
    replays = max(1, min(MOST_REPLAYS, round(REPLAY_SECONDS / max(seconds(3), 1e-9))))
    return lambda: seconds(replays) / len(calls)


def interleaved(measures: Mapping[Any, Callable[[], float]], rounds: int) -> dict[Any, list[float]]:
    """Measure each once in a round, in a new order: its seconds in each round. A first round is not counted."""
    seconds: dict[Any, list[float]] = {name: [] for name in measures}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(measures), len(measures)):
            value = measures[name]()
            if number:
                seconds[name].append(value)
    return seconds
