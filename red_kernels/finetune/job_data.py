"""The tokenised data of a job, and how it is batched."""

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

__all__ = ["JobData", "tokenised"]


@dataclass(frozen=True)
class JobData:
    """The datasets of a job, and how to batch them. `labelled`: whether a text has one label, or one score."""

    train: Any
    held_out: Any
    collate: Any
    labelled: bool
    padded: bool  # whether batches hold padding, and a mask that tells
    batch_size: int
    pairs: tuple[Any, Any] | None = None  # to train on and held out, of preferences; `train` is then of the better ones

    def held_out_loss(self, model: nn.Module, console: Console, processes: Processes = ALONE) -> HeldOut:
        """The loss of a model on what is held out, whose batches the processes share; a stage where it takes long."""
        count = len(self.held_out)
        groups = [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]
        # Where parameters lie in parts on all processes, each of them has to run each batch.
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
        """The first items to train on, as a batch."""
        items = [self.train[index % len(self.train)] for index in range(self.batch_size)]
        return {name: value.to(device) for name, value in self.collate(items).items()}


def tokenised(
    settings: Settings, base: BaseModel, loaded: Loaded, labels: dict[str, int] | None, console: Console
) -> JobData:
    """Tokenise the data, and say how much it is. `labels` are a classification's, label to number."""
    console.print("Tokenising the data")
    if loaded.form in ("labelled", "scored"):
        return _labelled(settings, base, loaded, labels, console)
    if loaded.form in ("chat", "completion"):
        return _answers(settings, base, loaded, console)
    if loaded.form == "preference":
        return _pairs(settings, base, loaded, console)
    return _blocks(settings, base, loaded, console)


def _labelled(
    settings: Settings, base: BaseModel, loaded: Loaded, labels: dict[str, int] | None, console: Console
) -> JobData:
    train, held_out = (
        LabelledTexts(part, labels, base.tokenizer, settings.length) for part in (loaded.train, loaded.held_out)
    )
    cut = train.truncated + held_out.truncated
    console.print(
        f"{report.plural(len(train), 'text')} to train on, {len(held_out):,} held out"
        + ("" if labels is None else f", {len(labels)} labels")
        + (f"; {report.plural(cut, 'text')} cut to {settings.length} tokens" if cut else "")
    )
    if labels is not None:
        _, most = Counter(document.label for document in loaded.held_out).most_common(1)[0]
        console.print(f"The most frequent label is that of {most / len(held_out):.1%} of the held-out texts")
    return JobData(train, held_out, DataCollatorWithPadding(base.tokenizer), True, True, settings.batch_size)


def _answers(settings: Settings, base: BaseModel, loaded: Loaded, console: Console) -> JobData:
    train, held_out = (
        chat_dataset(part, base.tokenizer, settings.length, settings.loss_on)
        for part in (loaded.train, loaded.held_out)
    )
    what = "conversation" if loaded.form == "chat" else "completion"
    console.print(
        f"{report.plural(len(train), what)} to train on ({train.tokens:,} tokens, {train.learnt:,} with a loss), "
        f"{len(held_out):,} held out ({held_out.tokens:,} tokens)"
    )
    for name, part in (("to train on", train), ("held out", held_out)):
        for sentence in part.said:
            console.print(f"Of those {name}: {sentence}", markup=False, highlight=False, soft_wrap=True)
    if not settings.packing:
        return JobData(train, held_out, padded_collator(base.tokenizer), False, True, settings.batch_size)
    check_packing(base.model)
    rows = [packed(part, settings.length) for part in (train, held_out)]
    console.print(rows[0].said[0], markup=False, highlight=False, soft_wrap=True)
    return JobData(rows[0], rows[1], PackedCollator(), False, False, settings.batch_size)


def _pairs(settings: Settings, base: BaseModel, loaded: Loaded, console: Console) -> JobData:
    parts = [preference_dataset(part, base.tokenizer, settings.length) for part in (loaded.train, loaded.held_out)]
    console.print(f"{report.plural(len(parts[0]), 'pair')} of answers to train on, {len(parts[1]):,} held out")
    for name, part in zip(("to train on", "held out"), parts, strict=True):
        for sentence in part.said:
            console.print(f"Of those {name}: {sentence}", markup=False, highlight=False, soft_wrap=True)
    collate = padded_collator(base.tokenizer)
    better = [Answers(part) for part in parts]
    return JobData(better[0], better[1], collate, False, True, settings.batch_size, (parts[0], parts[1]))


def _blocks(settings: Settings, base: BaseModel, loaded: Loaded, console: Console) -> JobData:
    count = len(loaded.train) + len(loaded.held_out)
    with Stage(console, "tokenising", count, unit="document", after=QUIET) as stage:
        train, held_out = (
            TokenBlocks(stage.over(document.text for document in part), base.tokenizer, settings.length)
            for part in (loaded.train, loaded.held_out)
        )
    console.print(
        f"{report.plural(len(loaded.train), 'document')} to train on ({train.tokens:,} tokens), "
        f"{len(loaded.held_out):,} held out ({held_out.tokens:,} tokens)"
    )
    return JobData(train, held_out, default_data_collator, False, False, settings.batch_size)
