"""The tasks: their data in three parts, and a fresh copy of the base model for each run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, default_data_collator

from red_kernels.finetune.base_dtype import ASKED, AUTO, DTYPES
from red_kernels.finetune.data import TokenBlocks, python_topics, split_documents
from red_kernels.finetune.measure import HeldOut, held_out_loss
from red_kernels.support.base_models import BaseModel, load_base

from . import following, sentiment
from .training import data_order

SENTIMENT, FOLLOWING, LANGUAGE = "sentiment", "next-sentence", "language-modelling"
TASKS = (SENTIMENT, FOLLOWING, LANGUAGE)
METRIC = {SENTIMENT: "accuracy", FOLLOWING: "accuracy", LANGUAGE: "perplexity"}
LABELS = {SENTIMENT: ["negative", "positive"], FOLLOWING: ["no", "yes"]}


@dataclass(frozen=True)
class Budget:
    """The budget of each method on a task.

    Attributes:
        model: a packaged model's name, a folder or a hub id.
        dtype: of the base model: `"auto"`, `"fp32"` or `"bf16"`.
        steps: optimizer steps of a run.
        search: steps of each run that searches a learning rate.
        batch: sentences or blocks in a step.
        length: tokens of a block, and the most of a sentence.
        seeds: runs with the chosen learning rate.
        validation, test: the most sentences or blocks to measure on, from these parts.
        products: of fp32 matrices: `"fp32"`, or `"bf16"` for factors rounded to bf16 and sums in fp32, as in mixed
            precision; `"auto"` for bf16 if the device multiplies it natively.
    """

    model: str
    dtype: str
    steps: int
    batch: int
    length: int
    seeds: int
    validation: int
    test: int
    search: int
    products: str = AUTO

    def check(self, name: str) -> None:
        """Raises ValueError, naming the field, for a value out of range."""
        for own in ("steps", "search", "batch", "seeds", "validation", "test"):
            if getattr(self, own) < 1:
                raise ValueError(f"{name}.{own}: got {getattr(self, own)}, expected at least 1")
        if self.length < 2:
            raise ValueError(f"{name}.length: got {self.length}, expected at least 2 tokens")
        for own in ("dtype", "products"):
            value = getattr(self, own)
            if value not in ASKED:
                raise ValueError(f"{name}.{own}: got {value!r}, expected one of {', '.join(map(repr, ASKED))}")

    def resolved(self, dtype: str) -> Budget:
        """This budget with a dtype in place of each `"auto"`."""
        own: dict[str, Any] = {name: dtype for name in ("dtype", "products") if getattr(self, name) == AUTO}
        return replace(self, **own)


@dataclass
class Task:
    """A task with its data.

    Attributes:
        name: one of `TASKS`.
        train, validation, test: items for `collate`; the latter two cut to the budget's sizes.
        majority: score and loss of the class frequencies alone; None for a task without classes.
        said: a result's entries about the data.
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
        return self.name in LABELS

    def fresh(self, seed: int) -> BaseModel:
        """The base model in evaluation mode, without shared parts; the seed determines its head, if it has one."""
        key = seed if self.classification else 0
        if key not in self._loaded:
            self._loaded[key] = load(self.name, self.budget, self.device, seed)
        base = self._loaded[key]
        return BaseModel(copy.deepcopy(base.model), base.tokenizer, base.name, base.new_parameters)

    def batches(self, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
        """The batches of a run of this many steps, which depend only on the seed."""
        for numbers in data_order(len(self.train), steps, self.budget.batch, seed, self._lengths()):
            yield self._batch([self.train[number] for number in numbers])

    def judge(self, model: nn.Module, part: Sequence[Any]) -> HeldOut:
        """The mean loss over a part, and for classes the accuracy."""
        size = 4 * self.budget.batch if self.classification else self.budget.batch
        groups = [part[start : start + size] for start in range(0, len(part), size)]
        return held_out_loss(model, map(self._batch, groups), self.classification)

    def score(self, found: HeldOut) -> float:
        """Accuracy in percent, or perplexity."""
        return found.perplexity if found.accuracy is None else 100 * found.accuracy

    def longest(self, seed: int) -> dict[str, Tensor]:
        """The batch of a whole run with the most tokens, padding included, for which memory must suffice."""
        lengths = self._lengths()
        order = data_order(len(self.train), self.budget.steps, self.budget.batch, seed, lengths)
        numbers = max(order, key=lambda numbers: max(lengths[number] for number in numbers))
        return self._batch([self.train[number] for number in numbers])

    def _lengths(self) -> list[int]:
        return [len(self.train[number]["input_ids"]) for number in range(len(self.train))]

    def _batch(self, items: Sequence[Any]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.collate(items).items()}


def load(name: str, budget: Budget, device: torch.device, seed: int, tokenizer: Any = None) -> BaseModel:
    """The base model of a task. The seed determines its head. Raises the errors of `load_base`."""
    torch.manual_seed(seed)
    labels, kind = LABELS.get(name), "classification" if name in LABELS else "causal-lm"
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
        ModuleNotFoundError: a package is missing; the message contains the pip command.
    """
    base = load(name, budget, device, 0)
    task = {SENTIMENT: _sentiment, FOLLOWING: _following, LANGUAGE: _language}[name](budget, device, base.tokenizer)
    task._loaded[0] = base
    return task


def _sentiment(budget: Budget, device: torch.device, tokenizer: Any) -> Task:
    found = sentiment.load()
    parts = [[((text,), label) for text, label in part] for part in (found.train, found.validation, found.test)]
    return _classes(SENTIMENT, budget, device, tokenizer, parts, {"left_out_neutral": found.neutral})


def _following(budget: Budget, device: torch.device, tokenizer: Any) -> Task:
    found = following.load()
    return _classes(FOLLOWING, budget, device, tokenizer, [found.train, found.validation, found.test], {})


def _classes(
    name: str,
    budget: Budget,
    device: torch.device,
    tokenizer: Any,
    parts: Sequence[Sequence[tuple[tuple[str, ...], int]]],
    said: dict[str, int],
) -> Task:
    """A task with classes: of each part a text or a pair of texts with its class."""

    def items(part: Sequence[tuple[tuple[str, ...], int]]) -> tuple[list[dict[str, Any]], int]:
        whole = [tokenizer(*texts) for texts, _ in part]
        cut = [dict(tokenizer(*texts, truncation=True, max_length=budget.length)) for texts, _ in part]
        shortened = sum(len(one["input_ids"]) > len(own["input_ids"]) for one, own in zip(whole, cut, strict=True))
        return [{**own, "labels": label} for own, (_, label) in zip(cut, part, strict=True)], shortened

    def judged(part: Sequence[Any]) -> list[Any]:
        # Texts of similar length together have less padding; the mean over all of them does not depend on the order.
        return sorted(items(part)[0], key=lambda item: len(item["input_ids"]))

    validation, test = spread_out(parts[1], budget.validation), spread_out(parts[2], budget.test)
    labels = [[("", label) for _, label in part] for part in (parts[0], test)]
    accuracy, loss = sentiment.majority(*labels)
    train, shortened = items(parts[0])
    said = {
        "train_items": len(train),
        "validation_items": len(validation),
        "test_items": len(test),
        **said,
        "train_items_cut": shortened,
    }
    majority = HeldOut(loss, len(test), accuracy)
    collate = DataCollatorWithPadding(tokenizer)
    return Task(name, budget, device, train, judged(validation), judged(test), collate, majority, said)


def spread_out(items: Any, most: int) -> list[Any]:
    """At most this many items, from all over the data: the first ones could be of one class or of one document."""
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
