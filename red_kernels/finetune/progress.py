"""The progress of a training: a bar on a terminal, periodic lines in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..support.progress import Stage


class ShowProgress(TrainerCallback):
    """A Trainer callback that shows the step, the latest loss, the speed, and the remaining time.

    The arguments need `disable_tqdm` and `logging_steps=1`. `include_num_input_tokens_seen` selects the tokens that the
    speed counts. `Stage` decides when lines are printed if the console is no terminal; the first comes after one step.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: Stage | None = None
        self._began = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start at the step of the run's start or resumption."""
        self._began = (time.perf_counter(), int(state.num_input_tokens_seen))
        self._stage = Stage(self._console, "training", state.max_steps, done=state.global_step)
        self._stage.open()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss that Trainer logs after a step."""
        if logs and "loss" in logs and self._stage is not None:
            began, first = self._began
            speed = (int(state.num_input_tokens_seen) - first) / max(time.perf_counter() - began, 1e-9)
            said = f", {speed:,.0f} tokens/s" if speed else ""  # not counted for pairs of answers
            self._stage.reached(state.global_step, f"loss {float(logs['loss']):.4f}{said}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar; also after an exception, which skips `on_train_end`."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None
