"""Resuming a run: each file of its checkpoint is checked, and a damaged one named, before any training."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_pt_utils import safe_globals

from ..integrations.trainer import RedTrainer
from ..support.errors import one_line
from ..support.parse import read_json, shown
from ..support.sharded import is_sharded
from .optimizer_state import for_groups, gathered, spread_over

__all__ = ["ResumingTrainer", "check_checkpoint"]

# The fields with which Trainer computes after reading it.
_NUMBERS = ("global_step", "max_steps", "num_input_tokens_seen", "num_train_epochs", "logging_steps", "save_steps")
_STATE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(_NUMBERS, int),
    "train_batch_size": int,
    "eval_steps": (int, float),
    "epoch": (int, float),
    "total_flos": (int, float),
    "log_history": list,
    "stateful_callbacks": dict,
}
STATE, OPTIMIZER, SCHEDULER, RANDOM = "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"


def check_checkpoint(checkpoint: Path) -> None:
    """Check that a checkpoint's files exist, are readable, and have the form that Trainer resumes from.

    No file can run code: pickles are read by `torch.load(weights_only=True)`.

    Args:
        checkpoint: the folder, `checkpoint-<step>`.

    Raises:
        ValueError: a file is damaged or of another form; the message names it and the remedy.
        FileNotFoundError: a file is missing.
    """
    checks: dict[str, Callable[[Path], None]] = {
        STATE: _check_state,
        OPTIMIZER: lambda path: _expect(_read(path), {"state": dict, "param_groups": list}),
        SCHEDULER: lambda path: _expect(_read(path), {"last_epoch": int, "base_lrs": list}),
        **dict.fromkeys(_random_states(checkpoint), _check_random),
    }
    for name, check in checks.items():
        path = checkpoint / name
        if not path.is_file():
            raise FileNotFoundError(f"--resume: {path} does not exist; {_remedy(checkpoint)}")
        with _naming(path):
            check(path)


def _random_states(checkpoint: Path) -> list[str]:
    """The files of random states: one, or one for each training process."""
    return sorted(path.name for path in checkpoint.glob("rng_state_*.pth")) or [RANDOM]


class ResumingTrainer(RedTrainer):
    """A RedTrainer that raises ValueError with the name of a checkpoint's file that does not fit."""

    def train_on(self, checkpoint: Path | None) -> None:
        """Train, from a checkpoint if there is one.

        From a checkpoint of the last step, only its state and vectors are taken: Trainer would train a step before it
        checks.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / STATE))
            if state.global_step >= self.args.max_steps:
                self.take_up(checkpoint, state)
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def take_up(self, checkpoint: Path, state: TrainerState) -> None:
        """The state and the vectors of a checkpoint, or those of the best one, as Trainer has them at its end."""
        best = checkpoint.parent / f"checkpoint-{state.best_global_step}"
        chosen = best if self.args.load_best_model_at_end and state.best_global_step and best.is_dir() else checkpoint
        self._load_from_checkpoint(str(chosen))
        self.state = state

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Whole, as in a single process, so that any number of processes can resume."""
        groups = self._groups()
        if not any(map(is_sharded, itertools.chain.from_iterable(groups))):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.lr_scheduler is not None
        optimizer = gathered(self.optimizer, groups)  # by all processes
        if self.args.should_save:
            torch.save(optimizer, Path(output_dir) / OPTIMIZER)
            torch.save(for_groups(self.lr_scheduler.state_dict(), len(groups)), Path(output_dir) / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, groups = Path(checkpoint), self._groups()
        assert self.optimizer is not None  # Trainer has just made both
        assert self.lr_scheduler is not None
        with _naming(folder / OPTIMIZER):
            optimizer = _read(folder / OPTIMIZER)
            _check_optimizer(optimizer, groups)
        with _naming(folder / SCHEDULER):
            found, own = _read(folder / SCHEDULER), self.lr_scheduler.state_dict()
            one = self.args.world_size == 1  # otherwise the scheduler has a step for each process
            rates = for_groups(own, len(groups))["base_lrs"]
            wanted = {"base_lrs": rates, **({"last_epoch": self.state.global_step} if one else {})}
            for name, expected in wanted.items():
                if found[name] != expected:
                    raise ValueError(f"its {name} is {shown(found[name])}, expected {expected}")
        with _naming(folder, f"{OPTIMIZER} or {SCHEDULER}"):
            if not any(map(is_sharded, itertools.chain.from_iterable(groups))):
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            self.optimizer.load_state_dict(spread_over(optimizer, groups, self.optimizer))
            self.lr_scheduler.load_state_dict(for_groups(found, len(self.optimizer.param_groups)))

    def _groups(self) -> list[list[torch.Tensor]]:
        """The trained parameters, in the groups and the order of Trainer's optimizer of a whole model."""
        model = self._inner_model()
        decaying = set(self.get_decay_parameter_names(model))
        trained = [(name, own) for name, own in model.named_parameters() if own.requires_grad]
        return [[own for name, own in trained if (name in decaying) is decays] for decays in (True, False)]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with contextlib.nullcontext() if checkpoint is None else _naming(Path(checkpoint) / RANDOM):
            super()._load_rng_state(checkpoint)


def _check_optimizer(found: dict[str, Any], own: list[list[torch.Tensor]]) -> None:
    groups = [group["params"] for group in found["param_groups"]]
    if [len(group) for group in groups] != [len(group) for group in own]:
        raise ValueError(
            f"it is of {list(map(len, groups))} parameters in groups, this run trains {list(map(len, own))}"
        )
    numbers = itertools.chain.from_iterable(groups)
    parameters = dict(zip(numbers, itertools.chain.from_iterable(own), strict=True))
    if found["state"].keys() != parameters.keys():
        raise ValueError(f"it has states of {len(found['state'])} parameters, expected {len(parameters)}")
    for number, state in found["state"].items():
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or not bool(value.isfinite().all()):
                raise ValueError(f"its {name} of parameter {number} is no tensor of finite numbers")
            if value.dim() and value.shape != parameters[number].shape:
                got, expected = tuple(value.shape), tuple(parameters[number].shape)
                raise ValueError(f"its {name} of parameter {number} has shape {got}, expected {expected}")


def _remedy(checkpoint: Path) -> str:
    return f"remove {str(checkpoint)!r} to resume from the checkpoint before it, or start over by --overwrite"


@contextlib.contextmanager
def _naming(path: Path, name: str = "") -> Iterator[None]:
    """Turns errors of reading a file, or of using its content, into a ValueError that names it."""
    folder = path if name else path.parent
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        reason = one_line(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {one_line(error)}"
        where = path / name if name else path
        raise ValueError(f"--resume: {where} is damaged or of another run: {reason}; {_remedy(folder)}") from error


def _read(path: Path) -> dict[str, Any]:
    with safe_globals():  # the parts of a random state of numpy
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, expected a dict")
    return found


def _expect(found: dict[str, Any], form: Mapping[str, type | tuple[type, ...]]) -> None:
    for name, kinds in form.items():
        value = found.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool) or (isinstance(value, float) and value != value):
            expected = kinds.__name__ if isinstance(kinds, type) else " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"its {name} is {shown(value)}, expected a {expected}")


def _check_state(path: Path) -> None:
    content = read_json(path)
    _expect(content, _STATE)
    TrainerState(**content)
    best = content.get("best_model_checkpoint")
    if not isinstance(best, str | None):
        raise ValueError(f"its best_model_checkpoint is {shown(best)}, expected a text or null")
    for name, said in content["stateful_callbacks"].items():
        for one in said if isinstance(said, list) else [said]:
            _expect(_a_dict(one, f"state of {name}"), {"args": dict, "attributes": dict})
    TrainerControl.from_state(_a_dict(content["stateful_callbacks"].get("TrainerControl"), "TrainerControl"))
    step = path.parent.name.rpartition("-")[2]
    if str(content["global_step"]) != step:
        raise ValueError(f"its global_step is {content['global_step']}, expected {step}")
    for entry in content["log_history"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise ValueError(f"its log_history has {shown(entry)}, expected an object with a step")
        if not isinstance(entry.get("loss", math.nan), (int, float)):
            raise ValueError(f"its log_history has the loss {shown(entry['loss'])}, expected a number")


def _a_dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"its {what} is {shown(value)}, expected an object")
    return value


def _check_random(path: Path) -> None:
    found = _read(path)
    random.Random().setstate(found["python"])
    np.random.RandomState().set_state(found["numpy"])
    torch.Generator().set_state(found["cpu"])
