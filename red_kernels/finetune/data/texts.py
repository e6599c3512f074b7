"""Texts as tokens: blocks of a stream for language modelling, labelled texts for classification."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ...support.parse import shown
from .examples import Document


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Texts joined by the end-of-text token and cut into blocks of `length` tokens; the rest is dropped.

    Each item is `{"input_ids": (length,), "labels": (length,)}`, int64. `tokens` counts the tokens of all blocks;
    `said` has a sentence about the rest, if there is one.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any, length: int) -> None:
        if length < 2:
            raise ValueError(f"length: got {length}, expected at least 2 tokens")
        stream: list[int] = []
        for text in texts:
            stream.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if tokenizer.eos_token_id is not None:
                stream.append(tokenizer.eos_token_id)
        count = len(stream) // length
        if count == 0:
            raise ValueError(f"data: {len(stream)} tokens are less than one block of length {length}")
        rest = len(stream) - count * length
        tokens = "token" if rest == 1 else "tokens"
        self.said = [f"{rest:,} {tokens} at the end left out: less than a block of {length:,}."] if rest else []
        self._blocks = torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)

    @property
    def tokens(self) -> int:
        """Number of tokens in all blocks."""
        return self._blocks.numel()

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._blocks[index], "labels": self._blocks[index].clone()}


class LabelledTexts(Dataset[dict[str, Any]]):
    """Tokenised texts with the number of their label, cut to `length` tokens; `truncated` counts the cut ones.

    Without `label_ids` the labels are the documents' scores, for a regression. Raises ValueError for a text without a
    token, which cannot be classified.
    """

    def __init__(
        self, documents: Sequence[Document], label_ids: dict[str, int] | None, tokenizer: Any, length: int
    ) -> None:
        texts = [document.text for document in documents]
        full = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        cut = tokenizer(texts, truncation=True, max_length=length)["input_ids"] if texts else []
        for ids, document in zip(cut, documents, strict=True):
            if not ids:
                where = document.where or document.name
                raise ValueError(f"data: {where}: the text {shown(document.text)} has no token; remove the row")
        self.truncated = sum(len(long) > len(short) for long, short in zip(full, cut, strict=True))
        self._items = [
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": document.score if label_ids is None else label_ids[str(document.label)],
            }
            for ids, document in zip(cut, documents, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]


def label_numbers(documents: Iterable[Document]) -> dict[str, int]:
    """Number the labels: in numerical order if all are integers, otherwise by name.

    Raises:
        ValueError: fewer than two labels.
    """
    labels = {str(document.label) for document in documents}
    if len(labels) < 2:
        raise ValueError(f"data: found the labels {sorted(labels)}, expected at least two different ones")
    numeric = all(re.fullmatch("[+-]?[0-9]{1,18}", label) for label in labels)
    ordered = sorted(labels, key=lambda label: (int(label), label)) if numeric else sorted(labels)
    return {label: number for number, label in enumerate(ordered)}
