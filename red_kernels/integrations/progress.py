"""Showing how a training goes on: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ShowProgress(TrainerCallback):
    """A Trainer callback with a progress bar, the latest loss and the speed.

    The arguments need `disable_tqdm`, and `include_num_input_tokens_seen` says which tokens the speed counts.
    Where the console is no terminal it prints about ten lines over the whole run instead.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._loss = ""
        self._began = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step that the run starts or resumes from."""
        self._began = (time.perf_counter(), int(state.num_input_tokens_seen))
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
            self._progress.add_task("training", total=state.max_steps, completed=state.global_step, note="")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the loss that Trainer logs after a step and show it."""
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.4f}"
            self._show(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar; also after an exception, which never reaches `on_train_end`."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show(self, state: TrainerState) -> None:
        began, first = self._began
        speed = (int(state.num_input_tokens_seen) - first) / max(time.perf_counter() - began, 1e-9)
        note = f"{self._loss}, {speed:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=state.global_step, note=note)
        elif state.global_step % max(1, state.max_steps // 10) == 0 or state.global_step == state.max_steps:
            self._console.print(f"step {state.global_step} of {state.max_steps}: {note}")
