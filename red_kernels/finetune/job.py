"""The main job: train edits on a base model, show what they bring, save them and prove that they load back."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, TrainingArguments, default_data_collator, set_seed
from transformers.trainer_callback import PrinterCallback

from ..backends import choose
from ..checkpoints.checkpoint import saved_config
from ..edits.config import RedConfig
from ..edits.find import edit_modules, edit_parameters
from ..integrations.trainer import RedTrainer, StopOnSignal, head_parameters, load_trained, save_trained
from ..merging.merge import reason_against
from ..patching.naive import naive_edit
from ..patching.patch import edit_config, patch
from ..support.base_models import DEFAULT_MODEL, TASKS, BaseModel, load_base
from ..support.output_folder import check_output
from ..support.parse import shown
from ..support.progress import Stage, duration
from . import report
from .base_dtype import ASKED, AUTO, DTYPES, resolve_dtype
from .data import (
    PYTHON_TOPICS,
    Columns,
    LabelledTexts,
    Split,
    TokenBlocks,
    check_held_out,
    label_numbers,
    load_documents,
    split_documents,
)
from .head import train_head
from .measure import (
    QUIET,
    HeldOut,
    PeakMemory,
    Speed,
    compare_speed,
    first_look,
    held_out_loss,
    pass_gradients,
    real_tokens,
    training_step,
)
from .progress import ShowProgress
from .resume import ResumingTrainer, check_checkpoint
from .run_folder import RunFolder, former_setting, open_run

__all__ = ["Settings", "finetune"]

FUSED, EAGER, FROZEN = "fused edit", "eager edit", "frozen, no edit"


@dataclass(frozen=True)
class Settings:
    """All settings of a job; None stands for the task's default.

    Attributes:
        model: a packaged model's name, a folder, a `.gguf` file or a hub id.
        data: `python-topics`, a `.txt`, `.csv`, `.tsv`, `.jsonl` or `.parquet` file, or a hub id.
        subset: the configuration of a hub dataset.
        columns: where a table holds its texts and labels.
        task: `"causal-lm"` or `"classification"`.
        learning_rate: of AdamW, without weight decay.
        schedule: `"constant"`, `"linear"` or `"cosine"`.
        steps: optimizer steps.
        batch_size: texts or blocks in a step.
        length: tokens in a block, and the most in a text to classify.
        dtype: of the base model: `"fp32"`, `"bf16"`, or `"auto"`, which is bf16 where the device multiplies it natively
            and else fp32; a resumed run keeps its own. The vectors are fp32 in any case.
        position, kind, layers, sites: as in `RedConfig`.
        seed: of the order of the data, of dropout and of a new head.
        held_out: the fraction of the data to hold out.
        save_every: steps between checkpoints.
        device: `"cpu"`, `"cuda"`, or None for a GPU if there is one.
        output: the folder for everything the job writes.
        compare: measure the speed beside the eager edit and the frozen model.
        resume, overwrite: what to do with a run that the output folder already holds.
    """

    task: str = "causal-lm"
    model: str | None = None
    data: str | None = None
    subset: str | None = None
    columns: Columns = field(default_factory=Columns)
    learning_rate: float = 1e-2
    schedule: str = "constant"
    steps: int = 30
    batch_size: int = 4
    length: int = 256
    dtype: str = AUTO
    position: str = "ffn"
    kind: str = "all"
    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] | None = None
    seed: int = 0
    held_out: float = 0.1
    save_every: int = 10
    device: str | None = None
    output: str = "red-finetune"
    compare: bool = True
    resume: bool = False
    overwrite: bool = False

    def filled(self) -> Settings:
        """The same with the task's defaults in place of None.

        Raises:
            ValueError: a value out of range, or data missing for a task that has no default data.
        """
        if self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}, expected one of {', '.join(map(repr, TASKS))}")
        for name, least in (("steps", 1), ("batch_size", 1), ("save_every", 1), ("length", 2)):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name}: got {value}, expected a whole number from {least} on")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: got {self.learning_rate}, expected a number above 0")
        check_held_out(self.held_out)
        data = self.data or (PYTHON_TOPICS if self.task == "causal-lm" else None)
        if data is None:
            raise ValueError("data: classification needs a table of texts and labels (--data FILE)")
        if self.device is not None and self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device: got {self.device!r}, expected 'cpu' or 'cuda'")
        if self.device is not None and self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device: got {self.device!r}, but torch sees no CUDA device")
        if self.dtype not in ASKED:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(map(repr, ASKED))}")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        values = {**self.__dict__, "data": data, "device": device}
        return Settings(**{**values, "model": self.model or DEFAULT_MODEL[self.task]})

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the course of the training, which a resumed run must share."""
        without = {"output", "compare", "resume", "overwrite", "device", "save_every"}
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass(frozen=True)
class _Data:
    """The datasets of a job, and how to batch them."""

    train: Any
    held_out: Any
    collate: Any
    classification: bool
    batch_size: int

    def held_out_loss(self, model: nn.Module, console: Console) -> HeldOut:
        batches = DataLoader(self.held_out, batch_size=self.batch_size, collate_fn=self.collate)
        with Stage(console, "held-out loss", len(batches), unit="batch", after=QUIET) as stage:
            return held_out_loss(model, batches, self.classification, stage)

    def first_batch(self, device: torch.device) -> dict[str, torch.Tensor]:
        items = [self.train[index % len(self.train)] for index in range(self.batch_size)]
        return {name: value.to(device) for name, value in self.collate(items).items()}


