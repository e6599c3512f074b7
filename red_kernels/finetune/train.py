"""The training of a job by transformers' Trainer, and its end."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

from rich.console import Console
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..integrations.trainer import StopOnSignal, checkpoints, load_trained, save_trained
from ..support.base_models import BaseModel
from .job_data import JobData
from .measure import HeldOut
from .preferences import BETA
from .processes import FirstFailed, Processes
from .progress import ShowProgress
from .run_folder import RunFolder
from .settings import Settings
from .trl_trainers import CHECKPOINTING, dpo_trainer
from .watching import Diverged, JobTrainer, Sampler

__all__ = ["best_step", "end_diverged", "losses", "save", "train", "watched"]


def train(
    settings: Settings,
    steps: int,
    run: RunFolder,
    base: BaseModel,
    data: JobData,
    sampler: Sampler,
    processes: Processes,
    console: Console,
) -> tuple[JobTrainer, bool]:
    """Train up to this many optimizer steps, from the run's checkpoint if it has one.

    Returns:
        The trainer, and whether a signal has stopped it before the last step.
    """
    arguments: dict[str, Any] = {
        "output_dir": str(run.path),
        "max_steps": steps,
        "per_device_train_batch_size": settings.batch_size // processes.shares,
        "gradient_accumulation_steps": settings.accumulate,
        **({CHECKPOINTING: True} if settings.checkpointing else {}),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        "warmup_steps": settings.warmup,
        "max_grad_norm": settings.clip,
        "parallelism_config": processes.parallelism,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": settings.checkpoints_every,
        "save_total_limit": 2,
        "eval_strategy": "no" if settings.eval_every is None else "steps",
        "eval_steps": settings.eval_every,
        "load_best_model_at_end": settings.eval_every is not None,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "seed": settings.seed,
        "use_cpu": settings.place.type == "cpu",
        "report_to": list(settings.report_to) or "none",
        "run_name": run.path.name,
        "disable_tqdm": True,
        "include_num_input_tokens_seen": "non_padding" if data.padded else "all",
        "remove_unused_columns": False,
        "dataloader_pin_memory": settings.place.type != "cpu",
        "dataloader_drop_last": settings.drops_last(len(data.train)),
    }
    progress = ShowProgress(console)
    stop = StopOnSignal(
        lambda: console.print("Stopping after this step; a second Ctrl-C stops at once, without saving."), processes.any
    )
    patience = None if settings.patience is None else EarlyStoppingCallback(settings.patience)
    measured = {int(step): HeldOut.of(said) for step, said in run.results.get("evaluated", {}).items()}
    watching: dict[str, Any] = {
        "callbacks": [progress, stop, *([patience] if patience else []), *([sampler] if settings.sample else [])],
        "measure": lambda model: data.held_out_loss(model, console, processes),
        "processes": processes,
    }
    trainer: JobTrainer
    if data.pairs is not None:
        more = {**arguments, "beta": BETA, "include_num_input_tokens_seen": "no"}
        train_on, held_out = data.pairs
        trainer = dpo_trainer(
            base.model, base.tokenizer, train_on, more, held_out=held_out, base=JobTrainer, **watching
        )
    else:
        trainer = JobTrainer(
            model=base.model,
            args=TrainingArguments(**arguments),
            train_dataset=data.train,
            eval_dataset=data.held_out,
            data_collator=data.collate,
            **watching,
        )
    trainer.remove_callback(PrinterCallback)
    trainer.measured = {step: found for step, found in measured.items() if step <= run.step}
    trainer.add_callback(_Record(run, trainer, sampler))
    if run.checkpoint is not None:
        console.print(f"Resuming from {run.checkpoint}")
    try:
        with stop.installed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            # TRL uses former names of transformers.
            warnings.filterwarnings(
                "ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning
            )
            # A finished run that continues was requested: earlier evaluations without gain do not count.
            trainer.train_on(run.checkpoint, None if run.state == "finished" else patience)
    finally:
        progress.close()
    return trainer, processes.any(stop.signalled)


class _Record(TrainerCallback):
    """Writes the results after each evaluation, so that a killed run still has them.

    It also applies the present intervals of evaluations and checkpoints to a resumed run: Trainer keeps the
    checkpoint's.
    """

    def __init__(self, run: RunFolder, trainer: JobTrainer, sampler: Sampler) -> None:
        self._run, self._trainer, self._sampler = run, trainer, sampler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._run.write("running", **watched(self._trainer, self._sampler))


def watched(trainer: JobTrainer, sampler: Sampler) -> dict[str, Any]:
    """The evaluations and samples for `run.json`."""
    evaluated = {str(step): asdict(found) for step, found in sorted(trainer.measured.items())}
    return {"evaluated": evaluated, "samples": sampler.samples}


def save(model: nn.Module, run: RunFolder, processes: Processes) -> None:
    """Save the trained tensors into the run's folder: by one process, or by those that each have a part.

    It returns in all processes after the write.
    """
    if processes.in_first_copy:
        save_trained(model, run.edits)
    processes.gather(None)


def end_diverged(trainer: JobTrainer, run: RunFolder, processes: Processes) -> None:
    """Keep the newest checkpoint's edits, if there is one; raise Diverged, or FirstFailed in the other processes."""
    step = trainer.diverged
    assert step is not None
    good = checkpoints(run.path)
    run.write("interrupted", steps=step, diverged=step)
    left = "no checkpoint was written before"
    if good:
        load_trained(trainer._inner_model(), good[-1])
        save(trainer._inner_model(), run, processes)
        left = f"{run.edits} holds the edits of the last good checkpoint, {good[-1].name}"
    if not run.writes:
        raise FirstFailed(f"the training diverged at step {step}")
    raise Diverged(
        f"the training diverged: at step {step} the loss, or a trained value, is not finite; {left}. Try a smaller "
        "--learning-rate, some --warmup or a smaller --clip",
        step,
    )


def best_step(trainer: JobTrainer) -> int | None:
    """The step of the resulting edits, if evaluations chose it."""
    return trainer.state.best_global_step if trainer.args.load_best_model_at_end else None


def losses(trainer: JobTrainer) -> tuple[list[int], list[float]]:
    """The steps with a logged training loss, and the losses."""
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return [int(step) for step, _ in logged], [float(loss) for _, loss in logged]
