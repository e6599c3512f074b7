"""Checks while a job trains: the held-out loss, a loss that is not finite, and samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..support.sharded import local
from .measure import HeldOut
from .parallel import average_over_copies
from .processes import ALONE, Processes
from .resume import STATE, ResumingTrainer

__all__ = ["Diverged", "JobTrainer", "Sampler", "continued"]

NEW_TOKENS = 48


class Diverged(ValueError):
    """The loss, or a trained value, is not finite. `step` is the one at which it was found."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class JobTrainer(ResumingTrainer):
    """A ResumingTrainer that evaluates the held-out data by `measure`, and stops if the loss is not finite.

    Args:
        measure: from the model to its scores on the held-out data.
        processes: that train together.

    Attributes:
        diverged: the step whose loss, or whose vectors after it, are not finite; None if all are finite. Nothing of
            that step is saved: the newest checkpoint is the last good one.
        measured: step to the values measured after it.
    """

    def __init__(
        self, *args: Any, measure: Callable[[nn.Module], HeldOut], processes: Processes = ALONE, **kwargs: Any
    ) -> None:
        self._measure, self._processes = measure, processes
        self.diverged: int | None = None
        self.measured: dict[int, HeldOut] = {}
        super().__init__(*args, **kwargs)
        self.add_callback(_StopWhereNotFinite(self))
        if processes.in_parts:
            self.is_distributed_loading_by_transformers = True  # Trainer then wraps nothing, and loads nothing
            average_over_copies(self._inner_model(), processes, self.accelerator)

    def train_on(self, checkpoint: Path | None, patience: EarlyStoppingCallback | None = None) -> None:
        """Train, from a checkpoint if there is one; `patience` resumes its count."""
        if checkpoint is not None and patience is not None:
            state = TrainerState.load_from_json(str(checkpoint / STATE))
            kept = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
            patience.early_stopping_patience_counter = int(kept.get("early_stopping_patience_counter", 0))
            if patience.early_stopping_patience_counter >= patience.early_stopping_patience:
                self.take_up(checkpoint, state)
                return
        super().train_on(checkpoint)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Evaluate the held-out data; log the numbers and call the callbacks, like Trainer's own evaluation."""
        found = self._measure(self._inner_model())
        self.measured[self.state.global_step] = found
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.numbers().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `RedTrainer.save_model`; of several copies of a model over processes, the first is saved."""
        if self._processes.in_first_copy:
            super().save_model(output_dir, _internal_call)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self._processes.in_parts:  # otherwise it is there
            super()._move_model_to_device(model, device)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None or self._processes.tp == 1:
            return
        if len(list(Path(checkpoint).glob("rng_state*.pth"))) != self._processes.count:
            # Some process has found no state, and processes that share a model must draw the same.
            set_seed(self.args.seed + self.state.global_step)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)  # it counts them in each process
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self._processes.tp

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.diverged is None and self._processes.any(not _finite(self._inner_model())):
            self.diverged = self.state.global_step
            self.control.should_training_stop = True
        if self.diverged is None:
            super()._save_checkpoint(model, trial)


def _finite(model: nn.Module) -> bool:
    trained = [own for own in model.parameters() if own.requires_grad]
    return all(bool(local(own.detach()).isfinite().all()) for own in trained)


class _StopWhereNotFinite(TrainerCallback):
    def __init__(self, trainer: JobTrainer) -> None:
        self._trainer = trainer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        if logs and "loss" in logs and not math.isfinite(float(logs["loss"])) and self._trainer.diverged is None:
            self._trainer.diverged = state.global_step
        if self._trainer.diverged is not None:
            control.should_training_stop = True
            control.should_save = control.should_evaluate = False
        return control


@torch.no_grad()
def continued(
    model: Any,
    tokenizer: Any,
    prompt: str,
    new_tokens: int = NEW_TOKENS,
    chat: bool | None = None,
    temperature: float | None = None,
) -> str:
    """The most likely continuation of a prompt, token by token, in evaluation mode; the model's mode is restored.

    Args:
        model: a transformers model that generates.
        prompt: a text. With `chat` it is the user's message, in the model's chat template.
        new_tokens: the most new tokens.
        chat: None for a chat if the tokenizer has a template.
        temperature: sample the tokens, by torch's generator, instead of taking the most likely ones.

    Raises:
        ValueError: the prompt has no token.
    """
    how = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    if tokenizer.chat_template if chat is None else chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    device = next(model.parameters()).device
    given = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    if given["input_ids"].shape[1] == 0:
        raise ValueError(f"prompt: got {prompt!r}, for which the tokenizer gives no token")
    was_training = model.training
    model.eval()
    try:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        found = model.generate(**given, max_new_tokens=new_tokens, use_cache=True, pad_token_id=pad, **how)
    finally:
        model.train(was_training)
    return str(tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


class Sampler(TrainerCallback):
    """Shows the model's continuations of some prompts, at each evaluation or on request.

    Attributes:
        samples: the shown samples: `{"step", "prompt", "text"}` each.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[str], console: Console) -> None:
        self._model, self._tokenizer, self._prompts, self._console = model, tokenizer, prompts, console
        self.samples: list[dict[str, Any]] = []

    def show(self, step: int, when: str) -> None:
        """Show all prompts with their continuations."""
        for prompt in self._prompts:
            text = continued(self._model, self._tokenizer, prompt)
            self.samples.append({"step": step, "prompt": prompt, "text": text})
            self._console.print(
                f"Sample, {when}: {prompt!r} -> {text!r}", markup=False, highlight=False, soft_wrap=True
            )

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After each evaluation of the training."""
        self.show(state.global_step, f"step {state.global_step}")
