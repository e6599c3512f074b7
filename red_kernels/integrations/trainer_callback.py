"""A callback with which any Trainer saves the edits in each of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..checkpoints.checkpoint import save_edits
from ..edits.find import edit_modules, edit_parameters
from ..patching.patch import edit_config
from ..support.sharded import is_sharded

__all__ = ["SaveEdits", "check_patched"]


def check_patched(model: nn.Module, who: str) -> None:
    """Check before a training that its edits can be saved; `who` saves them, for the message.

    Raises:
        ValueError: the model is not patched, or not by `rk.patch`.
    """
    try:
        edit_config(model)
    except ValueError as error:
        try:
            foreign = not all(own.own for own in edit_modules(model).values())
        except ValueError:
            foreign = False
        if foreign:
            raise ValueError(
                f"model: the edits of this {type(model).__name__} are adapters of PEFT, which saves them itself: train "
                f"it by transformers' plain Trainer, without {who}; model.save_pretrained writes the adapter"
            ) from error
        raise ValueError(f"{error}; {who} saves the edits of a model that is patched by rk.patch") from error


class SaveEdits(TrainerCallback):
    """Saves the edits by `rk.save_edits` into each checkpoint folder that a Trainer writes, next to its own files.

    For trainers with their own form of checkpoint and of resuming; `RedTrainer` needs no callback. One process writes:
    the first one, or under FSDP2, where the vectors are gathered from all, the first of the mesh.
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Raise ValueError if the model is not patched by `rk.patch`, when the Trainer is created."""
        check_patched(_model(kwargs), "SaveEdits")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same for a callback added later, and for a recreated model; nothing is trained then."""
        check_patched(_model(kwargs), "SaveEdits")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the edits. Raises the errors of `rk.save_edits`."""
        model = _model(kwargs)
        sharded = any(is_sharded(own) for parts in edit_parameters(model).values() for own in parts.values())
        if sharded or state.is_world_process_zero:
            save_edits(model, Path(args.output_dir or ".") / f"checkpoint-{state.global_step}", peft=False)


def _model(arguments: dict[str, Any]) -> nn.Module:
    model: nn.Module = arguments["model"]
    return model
