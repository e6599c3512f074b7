"""The two tasks: their data in three parts, and a fresh copy of the base model for each run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, default_data_collator

from red_kernels.finetune.base_dtype import ASKED, DTYPES
from red_kernels.finetune.data import Document, LabelledTexts, TokenBlocks, python_topics, split_documents
from red_kernels.finetune.measure import HeldOut, held_out_loss
from red_kernels.support.base_models import BaseModel, load_base

from . import sentiment
from .training import data_order

SENTIMENT, LANGUAGE = "sentiment", "language-modelling"
TASKS = (SENTIMENT, LANGUAGE)
METRIC = {SENTIMENT: "accuracy", LANGUAGE: "perplexity"}
LABELS = ["negative", "positive"]


@dataclass(frozen=True)
class Budget:
    """What each method may use on a task.

    Attributes:
        model: a packaged model's name, a folder or a hub id.
        dtype: of the base model: `"auto"`, `"fp32"` or `"bf16"`.
        steps: optimizer steps of a run.
        batch: sentences or blocks in a step.
        length: tokens in a block, and the most in a sentence.
        seeds: runs with the chosen learning rate.
        validation, test: the most sentences or blocks to measure on, of those that these parts hold.
    """

    model: str
    dtype: str
    steps: int
    batch: int
    length: int
    seeds: int
    validation: int
    test: int

    def check(self, name: str) -> None:
        """Raises ValueError, naming the field, for a value out of range."""
        for own in ("steps", "batch", "seeds", "validation", "test"):
            if getattr(self, own) < 1:
                raise ValueError(f"{name}.{own}: got {getattr(self, own)}, expected at least 1")
        if self.length < 2:
            raise ValueError(f"{name}.length: got {self.length}, expected at least 2 tokens")
        if self.dtype not in ASKED:
            raise ValueError(f"{name}.dtype: got {self.dtype!r}, expected one of {', '.join(map(repr, ASKED))}")


@dataclass
class Task:
    """A task with its data.

    Attributes:
        name: one of `TASKS`.
        train, validation, test: items as `collate` takes them; the latter two cut to the budget's sizes.
        majority: score and loss of the class frequencies alone; None for a task without classes.
        said: what a result says of the data.
    """

    name: str
    budget: Budget
    device: torch.device
    train: Any
    validation: list[Any]
    test: list[Any]
    collate: Any
    majority: HeldOut | None
    said: dict[str, int]
    _loaded: dict[int, BaseModel] = field(default_factory=dict)

    @property
    def classification(self) -> bool:
        """Whether there are classes, and so a head."""
        return self.name == SENTIMENT

    def fresh(self, seed: int) -> BaseModel:
        """The base model in evaluation mode, nothing of it shared with another; its head, if any, drawn by the seed."""
        key = seed if self.classification else 0
        if key not in self._loaded:
            self._loaded[key] = load(self.name, self.budget, self.device, seed)
        base = self._loaded[key]
        return BaseModel(copy.deepcopy(base.model), base.tokenizer, base.name, base.new_parameters)

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """The batches of a run, which depend on the seed alone."""
        lengths = [len(self.train[number]["input_ids"]) for number in range(len(self.train))]
        for numbers in data_order(len(self.train), self.budget.steps, self.budget.batch, seed, lengths):
            yield self._batch([self.train[number] for number in numbers])

    def judge(self, model: nn.Module, part: Sequence[Any]) -> HeldOut:
        """The mean loss over a part, and for classes the accuracy."""
        size = 4 * self.budget.batch if self.classification else self.budget.batch
        groups = [part[start : start + size] for start in range(0, len(part), size)]
        return held_out_loss(model, map(self._batch, groups), self.classification)

    def score(self, found: HeldOut) -> float:
        """Accuracy in percent, or perplexity."""
        return found.perplexity if found.accuracy is None else 100 * found.accuracy

    def _batch(self, items: Sequence[Any]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.collate(items).items()}


def load(name: str, budget: Budget, device: torch.device, seed: int, tokenizer: Any = None) -> BaseModel:
    """The base model of a task. Its head is drawn by the seed. Raises what `load_base` does."""
    torch.manual_seed(seed)
    labels, kind = (LABELS, "classification") if name == SENTIMENT else (None, "causal-lm")
    base = load_base(budget.model, kind, DTYPES[budget.dtype], device, labels, tokenizer)
    longest = getattr(base.model.config, "max_position_embeddings", None)
    if isinstance(longest, int) and budget.length > longest:
        raise ValueError(f"{name}.length: got {budget.length}, {base.name} takes at most {longest} tokens")
    base.model.config.use_cache = False
    return base


def make_task(name: str, budget: Budget, device: torch.device) -> Task:
    """Read a task's data and its base model.

    Raises:
        OSError, ValueError: as `sentiment.load` and `load_base`.
        ModuleNotFoundError: a package is missing; the message holds the pip command.
    """
    base = load(name, budget, device, 0)
    task = (_sentiment if name == SENTIMENT else _language)(budget, device, base.tokenizer)
    task._loaded[0] = base
    return task


def _sentiment(budget: Budget, device: torch.device, tokenizer: Any) -> Task:
    found = sentiment.load()
    numbers = {str(number): number for number in range(len(LABELS))}

    def items(pairs: Sequence[sentiment.Labelled]) -> LabelledTexts:
        documents = [Document(text, "", text, str(label)) for text, label in pairs]
        return LabelledTexts(documents, numbers, tokenizer, budget.length)

    def judged(pairs: Sequence[sentiment.Labelled]) -> list[Any]:
        own = items(pairs)
        # Sentences of like length together have less padding; the mean over all of them does not depend on the order.
        return sorted((own[number] for number in range(len(own))), key=lambda item: len(item["input_ids"]))

    validation, test = spread_out(found.validation, budget.validation), spread_out(found.test, budget.test)
    accuracy, loss = sentiment.majority(found.train, test)
    train = items(found.train)
    said = {
        "train_items": len(train),
        "validation_items": len(validation),
        "test_items": len(test),
        "left_out_neutral": found.neutral,
        "train_items_cut": train.truncated,
    }
    majority = HeldOut(loss, len(test), accuracy)
    collate = DataCollatorWithPadding(tokenizer)
    return Task(SENTIMENT, budget, device, train, judged(validation), judged(test), collate, majority, said)


def spread_out(items: Any, most: int) -> list[Any]:
    """At most so many items, from all over the data: the first ones could be of one class or of one document."""
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _language(budget: Budget, device: torch.device, tokenizer: Any) -> Task:
    tested = split_documents(python_topics(), sentiment.TEST)
    validated = split_documents(tested.train, sentiment.VALIDATION / (1 - sentiment.TEST))
    train, validation, test = (
        TokenBlocks((document.text for document in part), tokenizer, budget.length)
        for part in (validated.train, validated.held_out, tested.held_out)
    )

    judged = spread_out(validation, budget.validation), spread_out(test, budget.test)
    said = {"train_items": len(train), "validation_items": len(judged[0]), "test_items": len(judged[1])}
    return Task(LANGUAGE, budget, device, train, *judged, default_data_collator, None, said)
