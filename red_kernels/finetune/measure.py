"""Measuring a job: held-out loss, peak memory, and training speed next to the eager edit and the frozen model."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..support.parse import shown
from ..support.progress import Stage

QUIET = 5.0  # seconds after which a usually short stage shows its progress


@dataclass(frozen=True)
class HeldOut:
    """Mean loss over the held-out targets, and the scores of a classifier or a regression.

    Attributes:
        loss: in nats, or the mean squared error of a regression.
        targets: tokens, or texts.
        accuracy: of a classifier, from 0 to 1, like the next two.
        f1: the mean over the classes, or that of the second of two classes.
        matthews: Matthews' correlation coefficient.
        pearson, spearman: of a regression, the correlation of its outputs with the labels, and that of their ranks.
    """

    loss: float
    targets: int
    accuracy: float | None = None
    f1: float | None = None
    matthews: float | None = None
    pearson: float | None = None
    spearman: float | None = None

    @classmethod
    def of(cls, said: Any) -> HeldOut:
        """From `dataclasses.asdict` of one, as in a file. Raises ValueError for another value."""
        form: dict[str, tuple[type, ...]] = {name: (int, float, type(None)) for name in cls.__dataclass_fields__}
        form |= {"loss": (int, float), "targets": (int,)}
        if (
            not isinstance(said, dict)
            or not {"loss", "targets", "accuracy"} <= said.keys() <= form.keys()  # an older version had only these
            or any(isinstance(value, bool) or not isinstance(value, form[name]) for name, value in said.items())
        ):
            raise ValueError(f"a held-out loss is {shown(said)}, expected numbers for {', '.join(form)}")
        return cls(**said)

    @property
    def perplexity(self) -> float:
        """`exp(loss)`; infinite on overflow."""
        return math.inf if self.loss > 700 else math.exp(self.loss)

    def numbers(self) -> dict[str, float]:
        """The measured values by name, without the number of targets."""
        said = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "targets"}
        return {name: float(value) for name, value in said.items() if value is not None}


@torch.no_grad()
def held_out_loss(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    classification: bool,
    stage: Stage | None = None,
    gather: Callable[[Any], list[Any]] = lambda own: [own],
) -> HeldOut:
    """The mean loss over all targets of the batches, in evaluation mode; the model's mode is restored.

    Args:
        model: a transformers model that returns `loss` for `labels`, and `logits`.
        batches: with `input_ids` and `labels`: `(batch, length)` with -100 for no target; or `(batch,)`, numbers of
            classes or, in floating point, the targets of a regression.
        classification: whether the labels are `(batch,)`; then the scores are measured too.
        stage: called after each batch.
        gather: from this process's values to those of all; each process measures some of the batches.

    Raises:
        ValueError: the batches have no targets.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    said: list[torch.Tensor] = []
    meant: list[torch.Tensor] = []
    try:
        for number, batch in enumerate(batches, start=1):
            batch = {name: value.to(device) for name, value in batch.items()}
            output = model(**batch)
            labels = batch["labels"] if classification else batch["labels"][:, 1:]
            targets = int((labels != -100).sum()) if not labels.is_floating_point() else labels.numel()
            total += float(output.loss.float()) * targets
            count += targets
            if classification:
                said.append(output.logits.float().cpu())
                meant.append(labels.cpu())
            if stage is not None:
                stage.reached(number)
    finally:
        model.train(was_training)
    found = gather((total, count, said, meant))
    total, count = sum(own[0] for own in found), sum(own[1] for own in found)
    if count == 0:
        raise ValueError("batches: hold no targets")
    if not classification:
        return HeldOut(total / count, count)
    said, meant = ([part for own in found for part in own[place]] for place in (2, 3))
    return HeldOut(total / count, count, **_scores(torch.cat(said), torch.cat(meant)))


def _scores(said: torch.Tensor, meant: torch.Tensor) -> dict[str, float]:
    if meant.is_floating_point():
        return correlations(said.squeeze(-1), meant)
    return class_scores(said.argmax(-1), meant, said.shape[-1])


