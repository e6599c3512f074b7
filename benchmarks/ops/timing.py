"""Timing the passes of an operation, for several implementations in turn."""

from __future__ import annotations

import functools
import gc
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from red_kernels.support.clocks import Clock, graph_clock, interleaved

from ..failure import in_words
from ..harness import Timing, timing
from .implementations.base import Function
from .inputs import Copies, Inputs
from .operations import Operation

PASSES = ("forward", "backward", "both")
FLOOR = "copy"
HOST_CALLS = 50  # in a row, for one measurement of the host
WARM_UPS = 2
Times = dict[str, dict[str, Timing]]  # pass to implementation to seconds


@dataclass(frozen=True)
class Candidate:
    """One implementation's function for the timed operation."""

    function: Function
    active: Callable[[], AbstractContextManager[Any]]

    def forward(self, inputs: Inputs, number: int) -> tuple[Tensor, ...]:
        """The results of a round, with their graph."""
        return self.function(inputs[number][0])


def gradients(
    operation: Operation, results: tuple[Tensor, ...], inputs: Inputs, number: int, keep: bool = False
) -> tuple[Tensor, ...]:
    """The backward of a round; with `keep` it can be run again."""
    arguments, upstream = inputs[number]
    return torch.autograd.grad(results, operation.differentiated(arguments), upstream, retain_graph=keep)


def host_times(
    candidates: Mapping[str, Candidate], inputs: Inputs, *, seconds: float, least: int = 7, calls: int = HOST_CALLS
) -> Times:
    """The host time of a call, over rounds of `calls` calls without waiting."""
    return _wall(candidates, inputs, seconds, least, calls)


def wall_times(
    candidates: Mapping[str, Candidate], inputs: Inputs, copies: Copies, *, seconds: float, least: int = 7
) -> Times:
    """Wall time of single calls, on a CPU, and of the copies among them.

    The backward's time includes freeing the results of a pass and its saved tensors.
    """
    return _wall(candidates, inputs, seconds, least, 1, copies)


def _wall(
    candidates: Mapping[str, Candidate],
    inputs: Inputs,
    seconds: float,
    least: int,
    calls: int,
    copies: Copies | None = None,
) -> Times:
    operation = inputs.operation
    cuda = inputs[0][0].x.is_cuda
    found: dict[str, dict[str, list[float]]] = {name: {} for name in PASSES}

    def note(name: str, begin: float, middle: float, end: float) -> None:
        values = (middle - begin, end - middle, end - begin)
        for direction, value in zip(PASSES, values, strict=True):
            found[direction].setdefault(name, []).append(value / calls)

    def call_in_turn(candidate: Candidate, first: int) -> tuple[float, float, float]:
        with candidate.active():
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            results = [candidate.forward(inputs, first + call) for call in range(calls)]
            middle = time.perf_counter()
            for call in range(calls):
                gradients(operation, results[call], inputs, first + call)
            del results
            return begin, middle, time.perf_counter()

    def copy(floor: Copies, number: int) -> tuple[float, float, float]:
        begin = time.perf_counter()
        floor.copy(operation.forward, number)
        middle = time.perf_counter()
        floor.copy(operation.backward, number, backward=True)
        return begin, middle, time.perf_counter()

    names = [*candidates, *(() if copies is None else (FLOOR,))]
    order = random.Random(0)

    def one_round(number: int, counted: bool) -> None:
        # In a fixed order one would always inherit the same neighbour's cache, full of pending writes.
        for place, name in enumerate(order.sample(names, len(names))):
            turn = number * len(names) + place  # no implementation gets inputs that the one before left in the cache
            if name == FLOOR and copies is not None:
                times = copy(copies, turn)
            else:
                times = call_in_turn(candidates[name], turn * calls)
            if counted:
                note(name, *times)

    for number in range(WARM_UPS):
        one_round(number, False)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        number = 0
        while number < least or (number < 200 and time.perf_counter() - start < seconds):
            one_round(number, True)
            number += 1
    finally:
        gc.enable()
    return {direction: {name: timing(values) for name, values in of.items()} for direction, of in found.items()}


def device_times(
    candidates: Mapping[str, Candidate],
    inputs: Inputs,
    copies: Copies,
    *,
    rounds: int,
    clock: Clock = graph_clock,
    stream: Callable[[], AbstractContextManager[Any]] | None = None,
) -> tuple[Times, dict[str, str]]:
    """Time on the device: replays of graphs of one pass over each set of inputs, without the host.

    The backward is captured separately, over kept autograd graphs, so `both` is a third measurement.

    Returns:
        The times, and implementation to the reason of a failed capture.
    """
    operation, count = inputs.operation, len(inputs.sets)
    stream = stream or capture_stream
    measures: dict[tuple[str, str], Callable[[], float]] = {}
    left_out: dict[str, str] = {}
    kept: list[object] = []  # results whose backward is replayed
    for name, candidate in candidates.items():
        try:
            with stream(), candidate.active():
                of_one = _graphs(operation, candidate, inputs, count, clock, kept)
        except Exception as error:
            left_out[name] = f"cannot be captured in a CUDA graph: {in_words(error)}"
            continue
        measures.update({(direction, name): measure for direction, measure in of_one.items()})
    with stream():
        for direction, activations in operation.passes().items():
            calls = [
                functools.partial(copies.copy, activations, number, direction == "backward") for number in range(count)
            ]
            for call in calls:
                call()
            measures[direction, FLOOR] = clock(calls)
        seconds = interleaved(measures, rounds)
    found: Times = {direction: {} for direction in PASSES}
    for (direction, name), values in seconds.items():
        found[direction][name] = timing(values)
    return found, left_out


def _graphs(
    operation: Operation, candidate: Candidate, inputs: Inputs, count: int, clock: Clock, kept: list[object]
) -> dict[str, Callable[[], float]]:
    def forward(number: int) -> tuple[Tensor, ...]:
        return candidate.forward(inputs, number)

    def both(number: int) -> object:
        return gradients(operation, forward(number), inputs, number)

    for number in range(WARM_UPS * count):
        both(number)
    results = [forward(number) for number in range(count)]
    kept.append(results)

    def backward(number: int) -> object:
        return gradients(operation, results[number], inputs, number, keep=True)

    for number in range(count):
        backward(number)
    passes: dict[str, Callable[[int], object]] = {"forward": forward, "backward": backward, "both": both}
    return {name: clock([functools.partial(call, number) for number in range(count)]) for name, call in passes.items()}


def capture_stream() -> AbstractContextManager[Any]:
    """The stream of graph captures: the backward runs on the stream of its forward."""
    if torch.cuda.graph.default_capture_stream is None:
        torch.cuda.graph.default_capture_stream = torch.cuda.Stream()
    return torch.cuda.stream(torch.cuda.graph.default_capture_stream)
