"""Reading training data and splitting it: texts for language modelling, labelled texts for classification.

Nothing is dropped silently: a row that does not fit is an error that names the file and the line.
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..support.bars import bars_on_terminals_only
from ..support.parse import parse_json, shown
from ..support.require import require

PYTHON_TOPICS = "python-topics"
FILE_TYPES = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")

_SPLIT_SEED = 0  # the split is part of the data, not of a run: every --seed is judged on the same held-out texts
_PASSAGE = 60  # characters; a paragraph this long in two topics is a repetition, a shorter one is chance


@dataclass(frozen=True)
class Document:
    """A text, with what it must not be separated from (`group`) and its class (`label`) if it has one."""

    text: str
    name: str
    group: Hashable
    label: str | None = None


@dataclass(frozen=True)
class Split:
    """Documents to train on and documents held out; no group is in both."""

    train: list[Document]
    held_out: list[Document]


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold the text and the label.

    With `header=False` the first row is data and the columns are numbered from 0.
    """

    text: str | None = None
    label: str | None = None
    header: bool = True

    def wanted(self, labelled: bool) -> list[str]:
        """The names to look up: the text's, and with `labelled` the label's."""
        text = self.text or ("text" if self.header else "0")
        label = self.label or ("label" if self.header else "1")
        return [text, label] if labelled else [text]


def load_documents(
    data: str, columns: Columns, labelled: bool, held_out: float, subset: str | None = None
) -> list[Document]:
    """Read documents from `python-topics`, a file, or a dataset of the Hugging Face hub.

    Args:
        data: `python-topics`, a path ending in one of `FILE_TYPES`, or a hub id (its `train` split is read).
        columns: where text and label are, in everything but plain text.
        labelled: whether each document needs a label.
        held_out: the fraction to be held out, needed to divide a plain text into two documents.
        subset: the configuration of a hub dataset.

    Raises:
        FileNotFoundError: no such file.
        ModuleNotFoundError: a package that this kind of data needs is missing.
        ValueError: an unknown kind of file, a missing column, a row out of form, no documents at all.
    """
    if data == PYTHON_TOPICS:
        if labelled:
            raise ValueError(f"data: {PYTHON_TOPICS} has no labels; give a table of text and label")
        return python_topics()
    check_held_out(held_out)
    path = Path(data)
    suffix = path.suffix.lower()
    if suffix in FILE_TYPES or path.exists():
        if suffix not in FILE_TYPES:
            raise ValueError(f"data: {data!r} is none of {', '.join(FILE_TYPES)}")
        if not path.is_file():
            raise FileNotFoundError(f"data: there is no file {data!r}")
        if suffix == ".txt":
            if labelled:
                raise ValueError(f"data: {data!r} is plain text without labels; give a table of text and label")
            documents = _plain_text(path, held_out)
        else:
            documents = _rows_to_documents(_read_rows(path, suffix, columns), path.name, columns, labelled)
    else:
        documents = _rows_to_documents(_hub_rows(data, subset), data, columns, labelled)
    if not documents:
        raise ValueError(f"data: {data!r} holds no documents")
    return documents


