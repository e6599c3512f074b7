"""The scoreboard's data: questions with worked answers, and texts for measuring forgetting.

From the hub, or from local JSONL files: rows of `query` and `response`, and rows of `text`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from red_kernels.support.require import require

TRAINED, JUDGED, TEXTS = "meta-math/MetaMathQA", "openai/gsm8k", "HuggingFaceFW/finewiki"
PARTS = ("train", "valid", "test", "wiki")
MOST_CHARACTERS = 1300  # of a question with its answer: longer ones exceed 768 tokens
VALIDATION = 50  # questions, out of GSM8K's training part
WIKI = 100  # texts
BUCKET = 20  # batches whose items are sorted by length together

Pair = tuple[str, str]  # a question and its answer


@dataclass(frozen=True)
class Data:
    """Questions with their answers in three parts, and texts of another kind."""

    train: Sequence[Pair]
    valid: Sequence[Pair]
    test: Sequence[Pair]
    wiki: Sequence[str]

    def __post_init__(self) -> None:
        """Raises ValueError for an empty part."""
        for name in PARTS:
            if not getattr(self, name):
                raise ValueError(f"{name}: has no item")


def load(files: Mapping[str, Path]) -> Data:
    """The four parts.

    Args:
        files: part to a JSONL file that replaces the hub's data.

    Raises:
        ModuleNotFoundError: `datasets` is missing, and a part comes from the hub.
        OSError: a file or the hub cannot be read.
        ValueError: a file has a row without the fields of its part, or no row.
    """
    unknown = [name for name in files if name not in PARTS]
    if unknown:
        raise ValueError(f"files: got the part {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    pairs = {name: [(row["query"], row["response"]) for row in _rows(files[name], ("query", "response"))]
             for name in PARTS[:3] if name in files}  # fmt: skip
    train = pairs.get("train") or _from_hub(TRAINED, None, "train", ("query", "response"))
    valid = pairs.get("valid") or _validation(_from_hub(JUDGED, "main", "train", ("question", "answer")))
    test = pairs.get("test") or _from_hub(JUDGED, "main", "test", ("question", "answer"))
    wiki = [row["text"] for row in _rows(files["wiki"], ("text",))] if "wiki" in files else _wiki()
    return Data([pair for pair in train if len(" ".join(pair)) <= MOST_CHARACTERS], valid, test, wiki[:WIKI])


def batches(items: Sequence[Mapping[str, Any]], batch: int) -> Iterator[list[Mapping[str, Any]]]:
    """Whole passes over tokenised items in their order; those of `BUCKET` batches are sorted, the longest first."""
    size = batch * BUCKET
    while True:
        for start in range(0, len(items), size):
            bucket = sorted(items[start : start + size], key=lambda item: -len(item["input_ids"]))
            yield from (bucket[first : first + batch] for first in range(0, len(bucket), batch))


def _validation(pairs: Sequence[Pair]) -> list[Pair]:
    import numpy

    order = numpy.arange(len(pairs))
    numpy.random.RandomState(0).shuffle(order)  # the scoreboard's order, for the same questions
    return [pairs[number] for number in order[:VALIDATION]]


def _from_hub(name: str, subset: str | None, part: str, fields: tuple[str, str]) -> list[Pair]:
    require("datasets", f"reading {name}")
    import datasets

    found = datasets.load_dataset(name, subset, split=part)
    return list(zip(found[fields[0]], found[fields[1]], strict=True))


def _wiki() -> list[str]:
    require("datasets", f"reading {TEXTS}")
    import datasets

    stream: Iterable[Any] = datasets.load_dataset(TEXTS, split="train", streaming=True)  # only a part is read
    return [row["text"] for row in itertools.islice(stream, WIKI)]


def _rows(path: Path, fields: Sequence[str]) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: is not JSON: {error}") from None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in fields):
            raise ValueError(f"{path}, line {number}: expected an object with the texts {' and '.join(fields)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: has no row")
    return rows
