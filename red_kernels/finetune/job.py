"""The main job: train edits on a base model, evaluate them, save them, and verify that they load."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import set_seed

from ..backends import choose
from ..checkpoints.card import write_model_card
from ..checkpoints.checkpoint import saved_config
from ..edits.config import RedConfig
from ..edits.find import edit_modules, edit_parameters
from ..integrations.trainer import head_parameters, load_trained
from ..merging.merge import reason_against
from ..patching.naive import naive_edit
from ..patching.patch import edit_config, patch
from ..patching.report import PatchReport
from ..support.base_models import BaseModel, load_base
from ..support.output_folder import check_output
from ..support.parse import shown
from ..support.progress import duration
from ..support.require import require
from . import report
from .base_dtype import AUTO, DTYPES, resolve_dtype
from .data import Loaded, label_numbers, load_data
from .data.chat import ANSWERS
from .head import train_head
from .job_data import JobData, tokenised
from .measure import (
    QUIET,
    HeldOut,
    PeakMemory,
    Speed,
    compare_speed,
    first_look,
    pass_gradients,
    real_tokens,
    training_step,
)
from .parallel import lay_in_parts, split_weights
from .processes import Processes, join
from .resume import check_checkpoint
from .run_folder import RunFolder, former_settings, open_run
from .settings import HELD_OUT, Settings, chat_template, write_config
from .train import best_step, end_diverged, losses, save, train, watched
from .unused import check_template
from .watching import Sampler

__all__ = ["Settings", "finetune"]

FUSED, EAGER, FROZEN = "fused edit", "eager edit", "frozen, no edit"


def finetune(settings: Settings, console: Console) -> dict[str, Any] | None:
    """Run the job.

    Args:
        settings: see `Settings`.
        console: for the output.

    Returns:
        The results as in `run.json`, or None if the run was interrupted (its edits and a checkpoint are saved).

    Raises:
        ValueError: a setting, the data or the model does not fit; raised before any training.
        RuntimeError: RED_KERNELS_BACKEND names a missing backend.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: a package is missing; the message contains the pip command.
    """
    settings = settings.filled()
    config = RedConfig(position=settings.position, kind=settings.kind, layers=settings.layers, sites=settings.sites)
    processes = join(settings.place, tp=settings.tp, fsdp=settings.fsdp)
    device = processes.device
    if not processes.first:
        console = Console(quiet=True)
    _check_shares(settings, processes)
    choose(torch.empty(1, device=device), "edit")  # a missing backend is an error now
    # Data and model take minutes to load, so faults of the output are reported first.
    settings, run = processes.first_decides(lambda: _open(settings, device, console))
    run.writes = processes.first
    if processes.count > 1:
        console.print(_said_of(processes, settings.batch_size // processes.shares))
    names = ", ".join(settings.data or ())
    console.print(f"Loading the data: {names}", markup=False, highlight=False, soft_wrap=True)
    loaded = _load_data(settings)
    for sentence in loaded.said:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    labels = label_numbers([*loaded.train, *loaded.held_out]) if settings.task == "classification" else None
    _check_same_data(names, run, loaded.digest)
    _check_same_template(settings, run)

    set_seed(settings.seed)  # a new head is drawn during loading
    console.print(f"Loading the model: {settings.model}", markup=False, highlight=False, soft_wrap=True)
    base = _load(settings, labels, processes)
    data = tokenised(settings, base, loaded, labels, console)
    steps = _total_steps(settings, run, len(data.train))
    _say_what_fills_no_batch(settings, steps, len(data.train), console)
    if settings.warmup >= steps:
        said = f"its warm-up takes {settings.warmup:g} steps, the run {steps}."
        console.print(f"Note: the rate never reaches {settings.learning_rate:g}: {said}", highlight=False)
    patched = _edited(settings, base, config, processes)
    console.print(str(replace(patched, frozen_head=())), highlight=False)  # the head will not stay frozen
    if not processes.in_parts:  # otherwise it would count the parts, which are not merged
        _say_what_merges(base.model, config.kind, console)
    run.begin()
    if processes.first:
        write_config(settings, run.config)
    trained = _show_parameters(base.model, console)

    before = _measure_before(run, base.model, data, processes, console)
    report.held_out_table(console, {"before": before})
    sampler = Sampler(base.model, base.tokenizer, settings.sample, console)
    sampler.samples = [own for own in run.results.get("samples", ()) if own["step"] <= run.step]
    if run.checkpoint is None:
        sampler.show(0, "before")
    _say_how_long(settings, steps, base.model, data, run, processes, console)
    memory = PeakMemory(device)
    trainer, stopped = train(settings, steps, run, base, data, sampler, processes, console)
    peak = memory.bytes()
    reached = trainer.state.global_step
    if trainer.diverged is not None:
        end_diverged(trainer, run, processes)
    save(base.model, run, processes)
    curve = losses(trainer)
    if stopped:
        run.write("interrupted", steps=reached, **watched(trainer, sampler))
        console.print(
            f"Stopped after step {reached} of {steps}. The edits of this step are in {run.edits}; "
            f"red-kernels finetune --output {run.path} --resume continues.",
            soft_wrap=True,
        )
        return None
    if reached < steps:
        console.print(
            f"Stopped after step {reached} of {steps}: {report.plural(settings.patience or 0, 'evaluation')} brought "
            "no lower loss."
        )

    after = data.held_out_loss(base.model, console, processes)
    evaluated = {step: found.loss for step, found in trainer.measured.items()}
    best = best_step(trainer)
    if processes.first:
        points = {0: before.loss, **evaluated, best or reached: after.loss}
        report.draw_loss_curve(run.curve, *curve, dict(sorted(points.items())))
    if best is not None and best != reached:
        console.print(f"The edits are those of step {best}, whose held-out loss is the lowest.")
    if not evaluated:
        sampler.show(reached, "after")

    def reload() -> tuple[HeldOut, dict[str, Speed]]:
        return _reload_and_compare(settings, run, base, data, labels, processes, console)

    reloaded, speeds = reload() if processes.in_parts else processes.first_decides(reload)

    report.held_out_table(console, {"before": before, "after": after, "after, reloaded into a fresh model": reloaded})
    _show_change(before, after, console)
    if speeds:
        report.speed_table(console, speeds, FUSED)
    own = run.edits.glob("red_*.safetensors")  # PEFT's form next to them has the same content
    saved = sum(path.stat().st_size for path in own) if processes.first else 0
    if processes.first:
        _write_card(settings, run, names, before, after)
    if peak is not None:
        since = " (loading included)" if memory.since_start else " while training"
        where = "GPU memory" if device.type == "cuda" else "memory of the process"
        console.print(f"Peak {where}{since}: {report.size(peak)}")
    console.print(f"Edits: {run.edits} ({report.size(saved)}); loss curve: {run.curve}")
    run.write(
        "finished",
        steps=reached,
        best_step=best,
        **watched(trainer, sampler),
        trainable_parameters=trained,
        after=asdict(after),
        reloaded=asdict(reloaded),
        tokens_per_second={name: list(speed.samples) for name, speed in speeds.items()},
        peak_memory_bytes=peak,
        saved_bytes=saved,
    )
    # Equal numbers go through equal code, so the losses are equal. If a library chooses another algorithm the second
    # time, they are within a rounding step of the activations.
    if not _same_loss(reloaded.loss, after.loss, torch.finfo(DTYPES[settings.dtype]).eps):
        raise RuntimeError(
            f"the edits in {run.edits} have a held-out loss of {reloaded.loss} in a fresh model, but {after.loss} in "
            "the trained one: saving or loading them failed"
        )
    return run.results


def _open(settings: Settings, device: torch.device, console: Console) -> tuple[Settings, RunFolder]:
    """The settings with the base model's dtype instead of `auto`, which is printed, and the output folder."""
    path = Path(settings.output)
    check_output(settings.output, "--output")
    kept = None
    if settings.resume and not settings.overwrite and settings.dtype == AUTO:
        kept = former_settings(path).get("dtype")
        if not isinstance(kept, str) or kept not in DTYPES:
            raise ValueError(f"--resume: the run in {str(path)!r} is damaged: its dtype is {shown(kept)}")
    dtype = resolve_dtype(settings.dtype, device, kept)
    settings = replace(settings, dtype=dtype.name)
    run = open_run(path, settings)
    run.results.setdefault("base_dtype", dtype.json())  # the dtype at the run's start
    console.print(f"Base model's dtype: {dtype.name} ({dtype.reason})", markup=False, highlight=False, soft_wrap=True)
    if dtype.warning is not None:
        console.print(f"Warning: {dtype.warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if run.checkpoint is not None:
        check_checkpoint(run.checkpoint)
    return settings, run


def _check_shares(settings: Settings, processes: Processes) -> None:
    if settings.batch_size % processes.shares:
        raise ValueError(
            f"batch_size: got {settings.batch_size}, expected a multiple of {processes.shares}, the number of "
            f"{'processes' if processes.tp == 1 else 'groups of processes'} that share a batch"
        )


def _said_of(processes: Processes, each: int) -> str:
    """How the processes share the work, for the user."""
    said = f"{processes.count} processes, each with {each} of a batch"
    if processes.tp > 1:
        said += f"; the model's weights are split over each {processes.tp}"
    return said + ("; the model is sharded over all of them" if processes.fsdp else "")


def _same_loss(one: float, other: float, rounding: float) -> bool:
    """Whether two losses are equal up to rounding; after a diverged training both must be the same NaN."""
    if not math.isfinite(other):
        return one == other or (math.isnan(one) and math.isnan(other))
    return abs(one - other) <= rounding * abs(other)  # false for NaN


def _load(settings: Settings, labels: dict[str, int] | None, processes: Processes, tokenizer: Any = None) -> BaseModel:
    names = list(labels) if labels is not None else None
    # A model that will be split may be too large for one device.
    place = torch.device("cpu") if processes.tp > 1 else processes.device
    base = load_base(str(settings.model), settings.task, DTYPES[settings.dtype], place, names, tokenizer)
    longest = getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and settings.length > longest:
        raise ValueError(f"length: got {settings.length}, the model takes at most {longest} tokens")
    if settings.template is not None:
        base.tokenizer.chat_template = chat_template(settings.template)
    base.model.config.use_cache = False  # training has no use for a cache, and Trainer would warn
    if processes.tp > 1:
        split_weights(base.model, processes)
    return base


def _edited(settings: Settings, base: BaseModel, config: RedConfig, processes: Processes) -> PatchReport:
    """Patch a model, make its head trainable if it has one, and shard it if requested."""
    report = patch(base.model, config)
    if settings.task != "causal-lm":
        train_head(base.model, base.new_parameters)
    if processes.fsdp:
        lay_in_parts(base.model, processes)
    return report


def _say_what_merges(model: nn.Module, kind: str, console: Console) -> None:
    """Report before the training if its edits will not merge, so that users can choose another kind."""
    reason = reason_against(model)
    if not reason:
        return
    advice = "use them unmerged"
    if kind != "scaling" and "'scaling'" in reason:
        advice += ", or train --kind scaling, which can be merged"
    console.print(f"Note: red-kernels merge will refuse these edits: {reason}; {advice}.", highlight=False)


def _show_parameters(model: nn.Module, console: Console) -> int:
    groups: dict[str, tuple[int, int]] = {}
    for parts in edit_parameters(model).values():
        for part, own in parts.items():
            tensors, count = groups.get(part, (0, 0))
            groups[part] = (tensors + 1, count + own.numel())
    head = head_parameters(model)
    if head:
        groups["head"] = (len(head), sum(own.numel() for own in head.values()))
    edits = sum(count for name, (_, count) in groups.items() if name != "head")
    total = sum(own.numel() for own in model.parameters()) - edits  # the base model's nominal size
    report.parameter_table(console, groups, total)
    return sum(count for _, count in groups.values())


def _measure_before(run: RunFolder, model: nn.Module, data: JobData, processes: Processes, console: Console) -> HeldOut:
    if "before" in run.results:  # a resumed run has measured it already
        return HeldOut.of(run.results["before"])
    before = data.held_out_loss(model, console, processes)
    run.write("running", before=asdict(before))
    return before


def _load_data(settings: Settings) -> Loaded:
    loaded = load_data(
        settings.data or (),
        settings.columns,
        settings.task,
        subset=settings.subset,
        validation=settings.validation,
        held_out=settings.held_out or HELD_OUT,
    )
    check_template(settings.template, [*loaded.train, *loaded.held_out], settings.sample)
    if loaded.form == "preference":
        require("trl", "training on preferences", "red-kernels[train]")
        if settings.loss_on != ANSWERS:
            raise ValueError(
                f"loss_on: got {settings.loss_on!r}, expected the default: preferences have their loss on the answers"
            )
        for name in ("fsdp", "tp"):
            if getattr(settings, name) != getattr(Settings, name):
                raise ValueError(f"{name}: preferences need a whole model in each process")
    if settings.packing and loaded.form not in ("chat", "completion"):
        raise ValueError(f"packing: needs conversations or completions, but the data's form is {loaded.form!r}")
    return loaded


def _write_card(settings: Settings, run: RunFolder, names: str, before: HeldOut, after: HeldOut) -> None:
    then, now = before.numbers(), after.numbers()
    told = (
        "task",
        "learning_rate",
        "schedule",
        "warmup",
        "steps",
        "epochs",
        "batch_size",
        "accumulate",
        "length",
        "seed",
    )
    values = {name.replace("_", " "): getattr(settings, name) for name in (*told, "length", "seed")}
    write_model_card(
        run.edits,
        data=names,
        figures={f"held-out {name}": (then.get(name), now[name]) for name in now},
        settings={name: value for name, value in values.items() if value is not None},
    )


def _check_same_data(names: str, run: RunFolder, found: str) -> None:
    """Raises ValueError if a resumed run's data has changed; records the data of a new run."""
    before = run.results.setdefault("data_digest", found)
    if before != found:
        raise ValueError(
            f"--resume: the data {names!r} differs from the start of the run in {str(run.path)!r}: its texts have "
            f"changed (SHA-256 {found[:12]}..., was {str(before)[:12]}...); restore it, or start over by --overwrite"
        )


def _check_same_template(settings: Settings, run: RunFolder) -> None:
    """Raises ValueError if the chat template file of a resumed run has changed."""
    text = chat_template(settings.template)
    if text is None:
        return
    found = hashlib.sha256(text.encode()).hexdigest()
    if run.results.setdefault("template_digest", found) != found:
        raise ValueError(
            f"--resume: the template {settings.template!r} differs from the start of the run in {str(run.path)!r}; "
            "restore it, or start over by --overwrite"
        )


def _total_steps(settings: Settings, run: RunFolder, items: int) -> int:
    """The optimizer steps of the whole run. Raises ValueError if a resumed run has done more, or all of them."""
    steps = settings.total_steps(items)
    finished = run.state == "finished"
    done = run.results.get("steps", 0) if finished else run.step
    if done > steps or (finished and done == steps):
        raise ValueError(
            f"--resume: the run in {str(run.path)!r} has done {done} steps already, and {steps} were requested"
        )
    return steps


def _say_what_fills_no_batch(settings: Settings, steps: int, items: int, console: Console) -> None:
    """Report how much of the data each pass skips, if there is a whole pass."""
    batches, left = divmod(items, settings.batch_size)
    if left and settings.drops_last(items) and steps * settings.accumulate >= batches:
        what = "item, another one" if left == 1 else f"{left:,} items, others"
        console.print(
            f"Each pass over the data leaves out {'an ' if left == 1 else ''}{what} each time: batches are of "
            f"{settings.batch_size:,}, and there are {items:,} items.",
            highlight=False,
            soft_wrap=True,
        )


def _say_how_long(
    settings: Settings,
    steps: int,
    model: nn.Module,
    data: JobData,
    run: RunFolder,
    processes: Processes,
    console: Console,
) -> None:
    """Estimate the time of the training from a trial of a few tokens, if a step takes seconds."""
    if data.pairs is not None:
        return  # a step of DPO does other work than the trial
    tokens = settings.accumulate * real_tokens(data.first_batch(torch.device("cpu"))) // processes.shares
    step = first_look(model, data.collate([data.train[0]]), tokens)
    left = steps - run.step
    if step > QUIET:
        console.print(
            f"A look at a few tokens: a step of {tokens:,} tokens will take about {duration(step)}, the training "
            f"{duration(left * step)}",
            highlight=False,
            soft_wrap=True,
        )


def _reload_and_compare(
    settings: Settings,
    run: RunFolder,
    base: BaseModel,
    data: JobData,
    labels: dict[str, int] | None,
    processes: Processes,
    console: Console,
) -> tuple[HeldOut, dict[str, Speed]]:
    """Load a fresh base model: first as the peer with eager edits, then for the saved edits."""
    # A sharded model has no frozen peer; and a step of DPO differs from the rest.
    compare = settings.compare and not processes.in_parts and data.pairs is None
    console.print("Loading a fresh model" + (", to compare training speeds" if compare else ""))
    fresh = _load(settings, labels, processes, base.tokenizer)
    speeds: dict[str, Speed] = {}
    if compare:
        speeds = _compare(base.model, fresh, data, processes.device, console)
    _edited(settings, fresh, saved_config(run.edits), processes)
    load_trained(fresh.model, run.edits)
    return data.held_out_loss(fresh.model, console), speeds


def _compare(
    fused: nn.Module, fresh: BaseModel, data: JobData, device: torch.device, console: Console
) -> dict[str, Speed]:
    batch = data.first_batch(device)
    sites = list(edit_modules(fused))
    head = list(head_parameters(fused).values())
    vectors = [vector for parts in edit_parameters(fused).values() for vector in parts.values()]
    # An edit inside a layer's forward is not of a module's output, and one may read another layer's input. No hook can
    # be its peer, so only the floor is measured.
    kind = edit_config(fused).edit_kind
    inside = any(own.inside for own in edit_modules(fused).values()) or "initial" in kind.context
    widths = {site: own.width for site, own in edit_modules(fused).items()}
    inputs = [site for site, own in edit_modules(fused).items() if own.on_input]
    with naive_edit(fresh.model, sites, "bias" if inside else kind.name, widths=widths, inputs=inputs) as naive:
        fresh_head = train_head(fresh.model, fresh.new_parameters) if data.labelled else []
        passing = pass_gradients(fresh.model, sites)

        def use(edited: bool) -> None:
            naive.active = edited

        steps = {
            FUSED: training_step(fused, batch, vectors + head, lambda: None),
            EAGER: training_step(fresh.model, batch, naive.vectors() + fresh_head, lambda: use(True)),
            FROZEN: training_step(fresh.model, batch, fresh_head, lambda: use(False)),
        }
        if inside:
            del steps[EAGER]
        speeds = compare_speed(steps, device, console=console)
        for handle in passing:
            handle.remove()
    return speeds


def _show_change(before: HeldOut, after: HeldOut, console: Console) -> None:
    if not math.isfinite(before.loss):
        console.print("The base model's own held-out loss is not finite: check its weights and its dtype.")
    elif not math.isfinite(after.loss):
        console.print("The training diverged: the held-out loss is not finite. Try a smaller --learning-rate.")
    elif before.pearson is not None:
        console.print(f"Held-out correlation: {before.pearson:.4f} to {after.pearson:.4f}")
    elif before.accuracy is None:
        change = 1 - after.perplexity / before.perplexity
        word = "fell" if change >= 0 else "rose"
        console.print(
            f"Held-out perplexity {word} by {abs(change):.1%}: {before.perplexity:.2f} to {after.perplexity:.2f}"
        )
    else:
        console.print(f"Held-out accuracy: {before.accuracy:.2%} to {after.accuracy:.2%}")
