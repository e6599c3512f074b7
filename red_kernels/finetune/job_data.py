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
from .data import LabelledTexts, Split, TokenBlocks
from .measure import QUIET, HeldOut, held_out_loss
from .processes import ALONE, Processes
from .settings import Settings

__all__ = ["JobData", "tokenised"]


@dataclass(frozen=True)
class JobData:
    """The datasets of a job, and how to batch them."""

    train: Any
    held_out: Any
    collate: Any
    classification: bool
    batch_size: int

    def held_out_loss(self, model: nn.Module, console: Console, processes: Processes = ALONE) -> HeldOut:
        """The loss of a model on what is held out, whose batches the processes share; a stage where it takes long."""
        count = len(self.held_out)
        groups = [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]
        # Where parameters lie in parts on all processes, each of them has to run each batch.
        shared = not any(map(is_sharded, model.parameters()))
        own = groups[processes.rank :: processes.count] if shared else groups
        batches = DataLoader(self.held_out, batch_sampler=list(map(list, own)), collate_fn=self.collate)
        gather = processes.gather if shared else ALONE.gather
        with Stage(console, "held-out loss", len(batches), unit="batch", after=QUIET) as stage:
            return held_out_loss(model, batches, self.classification, stage, gather)

    def first_batch(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The first items to train on, as a batch."""
        items = [self.train[index % len(self.train)] for index in range(self.batch_size)]
        return {name: value.to(device) for name, value in self.collate(items).items()}


def tokenised(
    settings: Settings, base: BaseModel, split: Split, labels: dict[str, int] | None, console: Console
) -> JobData:
    """Tokenise a split, and say how much it is. `labels` are a classification's, label to number."""
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
    return JobData(train, held_out, collate, labels is not None, settings.batch_size)
