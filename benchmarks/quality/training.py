"""The common part of every method: the order of the data, the steps, the optimizer, and the search of a learning rate.

A plain loop instead of transformers' Trainer, for two reasons. The order of the data must not depend on the random
numbers drawn in a method's setup, as it would with a sampler on the global generator: here it is a function of the
seed. And half-precision weights are trained through fp32 copies (as usual in mixed precision). Without them full
fine-tuning would lose every update smaller than a rounding step, and a comparison with it would be unfair.

"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 0.06  # of the steps
POOL = 16  # batches whose items are sorted by length together


def data_order(items: int, steps: int, batch: int, seed: int, lengths: Sequence[int] | None = None) -> list[list[int]]:
    """The numbers of the items in each step's batch: whole passes over the data, each in a new order.

    Args:
        items, steps, batch: their numbers.
        seed: the order depends only on it.
        lengths: of the items. With them a batch has items of similar length, which need little padding: the items of
            `POOL` batches at a time are sorted by length and cut into batches, and these are shuffled.

    Raises:
        ValueError: no items, or another number of lengths.
    """
    if items < 1:
        raise ValueError(f"items: got {items}, expected at least 1")
    if lengths is not None and len(lengths) != items:
        raise ValueError(f"lengths: got {len(lengths)}, expected one for each of {items} items")
    generator = torch.Generator().manual_seed(seed)
    stream: list[int] = []
    while len(stream) < steps * batch:
        stream += torch.randperm(items, generator=generator).tolist()
    order = [stream[step * batch : (step + 1) * batch] for step in range(steps)]
    if lengths is None:
        return order
    by_length: list[list[int]] = []
    for start in range(0, steps, POOL):
        pool = sorted(itertools.chain.from_iterable(order[start : start + POOL]), key=lengths.__getitem__)
        cut = [pool[first : first + batch] for first in range(0, len(pool), batch)]
        by_length += [cut[place] for place in torch.randperm(len(cut), generator=generator).tolist()]
    return by_length


def train(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    batches: Iterable[Mapping[str, Tensor]],
    steps: int,
    rate: float,
    *,
    looks: Collection[int] = (),
    look: Callable[[int, float], None] = lambda step, seconds: None,
) -> list[float]:
    """Train by AdamW without weight decay, the rate rising over the first 6% of the steps and then falling to 0.

    Args:
        model: returns `loss`; it is left in evaluation mode.
        trained: the optimizer's parameters. Those in half precision get fp32 copies, which are rounded back after a
            step.
        batches: the model's inputs, one for each step.
        steps: the number of steps.
        rate: the highest learning rate.
        looks: the steps, counted from 1, after which `look` is called.
        look: gets the number of finished steps and their seconds (`seconds_of`), in evaluation mode; its own time is
            not counted.

    Returns:
        The loss of each step, before it. The training ends at the first loss that is not finite, which is included.
    """
    from transformers import get_scheduler

    half = (torch.bfloat16, torch.float16)
    stepped = [nn.Parameter(own.detach().float()) if own.dtype in half else own for own in trained]
    copied = [(own, copy) for own, copy in zip(trained, stepped, strict=True) if copy is not own]
    optimizer = torch.optim.AdamW(stepped, lr=rate, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, math.ceil(WARM_UP * steps), steps)
    clock = seconds_of(trained[0].device)
    losses = []
    passed, begun = 0.0, clock()
    model.train()
    for done, batch in enumerate(batches, start=1):
        loss = model(**batch).loss
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        for own, copy in copied:
            copy.grad, own.grad = None if own.grad is None else own.grad.float(), None
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for own, copy in copied:
                own.copy_(copy)
        if done in looks:
            passed += clock() - begun
            model.eval()
            look(done, passed)
            model.train()
            begun = clock()
    model.eval()
    return losses


def seconds_of(device: torch.device) -> Callable[[], float]:
    """The clock of a training: the wall clock on a GPU, CPU time on a CPU, which other programs do not affect.

    CPU seconds are those of all threads together.
    """
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


@dataclass(frozen=True)
class Search:
    """The tried learning rates.

    Attributes:
        tried: rate to the result of `judge`, in rising order.
        chosen: the rate with the lowest loss.
        at_edge: whether that is the lowest or the highest of all, so a better one may be beyond.
        added: the rates tried beyond the grid.
    """

    tried: dict[float, Any]
    chosen: float
    at_edge: bool
    added: tuple[float, ...]


def search_rate(grid: Sequence[float], judge: Callable[[float], Any], extend: int) -> Search:
    """Try the rates of a grid; while the best is at an edge, try another beyond that edge.

    Args:
        grid: at least two rates, rising.
        judge: rate to a result with a `loss`; lower is better. A loss that is not finite means a diverged training.
        extend: the most rates beyond the grid, each as far from the last as the last two are apart.

    Raises:
        ValueError: the grid is not as above.
        RuntimeError: no rate has a finite loss.
    """
    check_grid("grid", grid)
    tried = {rate: judge(rate) for rate in grid}
    added: list[float] = []

    def best() -> float:
        finite = [rate for rate, found in tried.items() if math.isfinite(found.loss)]
        if not finite:
            raise RuntimeError(f"the training diverged with every learning rate: {sorted(tried)}")
        return min(finite, key=lambda rate: tried[rate].loss)

    while best() in (min(tried), max(tried)) and len(added) < extend:
        rates = sorted(tried)
        last, before = (rates[0], rates[1]) if best() == rates[0] else (rates[-1], rates[-2])
        added.append(float(f"{last * last / before:.0e}"))
        tried[added[-1]] = judge(added[-1])
    chosen = best()
    at_edge = chosen in (min(tried), max(tried))
    return Search(dict(sorted(tried.items())), chosen, at_edge, tuple(added))


def check_grid(name: str, grid: Sequence[float]) -> None:
    """Raises ValueError, naming the argument, unless there are two rates or more, above 0 and rising."""
    rising = all(low < high for low, high in itertools.pairwise(grid))
    if len(grid) < 2 or not rising or not grid[0] > 0 or not math.isfinite(grid[-1]):
        raise ValueError(f"{name}: got {list(grid)}, expected at least two learning rates above 0, rising")
