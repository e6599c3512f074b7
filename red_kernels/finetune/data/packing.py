"""Packing: several examples in a row of tokens, without attention between them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from ...support.errors import one_line
from .chat import IGNORED

LENGTHS = "seq_lengths"  # TRL's name
_FIRST, _SECOND = 7, 6  # tokens of the two documents of the check
_NEAR = 0.1  # fraction of the difference made by attention to the other document


class Packed(Dataset[dict[str, list[int]]]):
    """Rows of whole examples: `input_ids`, `labels`, and `seq_lengths`, the length of each example.

    Attributes:
        rows: for each row the numbers of its examples.
        tokens: in all rows.
        length: the most tokens in a row.
        said: a sentence about the rows.
    """

    def __init__(self, dataset: Any, rows: list[list[int]], length: int) -> None:
        self.rows, self.length = rows, length
        self._dataset = dataset
        self.tokens = sum(len(dataset[place]["input_ids"]) for row in rows for place in row)
        filled = self.tokens / (len(rows) * length)
        self.said = [
            f"{len(dataset):,} examples packed into {len(rows):,} rows of {length:,} tokens, {filled:.1%} filled."
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        items = [self._dataset[place] for place in self.rows[index]]
        return {
            "input_ids": [own for item in items for own in item["input_ids"]],
            "labels": [own for item in items for own in item["labels"]],
            LENGTHS: [len(item["input_ids"]) for item in items],
        }


def packed(dataset: Any, length: int) -> Packed:
    """Pack whole examples into rows of at most `length` tokens: longest first, each into the fullest row with room.

    Args:
        dataset: items with `input_ids` and `labels`, as from `chat_dataset`.
        length: the most tokens in a row.

    Raises:
        ValueError: there are no examples, or one is empty or longer than a row.
    """
    sizes = [len(dataset[place]["input_ids"]) for place in range(len(dataset))]
    if not sizes:
        raise ValueError("data: there are no examples to pack")
    if min(sizes) < 1 or max(sizes) > length:
        raise ValueError(
            f"data: examples have {min(sizes)} to {max(sizes)} tokens, expected 1 to {length} to pack them"
        )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # the free room of each row, and its number, in order
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        at = bisect_left(room, (sizes[place], -1))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        if free > sizes[place]:
            insort(room, (free - sizes[place], row))
    return Packed(dataset, rows, length)


@dataclass
class PackedCollator:
    """Batches of packed rows: one row of all their examples, with `position_ids` that restart for each.

    There is no attention mask: transformers' models infer the documents from the positions. `labels` have no loss on
    the first token of an example.
    """

    _flatten: Any = field(default_factory=DataCollatorWithFlattening)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        documents = []
        for row in rows:
            for stop, size in zip(accumulate(row[LENGTHS]), row[LENGTHS], strict=True):
                documents.append({name: row[name][stop - size : stop] for name in ("input_ids", "labels")})
        batch: dict[str, Tensor] = self._flatten(documents)
        return batch


def padded_collator(tokenizer: Any) -> Any:
    """Batches of unpacked examples: padded, with an attention mask, and without loss on the padding."""
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)


def check_packing(model: nn.Module) -> None:
    """Check that a model keeps packed documents apart, by a trial on two short ones, without gradients.

    The second document must not depend on the first one, and must equal its result alone. The tolerance is a tenth of
    the difference that attention to the first one makes, or a rounding step. Attention to it and wrong positions exceed
    this.

    Args:
        model: a causal language model; its mode and its edits are unchanged.

    Raises:
        ValueError: it takes no `position_ids`, or mixes its documents, for example by a state carried from one to the
            next. Training without packing is right for each model.
    """
    device = next(model.parameters()).device
    count = min(int(model.get_input_embeddings().num_embeddings), 1000)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    first, other, second = (
        torch.randint(0, count, (1, size), generator=generator) for size in (_FIRST, _FIRST, _SECOND)
    )
    anew = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)])[None]
    on = torch.arange(_FIRST + _SECOND)[None]
    modes = {module: module.training for module in model.modules()}
    model.eval()

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False).logits
        return found[0, -_SECOND:].double()

    try:
        with torch.no_grad():
            alone = logits(second, torch.arange(_SECOND)[None])
            behind = [logits(torch.cat([before, second], 1), anew) for before in (first, other)]
            reading = [logits(torch.cat([before, second], 1), on) for before in (first, other)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"packing: {type(model).__name__} does not accept the positions of packed documents: {one_line(error)}; "
            "train it without packing"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    dtypes = {own.dtype for own in model.parameters() if own.is_floating_point() and own.itemsize > 1}
    rounding = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0) * alone.norm()
    near = max(_NEAR * (reading[0] - reading[1]).norm(), rounding)
    leak, away = (behind[0] - behind[1]).norm(), (behind[0] - alone).norm()
    if not max(leak, away) <= near:  # also false for NaN
        how = "reads one packed document in the next" if not leak <= near else "computes positions in its own way"
        raise ValueError(f"packing: {type(model).__name__} {how}; train it without packing")
