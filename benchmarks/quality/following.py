"""Pairs of sentences: does the second follow the first? From editorials and product reviews.

The sentences come from the archive of `sentiment.py`: 498 editorials of the New York Times and 300 reviews of products
(Hu and Liu's), split into numbered sentences. BERT was pre-trained on this task in addition to its masked words
(next-sentence prediction, arXiv 1810.04805), with one difference: here the second sentence of a negative pair comes
from another text of the same source, not of any source.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from red_kernels.finetune.data import Document, split_documents

from . import sentiment

SOURCES = ("nytEditorialSnippets_GroundTruth.txt", "amazonReviewSnippets_GroundTruth.txt")
_SEED = 0

Pair = tuple[str, str]
LabelledPair = tuple[Pair, int]


@dataclass(frozen=True)
class Following:
    """Pairs of sentences with their class, 1 if the second follows the first, else 0.

    Attributes:
        train, validation, test: no text has sentences in two of them.
    """

    train: list[LabelledPair]
    validation: list[LabelledPair]
    test: list[LabelledPair]


@dataclass(frozen=True)
class Text:
    """The sentences of one editorial or review, in order, and its file."""

    source: str
    sentences: tuple[str, ...]


def load(archive: Path | None = None) -> Following:
    """The pairs in three parts, the same in every run. Arguments and errors as in `sentiment.load`."""
    path = archive or sentiment.fetch()
    content = path.read_bytes()
    return split([text for source in SOURCES for text in texts(content, path.name, source)])


def texts(archive: bytes, name: str, source: str) -> list[Text]:
    """The texts of a file with ids `TEXT_SENTENCE`. Raises ValueError as `sentiment.read_lines`, or for an id."""
    found: dict[str, list[str]] = {}
    for own, _, sentence in sentiment.read_lines(archive, name, source):
        text, separator, number = own.partition("_")
        if not (separator and text and number.isdecimal()):
            raise ValueError(f"{source}: expected ids of a text and a sentence, for example 12_3, got {own!r}")
        found.setdefault(text, []).append(sentence)
    return [Text(source, tuple(sentences)) for sentences in found.values()]


def split(everything: Sequence[Text]) -> Following:
    """Divide texts, those of each source in the same proportion, as `sentiment.split`, and pair their sentences."""
    documents = [
        Document(" ".join(text.sentences), str(number), number, text.source) for number, text in enumerate(everything)
    ]
    tested = split_documents(documents, sentiment.TEST)
    validated = split_documents(tested.train, sentiment.VALIDATION / (1 - sentiment.TEST))
    parts = (validated.train, validated.held_out, tested.held_out)
    return Following(*(pairs([everything[int(document.name)] for document in part]) for part in parts))


def pairs(part: Sequence[Text]) -> list[LabelledPair]:
    """Each sentence but a text's last, with the next one or, at random, one of another text of its source."""
    drawn = random.Random(_SEED)
    found: list[LabelledPair] = []
    for number, text in enumerate(part):
        others = [
            sentence
            for place, other in enumerate(part)
            if place != number and other.source == text.source
            for sentence in other.sentences
        ]
        for first, second in zip(text.sentences, text.sentences[1:], strict=False):
            follows = not others or drawn.random() < 0.5
            found.append(((first, second if follows else drawn.choice(others)), int(follows)))
    return found
