"""A patched model, the unfused composition and that in float64, each trained alike by whatever trains models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_zoo as zoo
import torch
from patch_helpers import patched_and_peer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from red_kernels.edits.find import edit_parameters

Vectors = dict[str, dict[str, nn.Parameter]]
RATE = 0.05
STEPS, BATCH = 4, 4  # of a Trainer, unless said otherwise


def rows(name: str, count: int, *, seed: int = 50) -> list[dict[str, Tensor]]:
    """A data set of `count` rows of equal length."""
    batch = zoo.inputs(name, seed=seed, batch=count)
    return [{key: value[row] for key, value in batch.items()} for row in range(count)]


def listed(vectors: Vectors) -> list[nn.Parameter]:
    """All vectors, in order."""
    return [vector for parts in vectors.values() for vector in parts.values()]


def training(vectors: Vectors) -> torch.optim.Optimizer:
    """Momentum has a state to save, and unlike Adam's its step is as long as the gradient, rounding errors included."""
    return torch.optim.SGD(listed(vectors), lr=RATE, momentum=0.5)


def as_parameters(peer: zoo.Unfused) -> None:
    """Give a peer's model its vectors as Parameters: a Trainer sets the gradients of the model's own to zero."""
    for index, vector in enumerate(listed(peer.vectors)):
        peer.model.register_parameter(f"vector_{index}", vector)


def hold_training(
    name: str,
    train: Callable[[nn.Module, torch.optim.Optimizer], list[float]],
    dtype: torch.dtype = torch.float32,
    exactly: Callable[[nn.Module, torch.optim.Optimizer], list[float]] | None = None,
    **changes: Any,
) -> nn.Module:
    """Hold the losses and the vectors after `train` to the unfused composition; returns the patched model.

    Args:
        name: of the tiny model.
        train: trains the vectors that the optimizer holds; returns the losses.
        dtype: in which `train` computes.
        exactly: what trains the model in float64, if not `train`.
        changes: of the tiny model's configuration.
    """
    model, unfused, truth = patched_and_peer(name, **changes)
    for peer in (unfused, truth):
        as_parameters(peer)
    start = [vector.detach().clone() for vector in listed(edit_parameters(model))]
    wanted = (exactly or train)(truth.model, training(truth.vectors))
    plain = train(unfused.model, training(unfused.vectors))
    found = train(model, training(edit_parameters(model)))
    assert len(found) == len(wanted) > 1
    as_tensors = (torch.tensor(found), torch.tensor(plain), torch.tensor(wanted, dtype=torch.float64))
    zoo.assert_as_exact("losses", *as_tensors, dtype)
    hold_vectors(edit_parameters(model), unfused.vectors, truth.vectors, dtype)
    for vector, before in zip(listed(edit_parameters(model)), start, strict=True):
        assert not torch.equal(vector, before), "nothing was trained"
    return model


def hold_vectors(found: Vectors, plain: Vectors, exact: Vectors, dtype: torch.dtype = torch.float32) -> None:
    """Hold the vectors of a patched model to those of its peers."""
    assert found.keys() == exact.keys()
    for site, parts in exact.items():
        assert found[site].keys() == parts.keys()
        for part, wanted in parts.items():
            zoo.assert_as_exact(f"{site}.{part}", found[site][part], plain[site][part], wanted.double(), dtype)


class Losses(TrainerCallback):
    """The loss that a Trainer reports of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self.losses.append(logs["loss"])


def trainer_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    kind: type[Trainer] = Trainer,
    name: str = "llama",
    **options: Any,
) -> tuple[Trainer, Losses]:
    """A Trainer for a few steps on the CPU, and what it will say of them."""
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "seed": 3,
        **options,
    }
    watch = Losses()
    trainer = kind(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows(name, STEPS * BATCH),
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    return trainer, watch


def same_vectors(first: nn.Module, second: nn.Module) -> bool:
    """Whether two patched models have the same vectors, bit for bit."""
    one, other = edit_parameters(first), edit_parameters(second)
    return one.keys() == other.keys() and all(map(torch.equal, listed(one), listed(other)))


def files(folder: Path) -> set[str]:
    """The names of the files in a folder."""
    return {path.name for path in folder.iterdir()}
