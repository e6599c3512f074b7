"""Pairs of answers: how often, and how clearly, the better one is preferred (DPO, arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..edits.named import disable_edits
from ..support.progress import Stage
from .data.chat import IGNORED
from .measure import HeldOut

__all__ = ["BETA", "Answers", "preference_loss"]

BETA = 0.1  # TRL's and the paper's
PAIR = ("chosen_ids", "rejected_ids")
_TIE = 1e-3  # nats: a smaller difference is rounding between a model with edits and without


class Answers(Dataset[dict[str, list[int]]]):
    """One answer after its prompt, from tokenised pairs, with its loss on the answer: `input_ids` and `labels`."""

    def __init__(self, pairs: Any, answer: str = PAIR[0]) -> None:
        self._pairs, self._answer = pairs, answer

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pair = self._pairs[index]
        prompt, answer = list(pair["prompt_ids"]), list(pair[self._answer])
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


@torch.no_grad()
def preference_loss(
    model: Any,
    batches: Iterable[Sequence[Mapping[str, list[int]]]],
    collate: Callable[[Sequence[Any]], Mapping[str, Tensor]],
    stage: Stage | None = None,
    gather: Callable[[Any], list[Any]] = lambda own: [own],
) -> HeldOut:
    """DPO's loss over pairs (equation 7 of the paper, beta 0.1); the reference is the model without its edits.

    Args:
        model: a patched causal language model; its mode is restored.
        batches: of pairs, as from `preference_dataset`.
        collate: makes a batch of items with `input_ids` and `labels`.
        stage: called after each batch.
        gather: from this process's values to those of all.

    Returns:
        The mean loss, the number of pairs, and as accuracy the share of pairs whose better answer gained more over the
        reference than the other one. Before any training it is 0, and the loss is log 2.

    Raises:
        ValueError: the batches have no pairs.
    """
    was_training = model.training
    model.eval()
    total, count, right = 0.0, 0, 0
    try:
        for number, pairs in enumerate(batches, start=1):
            gains = [_gain(model, collate([Answers(pairs, name)[at] for at in range(len(pairs))])) for name in PAIR]
            margin = gains[0] - gains[1]
            total += float(-F.logsigmoid(BETA * margin).sum())
            right += int((margin > _TIE).sum())
            count += len(pairs)
            if stage is not None:
                stage.reached(number)
    finally:
        model.train(was_training)
    found = gather((total, count, right))
    total, count, right = (sum(own[place] for own in found) for place in range(3))
    if count == 0:
        raise ValueError("batches: hold no pairs")
    return HeldOut(total / count, int(count), right / count)


def _gain(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probability of each answer, minus that of the model without edits: `(pairs,)`, fp64."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    with disable_edits(model):
        before = _log_probabilities(model, batch)
    return _log_probabilities(model, batch) - before


def _log_probabilities(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1].float(), batch["labels"][:, 1:]
    each = -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return each.double().sum(-1)