def class_scores(said: torch.Tensor, meant: torch.Tensor, classes: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation coefficient of class numbers, `(items,)` each.

    F1 is that of class 1 for two classes, else the mean over the classes that are predicted or true. A quotient with an
    empty denominator is 0.
    """
    counts = torch.zeros(classes, classes, dtype=torch.float64)  # [true, predicted]
    counts.index_put_((meant, said), torch.ones(len(said), dtype=torch.float64), accumulate=True)
    right, of_meant, of_said = counts.diagonal(), counts.sum(1), counts.sum(0)
    each = 2 * right / (of_meant + of_said).clamp(min=1)
    there = of_meant + of_said > 0
    every = counts.sum()
    # Gorodkin's form for any number of classes; for two it equals Matthews' own.
    above = right.sum() * every - (of_meant * of_said).sum()
    below = (every**2 - (of_said**2).sum()) * (every**2 - (of_meant**2).sum())
    return {
        "accuracy": float(right.sum() / every),
        "f1": float(each[1] if classes == 2 else each[there].mean()),
        "matthews": float(above / below.sqrt()) if below > 0 else 0.0,
    }


def correlations(said: torch.Tensor, meant: torch.Tensor) -> dict[str, float]:
    """Pearson's correlation of two `(items,)`, and Spearman's: that of their ranks. 0 if one of them is constant."""

    def pearson(one: torch.Tensor, other: torch.Tensor) -> float:
        one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
        norm = one.norm() * other.norm()
        return float(one @ other / norm) if norm > 0 else 0.0

    return {"pearson": pearson(said, meant), "spearman": pearson(_ranks(said), _ranks(meant))}


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Each value's rank; equal ones share the mean of their ranks."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]


_COUNTED_LATER = 16 << 20


class PeakMemory:
    """The peak memory since this object was made: of the GPU, or of the whole process on a CPU.

    On Linux the kernel's high-water mark is reset at the start. If it is not reset, `since_start` is True: the mark
    then covers everything since the process began, loading included.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.since_start = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.since_start = True
        else:
            # Some kernels accept the request without effect. Others count pages in batches, for each processor.
            mark, now = _status("VmHWM"), _status("VmRSS")
            self.since_start = mark is not None and now is not None and mark > now + _COUNTED_LATER

    def bytes(self) -> int | None:
        """The peak in bytes, or None if the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        mark = _status("VmHWM")
        if mark is not None:
            return mark
        try:
            import resource
        except ImportError:  # Windows
            return None
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int | None:
    """Linux's entry on this process's memory, in bytes; None if there is no such entry."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


@dataclass(frozen=True)
class Speed:
    """Training speed of one variant, in tokens per second, padding not counted, one sample a round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the samples."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The slowest and the fastest sample."""
        return min(self.samples), max(self.samples)


def compare_speed(
    steps: Mapping[str, Callable[[], int]],
    device: torch.device,
    rounds: int = 7,
    seconds: float = 60.0,
    console: Console | None = None,
) -> dict[str, Speed]:
    """Time the steps in turn, so that disturbances of the machine affect all of them alike.

    Args:
        steps: name to a function that does one training step and returns its number of tokens.
        device: synchronised before each reading of the clock.
        rounds: the number of timings of each step; every other round is in reverse order.
        seconds: no new round starts after this time, but there are at least three.
        console: for the progress; None for none.
    """
    warm_up = _seconds(steps, device)
    fitting = math.floor(seconds / max(sum(each for each, _ in warm_up.values()), 1e-9)) + 1
    rounds_here = min(rounds, max(3, fitting))  # for the estimate; the first steps take longer than the others
    samples: dict[str, list[float]] = {name: [] for name in steps}
    with contextlib.ExitStack() as shown:
        stage = None
        if console is not None:
            stage = shown.enter_context(Stage(console, "comparing speeds", rounds_here, unit="round", after=QUIET))
        begun = time.perf_counter()
        for number in range(rounds):
            if number >= 3 and time.perf_counter() - begun > seconds:
                break
            names = list(steps)
            order = names if number % 2 == 0 else names[::-1]
            for name, (taken, tokens) in _seconds({name: steps[name] for name in order}, device).items():
                samples[name].append(tokens / taken)
            if stage is not None:
                stage.reached(min(number + 1, rounds_here))
    return {name: Speed(tuple(values)) for name, values in samples.items()}


def _seconds(steps: Mapping[str, Callable[[], int]], device: torch.device) -> dict[str, tuple[float, int]]:
    """Do each step once: its seconds, and its tokens."""
    found = {}
    for name, step in steps.items():
        _wait_for(device)
        start = time.perf_counter()
        tokens = step()
        _wait_for(device)
        found[name] = (time.perf_counter() - start, tokens)
    return found


def first_look(model: Any, batch: Mapping[str, torch.Tensor], tokens: int) -> float:
    """The approximate seconds of this many tokens, forward and backward, extrapolated from a few of them.

    Calls of increasing size are timed. The last two give the fixed cost of a call and the cost of a token; if threads
    wait for each other, the fixed cost dominates. No call follows one of a second or longer, unless most of it was
    fixed cost, and none after ten seconds in all. Nothing is trained, no random number is drawn, no gradient remains.

    Args:
        model: a transformers model that returns `loss` and has trained parameters. Its mode is restored.
        batch: its inputs; of tensors with two dimensions the first row is taken, of others the first element.
        tokens: of a step.
    """
    device = next(model.parameters()).device
    trained = [own for own in model.parameters() if own.requires_grad]
    was_training = model.training
    longest = batch["input_ids"].shape[1]

    def seconds(count: int) -> float:
        row = {name: (value[:1, :count] if value.ndim > 1 else value[:1]).to(device) for name, value in batch.items()}
        _wait_for(device)
        start = time.perf_counter()
        torch.autograd.grad(model(**row).loss, trained, allow_unused=True)
        _wait_for(device)
        return time.perf_counter() - start

    model.eval()  # no dropout, so no random numbers
    try:
        begun = time.perf_counter()
        count = min(4, longest)
        seconds(count)  # it does the first call's preparation
        taken, each = seconds(count), 0.0
        while count < longest:
            more = min(4 * count, longest)
            former, taken = taken, seconds(more)
            each, count = max(0.0, taken - former) / (more - count), more
            grew = taken >= 2 * former
            if (taken >= 1 and grew) or time.perf_counter() - begun > 10:
                break
    finally:
        model.train(was_training)
    return taken + (each if each else taken / count) * max(0, tokens - count)


def training_step(
    model: nn.Module, batch: Mapping[str, torch.Tensor], trained: list[nn.Parameter], switch: Callable[[], Any]
) -> Callable[[], int]:
    """One step for `compare_speed`: forward, backward, AdamW. The learning rate is 0, so nothing changes.

    Args:
        model: a transformers model that returns `loss`.
        batch: its inputs, `input_ids` among them.
        trained: the optimizer's parameters; may be empty for a model that only passes gradients through.
        switch: called before each step, to put the model into the timed variant.
    """
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0) if trained else None
    tokens = real_tokens(batch)

    def step() -> int:
        switch()
        model.train()
        model(**batch).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return tokens

    return step


def real_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """The tokens of a batch, without padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def pass_gradients(model: nn.Module, sites: Iterable[str]) -> list[Any]:
    """Make a frozen model run its backward from the first edited site on, without an edit; returns hook handles.

    This is the floor of the training speed: the same backward passes, without trained parameters.
    """

    def hook(module: nn.Module, arguments: object, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if torch.is_grad_enabled() and not first.requires_grad:
            first.requires_grad_()

    return [model.get_submodule(site).register_forward_hook(hook) for site in sites]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
