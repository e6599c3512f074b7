"""transformers' Trainer for a patched model: small checkpoints, written atomically, and a stop that saves."""

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
from transformers.trainer_callback import ExportableState

from ..checkpoints.checkpoint import check_patched as check_vectors
from ..checkpoints.checkpoint import load_found, read, save_with_head
from ..checkpoints.folder import HEAD_NAME, TENSORS_NAME, MissingHead
from ..checkpoints.wrapped_names import bare_name
from ..edits.find import edit_modules, edit_parameters
from ..edits.module import RedEdit
from ..support.files import write_files
from ..support.sharded import is_sharded
from .trainer_callback import check_patched

__all__ = [
    "HEAD_NAME",
    "RedTrainer",
    "StopOnSignal",
    "checkpoints",
    "head_parameters",
    "load_trained",
    "save_trained",
]

_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")
_PARTIAL = ".partial-"


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of a patched model beside its edits, by name: usually a classification head, or none."""
    edits = {id(own) for module in edit_modules(model).values() for own in module.parameters()}
    return {name: own for name, own in model.named_parameters() if own.requires_grad and id(own) not in edits}


def save_trained(model: nn.Module, folder: str | os.PathLike[str], *, peft: bool = True) -> Path:
    """Save all trained tensors: the edits as `rk.save_edits` does, and a trainable head next to them (`HEAD_NAME`).

    Both become valid in one step: a crash leaves the former state or the new one. The names of the labels are saved
    with the head. ``peft``: write PEFT's form too, as `rk.save_edits` does.

    Raises:
        ValueError: the model is not patched.
        OSError: the folder cannot be written to; no partial file is left.
    """
    return save_with_head(model, folder, None, head_parameters(model), peft=peft)


def load_trained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the files of `save_trained` into a model patched alike; all names and shapes are checked first.

    Raises:
        ValueError: the model is not patched alike, or the files are damaged, or of another model, or of two saves.
        FileNotFoundError: the folder lacks the edits, or the head that the model trains.
    """
    check_vectors(model)
    path = Path(folder) / HEAD_NAME
    head = head_parameters(model)
    missing = f"{path} does not exist, but the model trains {', '.join(sorted(head))}"
    try:
        found = read(Path(folder))
    except MissingHead:
        raise FileNotFoundError(missing) from None
    values = {} if found.trained is None else found.trained.values
    if head and not values:
        raise FileNotFoundError(missing)
    if values and not head:
        raise ValueError(f"{path}: holds a trained head, but the model trains none; patch it with train_head=True")
    shapes = {bare_name(model, name): tuple(value.shape) for name, value in values.items()}
    expected = {bare_name(model, name): tuple(own.shape) for name, own in head.items()}
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

    A checkpoint gets its name only when it is complete, so the newest one can always be resumed
    (`trainer.train(resume_from_checkpoint=...)` loads the edits into the model's own Parameters). Use it with a model
    patched by `rk.patch`. `weight_decay` in the arguments applies only to the other trained parameters, such as a
    head's: it would pull a scale toward 0 instead of 1, so no edit has it.

    Raises:
        ValueError: at once, if the model, or that of `model_init`, is not patched by `rk.patch`. PEFT saves an adapter
            of `red_kernels.integrations.peft`: use the plain Trainer.

    It overrides only the writing and reading of checkpoints. So a class of both gives a trainer of another library the
    same, this one first: `class RedSFTTrainer(RedTrainer, SFTTrainer): ...`.
    """

    _staging: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = args[0] if args else kwargs.get("model")
        if isinstance(model, nn.Module):  # else it is made below, from its name or by model_init
            check_patched(model, type(self).__name__)
        super().__init__(*args, **kwargs)
        check_patched(self._inner_model(), type(self).__name__)
        self._check_reference()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model of `model_init` for each run. Raises ValueError if it is not patched."""
        model: nn.Module = super().call_model_init(trial)
        check_patched(model, type(self).__name__)
        return model

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters with weight decay: none of an edit."""
        edits = {id(own) for module in edit_modules(model).values() for own in module.parameters()}
        own = dict(model.named_parameters(remove_duplicate=False))  # a tied weight is named too
        return [name for name in super().get_decay_parameter_names(model) if id(own[name]) not in edits]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the trained tensors into a folder, by `save_trained`. All processes must call this."""
        model = self._inner_model()
        if any(map(is_sharded, model.parameters())):
            self._save_trained(model, output_dir)  # it gathers them from all processes
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self._save_trained(self._inner_model(), output_dir)

    def _save_trained(self, model: nn.Module, output_dir: str | None) -> None:
        # A checkpoint is for resuming, which does not need PEFT's form.
        save_trained(model, str(output_dir or self.args.output_dir), peft=self._staging is None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self._inner_model(), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # Trainer calls this only then
        load_trained(self._inner_model(), self.state.best_model_checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._staging = run / f"{_PARTIAL}{self.state.global_step}"
        states: Any = self.state.stateful_callbacks  # by name, after the start of a run
        for own in self.callback_handler.callbacks:
            if isinstance(own, ExportableState):  # a new one in a resumed run: Trainer would search for its state
                states.setdefault(type(own).__name__, {})
        try:
            if self.args.should_save:
                for left in run.glob(f"{_PARTIAL}*"):  # of a killed run, perhaps after its last checkpoint
                    shutil.rmtree(left, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self._name_best_checkpoint(self._staging, run)
            self.accelerator.wait_for_everyone()  # every process has written its random state
            if self.args.should_save:
                self._finish_checkpoint(self._staging / name, run / name)
            self.accelerator.wait_for_everyone()  # after this, every process finds the checkpoint under its name
        finally:
            if self.args.should_save:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            self._remove_old_checkpoints(run)

    def _name_best_checkpoint(self, staging: Path, run: Path) -> None:
        """Trainer has looked for the best checkpoint in the staging folder; all processes use its present or future
        name in the run's folder."""
        best, step = self.state.best_model_checkpoint, self.state.best_global_step
        if best is not None and Path(best).parent == staging:
            self.state.best_model_checkpoint = str(run / Path(best).name)
        elif best is None and step and (run / f"checkpoint-{step}").is_dir():  # resumed in a moved folder
            self.state.best_model_checkpoint = str(run / f"checkpoint-{step}")

    def _finish_checkpoint(self, complete: Path, final: Path) -> None:
        self.state.save_to_json(str(complete / "trainer_state.json"))  # it names the best checkpoint
        for path in complete.rglob("*"):
            if path.is_file():
                with path.open("r+b") as file:
                    os.fsync(file.fileno())
        if final.exists() and not (final / TENSORS_NAME).exists():
            # Of another training, perhaps the base model itself: like Trainer, remove only files of the same names.
            shutil.copytree(complete, final, dirs_exist_ok=True)
            return
        if final.exists():  # the same step of an earlier run in this folder
            shutil.rmtree(final)
        os.replace(complete, final)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is not None:
            return  # it is renamed next, and pushed under its name
        if self.is_world_process_zero():  # Trainer copies only its own files
            files = {path.name: path.read_bytes() for path in sorted(Path(checkpoint_folder).glob("red_*"))}
            write_files(str(self.args.output_dir), files)
        super()._push_from_checkpoint(checkpoint_folder)

    def _remove_old_checkpoints(self, run: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        best = self.state.best_model_checkpoint
        for path in checkpoints(run)[:-limit]:
            if best is None or path != Path(best):
                shutil.rmtree(path)

    def _check_reference(self) -> None:
        """TRL's trainers load a model's reference by its name: without the edits that the model starts with."""
        reference = getattr(self, "ref_model", None)
        if not isinstance(reference, nn.Module) or any(isinstance(module, RedEdit) for module in reference.modules()):
            return
        vectors = [pair for parts in edit_parameters(self._inner_model()).values() for pair in parts.items()]
        if any(not own.is_meta and bool((own != float("bias" not in part)).any()) for part, own in vectors):
            warnings.warn(
                "ref_model: is the base model without edits, but the model starts with trained edits, so the first "
                "loss is not that of equal models; for a reference with these edits pass copy.deepcopy(model)",
                stacklevel=3,
            )

    def _inner_model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


class StopOnSignal(TrainerCallback):
    """Ends the training after the running step, with a checkpoint, on a stop signal.

    Inside `with callback.installed():` Ctrl-C (SIGINT) and SIGTERM do so; a second Ctrl-C stops at once, as usual.
    `stopped` then shows whether a signal came.

    Args:
        announce: called when the signal comes.
        agree: called after each step with whether a signal came. It returns whether to stop: several processes that
            train together must stop after the same step.
    """

    def __init__(self, announce: Callable[[], None] | None = None, agree: Callable[[bool], bool] | None = None) -> None:
        self.stopped = False
        self._signalled = False
        self._announce, self._agree = announce, agree

    @property
    def signalled(self) -> bool:
        """Whether a signal came to this process, handled or not."""
        return self._signalled

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals in this block, which must be in the main thread; then restore the former handlers."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        former = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled:
            raise KeyboardInterrupt
        self._signalled = True
        if self._announce is not None:
            self._announce()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request a save and an end from Trainer, if a signal came during the step."""
        self.stopped = self._signalled if self._agree is None else self._agree(self._signalled)
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True
        return control
