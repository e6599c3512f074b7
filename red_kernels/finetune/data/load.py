"""Loading data: from sources to examples to train on and examples held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .examples import Columns, Document, Example, as_json, check_held_out, listed, sequence_of_names
from .files import file_type, read_rows
from .forms import FORMS, TASK_FORMS, TEXT, examples_of, shared
from .sources import (
    PYTHON_TOPICS,
    TRAIN,
    VALIDATION,
    existing_file,
    hub_rows,
    plain_text,
    python_topics,
    saved_rows,
    whole_text,
)
from .split import split_documents


@dataclass(frozen=True)
class Loaded:
    """Data, read and split.

    Attributes:
        form: `"text"`, `"labelled"`, `"scored"`, `"chat"`, `"completion"` or `"preference"`.
        train: the examples to train on.
        held_out: the examples for evaluation; none of them equals one of `train`, unless they have their own source
            (`said` counts these).
        said: sentences for the user: sources, unused columns, repetitions, contamination.
        digest: 64 hex digits of the examples' content and order, without names and places.
    """

    form: str
    train: list[Any]
    held_out: list[Any]
    said: list[str] = field(default_factory=list)
    digest: str = ""


def load_data(
    data: str | Sequence[str],
    columns: Columns | None = None,
    task: str = "causal-lm",
    *,
    subset: str | None = None,
    validation: str | Sequence[str] | None = None,
    held_out: float = 0.1,
    form: str | None = None,
) -> Loaded:
    """Read examples from one or several sources, and hold out some of them.

    Args:
        data: `python-topics`, files of `FILE_TYPES` (compressed or not), folders of `save_to_disk`, ids of the hub.
        columns: the columns of text and label in a table of texts; a named text column makes the form `"text"`.
        task: `"causal-lm"`, `"classification"` or `"regression"`.
        subset: the configuration of a hub dataset.
        validation: sources of the examples to hold out; None to hold out a part of `data`.
        held_out: the fraction of `data` to hold out, without `validation`: above 0 and at most 0.5.
        form: the required form, one of `FORMS`; None for that of the columns.

    Raises:
        FileNotFoundError: the file does not exist.
        ModuleNotFoundError: a package for this kind of data is missing.
        ValueError: an unknown task or form, an unknown kind of file, an invalid row, two forms, no examples, or too few
            to hold one out. The message names the file and the line.
    """
    if task not in TASK_FORMS:
        raise ValueError(f"task: got {task!r}, expected one of {listed(TASK_FORMS)}")
    if form is not None and form not in FORMS:
        raise ValueError(f"form: got {form!r}, expected one of {listed(FORMS)}")
    names = sequence_of_names(data, "data")
    others = sequence_of_names(validation, "validation") if validation is not None else None
    check_held_out(held_out)
    reader = Reader(columns or Columns(), task, subset, form)
    if others is None:
        for name in names:
            reader.read(name, TRAIN, held_out)
        split = split_documents(reader.whole, held_out) if reader.whole else None
        for part in (*reader.first, *reader.last):
            if not part.text.strip():
                raise ValueError(f"data: {part.name} is empty: the text is too short to hold out a part")
        train = [*reader.first, *(split.train if split else ())]
        kept = [*reader.last, *(split.held_out if split else ())]
    else:
        for name in names:
            reader.read(name, TRAIN)
        train, reader.whole = reader.whole, []
        for name in others:
            reader.read(name, VALIDATION)
        kept = reader.whole
    said = [*reader.said, *_repetitions(train, kept, others is not None)]
    _check_labels(train, kept)
    assert reader.form is not None  # there are examples
    return Loaded(reader.form, train, kept, said, _digest(train, kept))


def load_judged(
    data: str | Sequence[str], columns: Columns | None = None, task: str = "causal-lm", *, subset: str | None = None
) -> Loaded:
    """Read examples for evaluation only, all of them as `held_out`: of datasets the split validation or test.

    Arguments and errors as in `load_data`.
    """
    if task not in TASK_FORMS:
        raise ValueError(f"task: got {task!r}, expected one of {listed(TASK_FORMS)}")
    reader = Reader(columns or Columns(), task, subset)
    for name in sequence_of_names(data, "data"):
        reader.read(name, VALIDATION)
    assert reader.form is not None  # there are examples
    return Loaded(reader.form, [], reader.whole, reader.said, _digest([], reader.whole))


def load_documents(
    data: str, columns: Columns, labelled: bool, held_out: float, subset: str | None = None
) -> list[Document]:
    """Read texts from `python-topics`, a file, a folder of `save_to_disk` or a dataset of the Hugging Face hub.

    Args:
        data: `python-topics`, a path ending in one of `FILE_TYPES`, a folder, or a hub id (its `train` split is read).
        columns: the columns of text and label, except in plain text.
        labelled: whether each document needs a label.
        held_out: the held-out fraction, which divides a plain text into two documents.
        subset: the configuration of a hub dataset.

    Raises:
        FileNotFoundError: the file does not exist.
        ModuleNotFoundError: a package for this kind of data is missing.
        ValueError: an unknown kind of file, a missing column, an invalid row, no documents.
    """
    check_held_out(held_out)
    columns = columns if labelled else Columns(columns.wanted(False)[0], columns.label, columns.header)
    reader = Reader(columns, "classification" if labelled else "causal-lm", subset)
    reader.read(data, TRAIN, held_out)
    return [*reader.whole, *reader.first, *reader.last]


class Reader:
    """Reads sources one after the other; all of them must have one form.

    Attributes:
        whole: the examples of tables, and undivided texts.
        first, last: the parts of the divided texts.
        form: of all examples.
        said: sentences about the sources.
    """

    def __init__(self, columns: Columns, task: str, subset: str | None, form: str | None = None) -> None:
        self.whole: list[Any] = []
        self.first: list[Document] = []
        self.last: list[Document] = []
        self.said: list[str] = []
        self.form = self._asked = form
        self._columns, self._task, self._subset = columns, task, subset

    def read(self, data: str, splits: Sequence[str], divide: float | None = None) -> None:
        """Read a source; the last part of a plain text, of this fraction, is split off."""
        if data == PYTHON_TOPICS:
            self._without_labels(PYTHON_TOPICS, "has no labels")
            self._keep(python_topics(), data)
            return
        path = existing_file(data)
        if path is not None and file_type(path)[0] == ".txt":
            self._without_labels(repr(data), "is plain text without labels")
            if divide is None:
                self._keep([whole_text(path)], path.name)
            else:
                first, last = plain_text(path, divide)
                self.first.append(first)
                self.last.append(last)
                self._say(path.name, f"a text of {len(first.text) + len(last.text):,} characters", [])
            return
        note = ""
        if path is not None:
            rows, name = read_rows(path, self._columns), path.name
        elif Path(data).is_dir():
            rows, note = saved_rows(data, splits)
            name = Path(data).name
        else:
            rows, name = hub_rows(data, self._subset, splits), data
        form, examples, unused = examples_of(rows, name, self._columns, self._task, self.form, self._asked)
        if not examples:
            raise ValueError(f"data: {data!r} holds no documents")
        self.form = form
        self._keep(examples, name, unused)
        self.said += [f"{note}."] if note else []

    def _without_labels(self, name: str, why: str) -> None:
        if self._task != "causal-lm":
            raise ValueError(f"data: {name} {why}; give a table of text and label")
        if self.form not in (None, TEXT):
            raise ValueError(f"data: {name} is of the form 'text', the other data of {self.form!r}, expected one form")
        self.form = TEXT

    def _keep(self, examples: Sequence[Example], name: str, unused: Sequence[str] = ()) -> None:
        self.whole += examples
        one, several = _CALLED[str(self.form)]
        self._say(name, f"{len(examples):,} {one if len(examples) == 1 else several}", unused)

    def _say(self, name: str, holds: str, unused: Sequence[str]) -> None:
        self.said.append(f"{name}: {holds}" + (f"; columns not used: {listed(unused)}." if unused else "."))


_CALLED = {
    "text": ("document", "documents"),
    "labelled": ("labelled text", "labelled texts"),
    "scored": ("text with a number", "texts with a number"),
    "chat": ("conversation", "conversations"),
    "completion": ("prompt with its completion", "prompts with their completions"),
    "preference": ("pair of answers", "pairs of answers"),
}


def _repetitions(train: Sequence[Example], held_out: Sequence[Example], apart: bool) -> Iterable[str]:
    """Sentences about equal examples."""
    groups = {example.group for example in train}
    both = shared(held_out, groups) if apart else 0
    if both:
        yield (
            f"Contamination: {both:,} of the {len(held_out):,} validation examples are also training examples; results "
            "on them say nothing about new examples."
        )
    # Topics of one group are parts of each other, but not equal; equal examples have equal texts as well.
    again = len(train) - len({(example.group, example.text) for example in train})
    if again:
        yield f"{again:,} of the {len(train):,} training examples repeat others."
    same = sum(getattr(one, "chosen", 0) == getattr(one, "rejected", 1) for one in train)
    if same:
        yield f"{same:,} of the {len(train):,} pairs have two equal answers, so nothing is learnt from them."


def _check_labels(train: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Raises ValueError for a label that is missing in the training data."""
    known = {example.label for example in train}
    for example in held_out:
        if example.label not in known:
            where = getattr(example, "where", "") or example.name
            raise ValueError(
                f"validation: {where}: the label {example.label!r} is none of the training data's labels: "
                f"{listed(sorted(str(label) for label in known))}"
            )


def _digest(*parts: Sequence[Example]) -> str:
    found = hashlib.sha256()
    for part in parts:
        for example in part:
            line = as_json([type(example).__name__, *example.content()])
            found.update(f"{len(line)}:{line}".encode("utf-8", "surrogatepass"))
        found.update(b"|")
    return found.hexdigest()
