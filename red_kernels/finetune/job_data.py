"""The tokenised data of a job, and its batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, default_data_collator

from ..support.base_models import BaseModel
from ..support.progress import Stage
from ..support.sharded import is_sharded
from . import report
from .data import (
    LabelledTexts,
    Loaded,
    PackedCollator,
    TokenBlocks,
    chat_dataset,
    check_packing,
    packed,
    padded_collator,
    preference_dataset,
)
from .measure import QUIET, HeldOut, held_out_loss
from .preferences import Answers, preference_loss
from .processes import ALONE, Processes
from .settings import Settings

__all__ = ["JobData", "judged", "tokenised"]

_LABELLED, _ANSWERED = ("labelled", "scored"), ("chat", "completion")  # forms of data


@dataclass(frozen=True)
class JobData:
    """The datasets of a job, and their batching. `labelled`: whether a text has one label, or one score."""

    train: Any
    held_out: Any
    collate: Any
    labelled: bool
    padded: bool  # whether batches have padding, with a mask
    batch_size: int
    pairs: tuple[Any, Any] | None = None  # of preferences: training and held-out; `train` has the better answers

    def held_out_loss(self, model: nn.Module, console: Console, processes: Processes = ALONE) -> HeldOut:
        """The loss of a model on the held-out data, whose batches the processes share; a stage if it takes long."""
        count = len(self.held_out)
        groups = [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]
        # If parameters are sharded over all processes, each of them must run each batch.
        shared = not any(map(is_sharded, model.parameters()))
        own = groups[processes.rank :: processes.count] if shared else groups
        if self.pairs is not None:
            parts = [[self.pairs[1][place] for place in group] for group in own]
            with Stage(console, "held-out loss", len(parts), unit="batch", after=QUIET) as stage:
                return preference_loss(model, parts, self.collate, stage, processes.gather)
        batches = DataLoader(self.held_out, batch_sampler=list(map(list, own)), collate_fn=self.collate)
        gather = processes.gather if shared else ALONE.gather
        with Stage(console, "held-out loss", len(batches), unit="batch", after=QUIET) as stage:
            return held_out_loss(model, batches, self.labelled, stage, gather)

    def first_batch(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The first training items, as a batch."""
        items = [self.train[index % len(self.train)] for index in range(self.batch_size)]
        return {name: value.to(device) for name, value in self.collate(items).items()}


def tokenised(
    settings: Settings, base: BaseModel, loaded: Loaded, labels: dict[str, int] | None, console: Console
) -> JobData:
    """Tokenise the data, and report its size. `labels` are a classification's, label to number."""
    console.print("Tokenising the data")
    with Stage(console, "tokenising", len(loaded.train) + len(loaded.held_out), unit="document", after=QUIET) as stage:
        train, held_out = (
            _tokens(settings, base, loaded.form, part, labels, stage) for part in (loaded.train, loaded.held_out)
        )
    for sentence in _sizes(loaded, train, held_out, labels):
        console.print(sentence, markup=False, soft_wrap=True)
    for name, part in (("to train on", train), ("held out", held_out)):
        for sentence in left_out(part, settings.length):
            console.print(f"Of those {name}: {sentence}", markup=False, highlight=False, soft_wrap=True)
    return _batched(settings, base, loaded.form, train, held_out, console)


def judged(
    settings: Settings, base: BaseModel, loaded: Loaded, labels: dict[str, int] | None, console: Console
) -> JobData:
    """Tokenise the held-out data, and report its size: it is not trained on."""
    with Stage(console, "tokenising", len(loaded.held_out), unit="document", after=QUIET) as stage:
        part = _tokens(settings, base, loaded.form, loaded.held_out, labels, stage)
    for sentence in (f"{len(part):,} items", *left_out(part, settings.length)):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    return _batched(settings, base, loaded.form, part, part, console)


def left_out(part: Any, length: int) -> list[str]:
    """Sentences about cut or dropped examples of a tokenised part."""
    cut = getattr(part, "truncated", 0)
    return [*getattr(part, "said", ()), *([f"{report.plural(cut, 'text')} cut to {length} tokens."] if cut else ())]


def _tokens(
    settings: Settings, base: BaseModel, form: str, examples: Any, labels: dict[str, int] | None, stage: Stage
) -> Any:
    if form in _LABELLED:
        return LabelledTexts(examples, labels, base.tokenizer, settings.length)
    if form in _ANSWERED:
        return chat_dataset(examples, base.tokenizer, settings.length, settings.loss_on)
    if form == "preference":
        return preference_dataset(examples, base.tokenizer, settings.length)
    return TokenBlocks(stage.over(own.text for own in examples), base.tokenizer, settings.length)


def _sizes(loaded: Loaded, train: Any, held_out: Any, labels: dict[str, int] | None) -> list[str]:
    if loaded.form in _LABELLED:
        kinds = "" if labels is None else f", {len(labels)} labels"
        said = [f"{report.plural(len(train), 'text')} to train on, {len(held_out):,} held out{kinds}"]
        if labels is not None:
            _, most = Counter(document.label for document in loaded.held_out).most_common(1)[0]
            said.append(f"The most frequent label belongs to {most / len(held_out):.1%} of the held-out texts")
        return said
    if loaded.form == "preference":
        return [f"{report.plural(len(train), 'pair')} of answers to train on, {len(held_out):,} held out"]
    counts, what = (len(train), len(held_out)), loaded.form
    if loaded.form == "chat":
        what = "conversation"
    elif loaded.form not in _ANSWERED:
        counts, what = (len(loaded.train), len(loaded.held_out)), "document"
    learnt = f", {train.learnt:,} with a loss" if loaded.form in _ANSWERED else ""
    return [
        f"{report.plural(counts[0], what)} to train on ({train.tokens:,} tokens{learnt}), "
        f"{counts[1]:,} held out ({held_out.tokens:,} tokens)"
    ]


def _batched(settings: Settings, base: BaseModel, form: str, train: Any, held_out: Any, console: Console) -> JobData:
    size = settings.batch_size
    if form in _LABELLED:
        return JobData(train, held_out, DataCollatorWithPadding(base.tokenizer), True, True, size)
    if form == "preference":
        collate = padded_collator(base.tokenizer)
        return JobData(Answers(train), Answers(held_out), collate, False, True, size, (train, held_out))
    if form not in _ANSWERED:
        return JobData(train, held_out, default_data_collator, False, False, size)
    if not settings.packing:
        return JobData(train, held_out, padded_collator(base.tokenizer), False, True, size)
    check_packing(base.model)
    rows = packed(train, settings.length)
    console.print(rows.said[0], markup=False, highlight=False, soft_wrap=True)
    return JobData(
        rows, rows if held_out is train else packed(held_out, settings.length), PackedCollator(), False, False, size
    )