def finetune(settings: Settings, console: Console) -> dict[str, Any] | None:
    """Run the job.

    Args:
        settings: see `Settings`.
        console: where everything is shown.

    Returns:
        The results as in `run.json`, or None if the run was interrupted (its edits and a checkpoint are saved).

    Raises:
        ValueError: a setting, the data or the model does not fit; said before anything is trained.
        RuntimeError: RED_KERNELS_BACKEND asks for a backend that is missing.
        OSError: a file cannot be read or written.
        ModuleNotFoundError: a package is missing; the message holds the pip command.
    """
    settings = settings.filled()
    config = RedConfig(position=settings.position, kind=settings.kind, layers=settings.layers, sites=settings.sites)
    classification = settings.task == "classification"
    device = torch.device(settings.device or "cpu")
    choose(torch.empty(1, device=device), "edit")  # a backend that is missing is said now
    # Data and model take minutes to load: what can go wrong with the output is said before.
    check_output(settings.output, "--output")
    settings, run = _open(settings, device, console)
    if run.checkpoint is not None:
        check_checkpoint(run.checkpoint)
    console.print(f"Loading the data: {settings.data}", markup=False, highlight=False, soft_wrap=True)
    documents = load_documents(str(settings.data), settings.columns, classification, settings.held_out, settings.subset)
    labels = label_numbers(documents) if classification else None
    split = split_documents(documents, settings.held_out)

    set_seed(settings.seed)  # a new head is drawn while loading
    console.print(f"Loading the model: {settings.model}", markup=False, highlight=False, soft_wrap=True)
    base = _load(settings, labels, device)
    data = _tokenise(settings, base, split, labels, console)
    patched = patch(base.model, config)
    console.print(str(replace(patched, frozen_head=())), highlight=False)  # the head is not to stay frozen
    _say_what_merges(base.model, config.kind, console)
    if classification:
        train_head(base.model, base.new_parameters)
    run.begin()
    trained = _show_parameters(base.model, console)

    before = _measure_before(run, base.model, data, console)
    report.held_out_table(console, {"before": before})
    _say_how_long(settings, base.model, data, run, console)
    memory = PeakMemory(device)
    trainer, stopped = _train(settings, run, base, data, console)
    peak = memory.bytes()
    save_trained(base.model, run.edits)
    curve = _losses(trainer)
    if stopped:
        run.write("interrupted", steps=trainer.state.global_step)
        console.print(
            f"Stopped after step {trainer.state.global_step} of {settings.steps}. The edits so far are in {run.edits}; "
            "the same command with --resume goes on."
        )
        return None

    after = data.held_out_loss(base.model, console)
    report.draw_loss_curve(run.curve, *curve, {0: before.loss, settings.steps: after.loss})
    reloaded, speeds = _reload_and_compare(settings, run, base, data, labels, device, console)

    report.held_out_table(console, {"before": before, "after": after, "after, reloaded into a fresh model": reloaded})
    _show_change(before, after, console)
    if speeds:
        report.speed_table(console, speeds, FUSED)
    saved = sum(path.stat().st_size for path in run.edits.iterdir())
    if peak is not None:
        since = " (loading included)" if memory.since_start else " while training"
        where = "GPU memory" if device.type == "cuda" else "memory of the process"
        console.print(f"Peak {where}{since}: {report.size(peak)}")
    console.print(f"Edits: {run.edits} ({report.size(saved)}); loss curve: {run.curve}")
    run.write(
        "finished",
        steps=trainer.state.global_step,
        trainable_parameters=trained,
        after=asdict(after),
        reloaded=asdict(reloaded),
        tokens_per_second={name: list(speed.samples) for name, speed in speeds.items()},
        peak_memory_bytes=peak,
        saved_bytes=saved,
    )
    # The same numbers go through the same code, so the losses are equal; where a library is free to choose another
    # algorithm the second time, they are within a rounding step of the activations.
    if not _same_loss(reloaded.loss, after.loss, torch.finfo(DTYPES[settings.dtype]).eps):
        raise RuntimeError(
            f"the edits in {run.edits} give a held-out loss of {reloaded.loss} in a fresh model, {after.loss} in the "
            "trained one: they were not saved or loaded right"
        )
    return run.results


