"""Holding out examples: whole groups, so that no held-out example is trained on."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import Any

from .examples import Split, check_held_out

_SPLIT_SEED = 0  # the split belongs to the data, not to a run: every --seed is evaluated on the same held-out texts


def split_documents(documents: Sequence[Any], held_out: float) -> Split:
    """Hold out whole groups of documents, about `held_out` of all characters; with labels, of each label's documents.

    A document is any example with a text, a group, and a label or None. The choice depends only on the documents, not
    on a run's seed.

    Raises:
        ValueError: there are fewer than two groups, so none can be held out, or a label has fewer than two.
    """
    check_held_out(held_out)
    labels = sorted({document.label for document in documents if document.label is not None})
    chosen: set[Hashable] = set()
    for label in labels or (None,):
        groups: dict[Hashable, int] = {}
        for document in documents:
            if document.label == label:
                groups[document.group] = groups.get(document.group, 0) + len(document.text) + 1
        if len(groups) < 2:
            what = "the data holds" if label is None else f"the label {label!r} has"
            raise ValueError(f"data: {what} {len(groups)} different document, expected at least 2, to hold one out")
        target = held_out * sum(groups.values())
        order = list(groups)
        random.Random(_SPLIT_SEED).shuffle(order)
        taken = 0
        for position, group in enumerate(order):
            room = target - taken
            if taken and room <= 0:
                break
            # A group much larger than the missing rest would reverse the proportions; the last resort takes it.
            if groups[group] <= 1.5 * room or (not taken and position == len(order) - 1):
                chosen.add(group)
                taken += groups[group]
        if not taken:
            raise ValueError("data: no document could be held out")
    return Split(
        [document for document in documents if document.group not in chosen],
        [document for document in documents if document.group in chosen],
    )
