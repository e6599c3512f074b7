"""transformers' Trainer for a patched model: small checkpoints, written all or nothing, and a stop that saves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._saved_folder import HEAD_NAME, MissingHead
from .._sharded import is_sharded
from ..checkpoint import check_patched, load_found, read, save_with_head
from ..patch import edit_modules

__all__ = [
    "HEAD_NAME",
    "RedTrainer",
    "StopOnSignal",
    "checkpoints",
    "head_parameters",
    "load_trained",
    "save_trained",
]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial-"


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a patched model trains beside its edits, by name: a classification head, usually, or nothing."""
    edits = {id(own) for module in edit_modules(model).values() for own in module.parameters()}
    return {name: own for name, own in model.named_parameters() if own.requires_grad and id(own) not in edits}


def save_trained(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Save all that was trained: the edits as `rk.save_edits` does, and a trainable head beside them (`HEAD_NAME`).

    Both become valid in one step: a crash leaves the former state or the new one. The names of the labels are saved
    with the head.

    Raises:
        ValueError: the model is not patched.
        OSError: the folder cannot be written to; no partial file is left.
    """
    return save_with_head(model, folder, None, head_parameters(model))


def load_trained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load what `save_trained` saved into a model patched alike; every name and shape is checked first.

    Raises:
        ValueError: the model is not patched alike, or the files are damaged, of another model or of two saves.
        FileNotFoundError: the folder lacks the edits, or the head that the model trains.
    """
    check_patched(model)
    path = Path(folder) / HEAD_NAME
    head = head_parameters(model)
    missing = f"{path} does not exist, and the model trains {', '.join(sorted(head))}"
    try:
        found = read(Path(folder))
    except MissingHead:
        raise FileNotFoundError(missing) from None
    values = {} if found.trained is None else found.trained.values
    if head and not values:
        raise FileNotFoundError(missing)
    if values and not head:
        raise ValueError(f"{path}: holds a trained head, and the model trains none")
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    expected = {name: tuple(own.shape) for name, own in head.items()}
    if shapes != expected:
        raise ValueError(f"{path}: holds {shapes}, the model trains {expected}")
    for text in load_found(model, found, Path(folder), None, strict=True).warnings:
        warnings.warn(text, stacklevel=2)


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints in a Trainer's output folder, oldest first."""
    root = Path(folder)
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


class RedTrainer(Trainer):
    """A Trainer whose checkpoints hold the edits, a trainable head and the optimizer's state, but no base weights.

    A checkpoint gets its name only when it is complete, so the newest one can always be resumed from
    (`trainer.train(resume_from_checkpoint=...)` loads the edits into the model's own Parameters). Use it with a model
    patched by `rk.patch`. Weight decay pulls a scale toward 0, not toward 1: leave it at 0, Trainer's default.

    It overrides only how checkpoints are written and read, so a trainer of another library gets the same by a class of
    both, this one first: `class RedSFTTrainer(RedTrainer, SFTTrainer): ...`.
    """

    _staging: Path | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained into a folder, by `save_trained`. All processes have to call this."""
        model = self._inner_model()
        if any(map(is_sharded, model.parameters())):
            save_trained(model, str(output_dir or self.args.output_dir))  # which gathers it from all processes
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            save_trained(self._inner_model(), str(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self._inner_model(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # Trainer asks only then
        load_trained(self._inner_model(), self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = run / f"{_PARTIAL}{self.state.global_step}"
        try:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)  # left by a run that was killed
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every process has written its random state
            if self.args.should_save:
                self._finish_checkpoint(self._staging / name, run / name)
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self.args.should_save:
            self._remove_old_checkpoints(run)

    def _finish_checkpoint(self, complete: Path, final: Path) -> None:
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == complete:
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(complete / "trainer_state.json"))
        for path in complete.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        if final.exists():  # the same step, saved by an earlier run in this folder
            shutil.rmtree(final)
        os.replace(complete, final)

    def _remove_old_checkpoints(self, run: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        best = self.state.best_model_checkpoint
        for path in checkpoints(run)[:-limit]:
            if best is None or path != Path(best):
                shutil.rmtree(path)

    def _inner_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


class StopOnSignal(TrainerCallback):
    """Ends the training after the running step, with a checkpoint, when the process is asked to stop.

    Inside `with callback.installed():` Ctrl-C (SIGINT) and SIGTERM do so; a second Ctrl-C stops at once, as always.
    `stopped` tells afterwards whether it happened.
    """

    def __init__(self, announce: Callable[[], None] | None = None) -> None:
        self.stopped = False
        self._announce = announce

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals in this block, which has to be in the main thread; the former handlers come back after."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        if self._announce is not None:
            self._announce()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask Trainer to save and to end, if a signal came during the step."""
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
        return control
