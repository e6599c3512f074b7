"""Training steps of several methods on one base model: the same batch, in turn, in one process."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..failure import in_words
from ..harness import Timing, timing
from ..memory import held_bytes, peak_allocated
from ..methods import Prepared
from .check import Naive, check

FLOOR = "frozen-fused"  # of `benchmarks.methods`
Makers = Mapping[str, Callable[[], Prepared]]


class Step:
    """One training step: forward, backward, AdamW (fused, as in transformers' Trainer), gradients dropped.

    The learning rate and the weight decay are 0: shared weights are unchanged, to the bit.
    """

    def __init__(self, prepared: Prepared, batch: Mapping[str, Tensor]) -> None:
        self._prepared, self._batch = prepared, batch
        self._optimizer: Any = None
        if prepared.trained:
            self._optimizer = torch.optim.AdamW(prepared.trained, lr=0.0, weight_decay=0.0, fused=True)

    def __call__(self) -> None:
        with self._prepared.active():
            self._prepared.model(**self._batch).loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)

    def added(self) -> list[Tensor]:
        """The method's memory between steps: all parameters, shared ones too, fixed tensors, optimizer state."""
        found: list[Tensor] = [*self._prepared.model.parameters(), *self._prepared.trained, *self._prepared.fixed]
        if self._optimizer is not None:
            for state in self._optimizer.state.values():
                found += [value for value in state.values() if isinstance(value, Tensor)]
        return found


def timed(
    steps: Mapping[str, Callable[[], object]], device: torch.device, seconds: float, rounds: int, most: int = 200
) -> dict[str, list[float]]:
    """The seconds of each step in each round; every round runs all once, in a new order.

    There are at least `rounds` rounds, whatever their time; no further one starts after `seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        number = 0
        while number < rounds or (number < most and time.perf_counter() - begun < seconds):
            for name in order.sample(list(steps), len(steps)):
                _wait_for(device)
                start = time.perf_counter()
                steps[name]()
                _wait_for(device)
                times[name].append(time.perf_counter() - start)
            number += 1
    finally:
        gc.enable()
    return times


def over_floor(times: Mapping[str, list[float]]) -> dict[str, Timing]:
    """Each method's time over that of `FLOOR` in the same round, if that was timed.

    A disturbance of seconds affects both, so these ratios vary less between rounds than the times do.
    """
    floor = times.get(FLOOR)
    if floor is None:
        return {}
    return {
        name: timing([own / beside for own, beside in zip(values, floor, strict=True)])
        for name, values in times.items()
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    base: nn.Module,
    makers: Makers,
    naive: Naive,
    batch: Mapping[str, Tensor],
    device: torch.device,
    seconds: float,
    rounds: int,
) -> dict[str, Any]:
    """Check that the methods compute the same, then time a step of each and measure its memory.

    Args:
        base: the frozen model, not patched.
        makers: method to a function that makes it ready, on weights shared with `base`.
        naive: makes the edited model that all others are held to, see `check`.
        batch: of a step.
        device: of the model and the batch.
        seconds, rounds: see `timed`.

    Returns:
        `seconds`, `over_floor`, `peak_bytes` and `trainable` by method, and `left_out`: why others were not measured.

    Raises:
        ArithmeticError: a method does not compute what it should.
    """
    torch.compiler.reset()  # what is compiled for other models counts against how often one may be compiled again
    left_out: dict[str, str] = {}
    prepared: dict[str, Prepared] = {}
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        try:
            prepared[name], steps[name] = _tried(make, batch)
        except Exception as error:  # whatever a method fails by: it is named, and the others are measured
            left_out[name] = in_words(error)
        if name in left_out and device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    if not steps:
        raise RuntimeError(f"no method could be run: {left_out}")
    check(base, prepared, naive, batch)
    for made in prepared.values():
        made.model.train()
    peaks = {}
    weights = [*base.parameters()]
    for name, step in steps.items():
        step()
        peaks[name] = peak_allocated(step, device) + held_bytes(step.added(), weights)
    times = timed(steps, device, seconds, rounds)
    return {
        "seconds": {name: timing(values).json() for name, values in times.items()},
        "over_floor": {name: found.json() for name, found in over_floor(times).items()},
        "peak_bytes": peaks,
        "trainable": {name: made.trainable for name, made in prepared.items()},
        "left_out": left_out,
    }


def _tried(make: Callable[[], Prepared], batch: Mapping[str, Tensor]) -> tuple[Prepared, Step]:
    """A method made ready, behind its first step: that may compile, and makes the optimizer's state."""
    made = make()
    made.model.train()
    step = Step(made, batch)
    step()
    return made, step