def _open(settings: Settings, device: torch.device, console: Console) -> tuple[Settings, RunFolder]:
    """The settings with the dtype of the base model in place of `auto`, which is printed, and the output folder."""
    path = Path(settings.output)
    kept = None
    if settings.resume and not settings.overwrite and settings.dtype == AUTO:
        kept = former_setting(path, "dtype")
        if not isinstance(kept, str) or kept not in DTYPES:
            raise ValueError(f"--resume: the run in {str(path)!r} is damaged: its dtype is {shown(kept)}")
    dtype = resolve_dtype(settings.dtype, device, kept)
    settings = replace(settings, dtype=dtype.name)
    run = open_run(path, settings.deciding(), settings.resume, settings.overwrite)
    run.results.setdefault("base_dtype", dtype.json())  # that of the run's beginning
    console.print(f"Base model's dtype: {dtype.name} ({dtype.reason})", markup=False, highlight=False, soft_wrap=True)
    if dtype.warning is not None:
        console.print(f"Warning: {dtype.warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return settings, run


def _same_loss(one: float, other: float, rounding: float) -> bool:
    """Whether two losses are equal to a rounding; after a training that diverged both have to be the same NaN."""
    if not math.isfinite(other):
        return one == other or (math.isnan(one) and math.isnan(other))
    return abs(one - other) <= rounding * abs(other)  # which NaN is not


def _load(settings: Settings, labels: dict[str, int] | None, device: torch.device, tokenizer: Any = None) -> BaseModel:
    names = list(labels) if labels is not None else None
    base = load_base(str(settings.model), settings.task, DTYPES[settings.dtype], device, names, tokenizer)
    longest = getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and settings.length > longest:
        raise ValueError(f"length: got {settings.length}, the model takes at most {longest} tokens")
    base.model.config.use_cache = False  # a cache is of no use in training, and Trainer would warn
    return base


def _tokenise(
    settings: Settings, base: BaseModel, split: Split, labels: dict[str, int] | None, console: Console
) -> _Data:
    train: Any
    held_out: Any
    collate: Any
    console.print("Tokenising the data")
    if labels is not None:
        train = LabelledTexts(split.train, labels, base.tokenizer, settings.length)
        held_out = LabelledTexts(split.held_out, labels, base.tokenizer, settings.length)
        cut = train.truncated + held_out.truncated
        console.print(
            f"{report.plural(len(train), 'text')} to train on, {len(held_out):,} held out, {len(labels)} labels"
            + (f"; {report.plural(cut, 'text')} cut to {settings.length} tokens" if cut else "")
        )
        _, most = Counter(document.label for document in split.held_out).most_common(1)[0]
        console.print(f"The most frequent label is that of {most / len(held_out):.1%} of the held-out texts")
        collate = DataCollatorWithPadding(base.tokenizer)
    else:
        count = len(split.train) + len(split.held_out)
        with Stage(console, "tokenising", count, unit="document", after=QUIET) as stage:
            train, held_out = (
                TokenBlocks(stage.over(document.text for document in part), base.tokenizer, settings.length)
                for part in (split.train, split.held_out)
            )
        console.print(
            f"{report.plural(len(split.train), 'document')} to train on ({train.tokens:,} tokens), "
            f"{len(split.held_out):,} held out ({held_out.tokens:,} tokens)"
        )
        collate = default_data_collator
    return _Data(train, held_out, collate, labels is not None, settings.batch_size)


def _say_what_merges(model: nn.Module, kind: str, console: Console) -> None:
    """Say before the training where its edits will not merge: who wants them merged trains another kind."""
    reason = reason_against(model)
    if not reason:
        return
    advice = "they can be used as they are, unmerged"
    if kind != "scaling" and "'scaling'" in reason:
        advice += "; edits of --kind scaling can be merged"
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
    total = sum(own.numel() for own in model.parameters()) - edits  # the base model's size, as it is known
    report.parameter_table(console, groups, total)
    return sum(count for _, count in groups.values())


def _measure_before(run: RunFolder, model: nn.Module, data: _Data, console: Console) -> HeldOut:
    if "before" in run.results:  # a resumed run has measured it already
        return HeldOut.of(run.results["before"])
    before = data.held_out_loss(model, console)
    run.write("running", before=asdict(before))
    return before


def _say_how_long(settings: Settings, model: nn.Module, data: _Data, run: RunFolder, console: Console) -> None:
    """Say about how long the training will take, from a look at a few tokens, where a step takes seconds."""
    tokens = real_tokens(data.first_batch(torch.device("cpu")))
    step = first_look(model, data.collate([data.train[0]]), tokens)
    left = settings.steps - (int(run.checkpoint.name.rpartition("-")[2]) if run.checkpoint else 0)
    if step > QUIET:
        console.print(
            f"A look at a few tokens: a step of {tokens:,} tokens will take about {duration(step)}, the training "
            f"{duration(left * step)}",
            highlight=False,
            soft_wrap=True,
        )


def _train(
    settings: Settings, run: RunFolder, base: BaseModel, data: _Data, console: Console
) -> tuple[RedTrainer, bool]:
    arguments = TrainingArguments(
        output_dir=str(run.path),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        weight_decay=0.0,  # it would pull the scales toward 0, not toward 1
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        report_to="none",
        disable_tqdm=True,
        include_num_input_tokens_seen="non_padding" if data.classification else "all",  # blocks have no padding
        remove_unused_columns=False,
        dataloader_pin_memory=settings.device != "cpu",
        dataloader_drop_last=len(data.train) >= settings.batch_size,
    )
    progress = ShowProgress(console)
    stop = StopOnSignal(lambda: console.print("Stopping after this step; once more stops at once, without saving."))
    trainer = ResumingTrainer(
        model=base.model,
        args=arguments,
        train_dataset=data.train,
        data_collator=data.collate,
        callbacks=[progress, stop],
    )
    trainer.remove_callback(PrinterCallback)
    if run.checkpoint is not None:
        console.print(f"Going on from {run.checkpoint}")
    try:
        with stop.installed(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            trainer.train_on(run.checkpoint)
    finally:
        progress.close()
    return trainer, stop.stopped and trainer.state.global_step < settings.steps


def _losses(trainer: RedTrainer) -> tuple[list[int], list[float]]:
    logged = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return [int(step) for step, _ in logged], [float(loss) for _, loss in logged]


def _reload_and_compare(
    settings: Settings,
    run: RunFolder,
    base: BaseModel,
    data: _Data,
    labels: dict[str, int] | None,
    device: torch.device,
    console: Console,
) -> tuple[HeldOut, dict[str, Speed]]:
    """Load the base model once more: first it is the peer whose edits are eager, then it takes the saved edits."""
    console.print("Loading the model once more" + (", to compare training speeds" if settings.compare else ""))
    fresh = _load(settings, labels, device, base.tokenizer)
    speeds: dict[str, Speed] = {}
    if settings.compare:
        speeds = _compare(base.model, fresh, data, device, console)
    patch(fresh.model, saved_config(run.edits))
    if labels is not None:
        train_head(fresh.model, fresh.new_parameters)
    load_trained(fresh.model, run.edits)
    return data.held_out_loss(fresh.model, console), speeds


def _compare(
    fused: nn.Module, fresh: BaseModel, data: _Data, device: torch.device, console: Console
) -> dict[str, Speed]:
    batch = data.first_batch(device)
    sites = list(edit_modules(fused))
    head = list(head_parameters(fused).values())
    vectors = [vector for parts in edit_parameters(fused).values() for vector in parts.values()]
    # An edit inside of a layer's forward is no module's output, and one may read another layer's input: no hook can be
    # its peer, and the floor alone stands.
    kind = edit_config(fused).edit_kind
    inside = any(own.inside for own in edit_modules(fused).values()) or "initial" in kind.context
    widths = {site: own.width for site, own in edit_modules(fused).items()}
    inputs = [site for site, own in edit_modules(fused).items() if own.on_input]
    with naive_edit(fresh.model, sites, "bias" if inside else kind.name, widths=widths, inputs=inputs) as naive:
        fresh_head = train_head(fresh.model, fresh.new_parameters) if data.classification else []
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
        console.print(
            "The base model's own held-out loss is not finite: its weights, or the dtype, are not fit for it."
        )
    elif not math.isfinite(after.loss):
        console.print("The training diverged: the held-out loss is not finite. Try a smaller --learning-rate.")
    elif before.accuracy is None:
        change = 1 - after.perplexity / before.perplexity
        word = "fell" if change >= 0 else "rose"
        console.print(
            f"Held-out perplexity {word} by {abs(change):.1%}: {before.perplexity:.2f} to {after.perplexity:.2f}"
        )
    else:
        console.print(f"Held-out accuracy: {before.accuracy:.2%} to {after.accuracy:.2%}")
