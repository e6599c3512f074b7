"""A callback by which any Trainer puts the edits into each of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._sharded import is_sharded
from ..checkpoint import save_edits
from ..patch import edit_parameters

__all__ = ["SaveEdits"]


class SaveEdits(TrainerCallback):
    """Saves the edits by `rk.save_edits` into each checkpoint folder that a Trainer writes, beside its own files.

    For trainers that keep their own form of checkpoint and resume from that; `RedTrainer` needs no such callback. One
    process writes: the first, or under FSDP2, where the vectors are gathered from all, the first of the mesh.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise ValueError if the model is not patched, before anything is trained."""
        edit_parameters(_model(kwargs))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the edits. Raises what `rk.save_edits` raises."""
        model = _model(kwargs)
        sharded = any(is_sharded(own) for parts in edit_parameters(model).values() for own in parts.values())
        if sharded or state.is_world_process_zero:
            save_edits(model, Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")


def _model(arguments: dict[str, Any]) -> nn.Module:
    model: nn.Module = arguments["model"]
    return model