def python_topics() -> list[Document]:
    """The Python language reference as the standard library carries it (`pydoc_data.topics`), one document a topic.

    Topics that repeat a passage of each other (a section and the chapter around it) get the same group, so that a held
    out topic is nowhere in the training text.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    passages: dict[str, list[str]] = defaultdict(list)
    for name in names:
        paragraphs = (" ".join(part.split()) for part in topics[name].split("\n\n"))
        for paragraph in {part for part in paragraphs if len(part) >= _PASSAGE}:
            passages[paragraph].append(name)
    group = {name: name for name in names}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    for shared in passages.values():
        for other in shared[1:]:
            group[root(other)] = root(shared[0])
    return [Document(topics[name], name, root(name)) for name in names]


def _plain_text(path: Path, held_out: float) -> list[Document]:
    text = _decode(path)
    if not text.strip():
        raise ValueError(f"data: {str(path)!r} is empty")
    # One long text has no documents to hold out, so its end is, from a line's end where there is one nearby.
    cut = int(len(text) * (1 - held_out))
    line_end = text.find("\n", cut, cut + int(len(text) * held_out / 2))
    cut = line_end + 1 if line_end >= 0 else cut
    return [Document(text[:cut], f"{path.name} (first part)", 0), Document(text[cut:], f"{path.name} (last part)", 1)]


def _decode(path: Path, newline: str | None = None) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {str(path)!r} is not UTF-8 text: {error}") from error


def _read_rows(path: Path, suffix: str, columns: Columns) -> Iterable[tuple[str, dict[str, Any]]]:
    """Rows as `(where, column to value)`, `where` naming the row in messages."""
    if suffix in (".csv", ".tsv"):
        return _separated_rows(path, suffix, columns)
    if suffix == ".jsonl":
        return _json_rows(path)
    return _parquet_rows(path)


def _separated_rows(path: Path, suffix: str, columns: Columns) -> Iterable[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than some documents
    # Lines as csv knows them, ended by CR and LF alone: str.splitlines also cuts at U+2028, form feeds and more.
    lines = io.StringIO(_decode(path, newline=""), newline="")
    if suffix == ".csv":
        reader = csv.reader(lines, strict=True)
    else:
        # text/tab-separated-values has no quoting: a quotation mark at the start of a field is part of the text.
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    names: list[str] | None = None
    try:
        for fields in reader:
            where = f"{path.name}, line {reader.line_num}"
            if not fields:
                continue  # an empty line holds no row
            if names is None:
                names = [name.strip() for name in fields] if columns.header else [str(i) for i in range(len(fields))]
                _check_names(names, where)
                if columns.header:
                    continue
            if len(fields) != len(names):
                raise ValueError(f"data: {where}: has {len(fields)} fields, expected {len(names)}")
            yield where, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"data: {path.name}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        row = parse_json(line, f"data: {where}", object_pairs_hook=_Object)
        if not isinstance(row, _Object):
            raise ValueError(f"data: {where}: is a {type(row).__name__}, expected an object with named entries")
        _check_names(row.written, where)
        yield where, row


class _Object(dict[str, Any]):
    """An object of JSON that knows its names as they were written."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.written = [name for name, _ in pairs]


def _check_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError for a name that is there twice: only one of the columns could be used."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise ValueError(f"data: {where}: has {shown(twice[0])} twice, expected each name once")


def _parquet_rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    parquet = require("pyarrow.parquet", "reading a parquet file", "pyarrow")
    try:
        # Of the file alone: names of folders such as `label=1` would become columns.
        table = parquet.ParquetFile(path).read()
        rows = table.to_pylist()
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        raise ValueError(f"data: {str(path)!r} is damaged or no parquet file: {error}") from error
    _check_names(table.column_names, path.name)
    return ((f"{path.name}, row {number}", row) for number, row in enumerate(rows, start=1))


def _hub_rows(name: str, subset: str | None) -> Iterable[tuple[str, dict[str, Any]]]:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"data: {name!r} is neither a file nor the id of a dataset")
    datasets = require("datasets", f"the dataset {name!r} of the hub")
    try:
        with bars_on_terminals_only():
            table = datasets.load_dataset(name, subset, split="train")
    except Exception as error:  # the hub, the network and the dataset's own script fail in many ways
        raise ValueError(
            f"data: {name!r} is no file, and could not be loaded as a dataset of the hub: {error}"
        ) from error
    return ((f"{name}, row {number}", dict(row)) for number, row in enumerate(table, start=1))


def _rows_to_documents(
    rows: Iterable[tuple[str, dict[str, Any]]], source: str, columns: Columns, labelled: bool
) -> list[Document]:
    wanted = columns.wanted(labelled)
    documents = []
    for number, (where, row) in enumerate(rows):
        missing = [name for name in wanted if name not in row]
        if missing:
            raise ValueError(
                f"data: {where}: has no column {missing[0]!r}; its columns are {', '.join(map(repr, row))}; name the "
                "right ones by --text-column and --label-column, or say --no-header if the first row is data"
            )
        text = row[wanted[0]]
        if not isinstance(text, str):
            raise ValueError(f"data: {where}: {wanted[0]!r} is {type(text).__name__}, expected a text")
        if not text.isascii():
            _check_characters(text, where, wanted[0])
        label = None
        if labelled:
            value = row[wanted[1]]
            if value is None or isinstance(value, (float, list, dict)) or str(value).strip() == "":
                raise ValueError(
                    f"data: {where}: {wanted[1]!r} is {shown(value)}, expected a label (a word or an integer)"
                )
            label = str(value).strip()
            _check_characters(label, where, wanted[1])
        # Equal texts share a group: a duplicate must not be held out and trained on.
        documents.append(Document(text, f"{source} #{number}", text.strip(), label))
    return documents


def _check_characters(text: str, where: str, column: str) -> None:
    """Raises ValueError for half of a surrogate pair, which JSON can escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"data: {where}: {column!r} is no text that UTF-8 can hold: {error}") from error


def check_held_out(held_out: float) -> None:
    """Raises ValueError for what is no fraction that can be held out; NaN is none."""
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out: got {held_out}, expected a fraction above 0 and at most 0.5")


def split_documents(documents: Sequence[Document], held_out: float) -> Split:
    """Hold out whole groups of documents, about `held_out` of all characters; with labels, of each label's documents.

    The choice depends on the documents only, not on a run's seed.

    Raises:
        ValueError: there are fewer than two groups, so that nothing could be held out, or a label has fewer than two.
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
            raise ValueError(f"data: {what} {len(groups)} different document, at least 2 are needed to hold one out")
        target = held_out * sum(groups.values())
        order = list(groups)
        random.Random(_SPLIT_SEED).shuffle(order)
        taken = 0
        for position, group in enumerate(order):
            room = target - taken
            if taken and room <= 0:
                break
            # A group far larger than what is still missing would turn the proportions around; the last resort takes it.
            if groups[group] <= 1.5 * room or (not taken and position == len(order) - 1):
                chosen.add(group)
                taken += groups[group]
        if not taken:
            raise ValueError("data: nothing could be held out")
    return Split(
        [document for document in documents if document.group not in chosen],
        [document for document in documents if document.group in chosen],
    )


def digest(split: Split) -> str:
    """The SHA-256 of all texts and labels, in their order: data of the same name with another one has changed."""
    found = hashlib.sha256()
    for part in (split.train, split.held_out):
        found.update(f"{len(part)};".encode())
        for document in part:
            for text in (document.text, document.label or ""):
                own = text.encode()
                found.update(f"{len(own)};".encode())
                found.update(own)
    return found.hexdigest()


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Texts joined by the end-of-text token and cut into blocks of `length` tokens; the rest is left off.

    Each item is `{"input_ids": (length,), "labels": (length,)}`, int64. `tokens` counts what the blocks hold.
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
    """Tokenised texts with the number of their label, cut to `length` tokens; `truncated` counts those that were."""

    def __init__(self, documents: Sequence[Document], label_ids: dict[str, int], tokenizer: Any, length: int) -> None:
        texts = [document.text for document in documents]
        full = tokenizer(texts, verbose=False)["input_ids"] if texts else []
        cut = tokenizer(texts, truncation=True, max_length=length)["input_ids"] if texts else []
        self.truncated = sum(len(long) > len(short) for long, short in zip(full, cut, strict=True))
        self._items = [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label_ids[str(document.label)]}
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
        raise ValueError(f"data: found the labels {sorted(labels)}, at least two different ones are needed")
    numeric = all(re.fullmatch("[+-]?[0-9]{1,18}", label) for label in labels)
    ordered = sorted(labels, key=lambda label: (int(label), label)) if numeric else sorted(labels)
    return {label: number for number, label in enumerate(ordered)}
