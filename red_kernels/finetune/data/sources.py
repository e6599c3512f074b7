"""Sources of data beside single files: the hub, folders of `save_to_disk`, and the Python language reference."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...support.bars import bars_on_terminals_only
from ...support.require import require
from .examples import Document, listed
from .files import COMPRESSIONS, FILE_TYPES, Row, file_type, read_text

PYTHON_TOPICS = "python-topics"
TRAIN = ("train",)
VALIDATION = ("validation", "test")  # in this order

_PASSAGE = 60  # characters; a shared paragraph of this length is a repetition, a shorter one is chance


def python_topics() -> list[Document]:
    """The Python language reference from the standard library (`pydoc_data.topics`), one document for each topic.

    Topics that share a passage (a section and its chapter) get the same group, so that a held-out topic is nowhere in
    the training text.
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


def existing_file(data: str) -> Path | None:
    """The file of `data`, or None for a folder or a dataset of the hub.

    Raises:
        FileNotFoundError: its name is that of a data file, but it does not exist.
        ValueError: it is a file of another type.
    """
    path = Path(data)
    suffix, _ = file_type(path)
    if path.is_dir() and not suffix:
        return None
    if not suffix and not path.exists():
        return None
    if not suffix:
        raise ValueError(
            f"data: {data!r} is none of {', '.join(FILE_TYPES)}, nor one of these followed by {', '.join(COMPRESSIONS)}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"data: the file {data!r} does not exist")
    return path


def plain_text(path: Path, held_out: float) -> tuple[Document, Document]:
    """The first and the last part of a text. One long text has no documents to hold out, so its end is held out.

    The cut is at the end of a line, if there is one nearby.

    Raises:
        ValueError: the file is empty.
    """
    text = whole_text(path).text
    cut = int(len(text) * (1 - held_out))
    line_end = text.find("\n", cut, cut + int(len(text) * held_out / 2))
    cut = line_end + 1 if line_end >= 0 else cut
    first, last = f"{path.name} (first part)", f"{path.name} (last part)"
    return Document(text[:cut], first, 0, where=first), Document(text[cut:], last, 1, where=last)


def whole_text(path: Path) -> Document:
    """A text as one document. Raises ValueError if the file is empty."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"data: {str(path)!r} is empty")
    return Document(text, path.name, text.strip(), where=path.name)


def saved_rows(folder: str, splits: Sequence[str]) -> tuple[Iterable[Row], str]:
    """The rows of a folder of datasets' `save_to_disk`, and a sentence about its splits (or nothing).

    Raises:
        ModuleNotFoundError: datasets is missing.
        ValueError: the folder is damaged or of another kind, or has none of these splits.
    """
    path = Path(folder)
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"data: {folder!r} is a folder, but not of datasets' save_to_disk; name the files in it")
    datasets: Any = require("datasets", f"the folder {folder!r}")
    try:
        with bars_on_terminals_only():
            table = datasets.load_from_disk(folder)
    except Exception as error:  # files of several libraries, each with its own errors
        raise ValueError(f"data: {folder!r} could not be loaded by datasets: {error}") from error
    note = ""
    if isinstance(table, dict):
        split = next((name for name in splits if name in table), None)
        if split is None:
            raise ValueError(
                f"data: {folder!r} has the splits {listed(table)}, expected {' or '.join(map(repr, splits))}"
            )
        others = [name for name in table if name != split]
        note = f"{path.name}: the split {split!r} is read" + (f", not {listed(others)}" if others else "")
        table = table[split]
    return _numbered(table, path.name), note


def hub_rows(name: str, subset: str | None, splits: Sequence[str]) -> Iterable[Row]:
    """The rows of a dataset of the hub: of the first of `splits` in it.

    Raises:
        FileNotFoundError: the name is not a valid name of a dataset.
        ModuleNotFoundError: datasets is missing.
        ValueError: the dataset could not be loaded.
    """
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"data: {name!r} is neither a file nor the id of a dataset")
    datasets: Any = require("datasets", f"the dataset {name!r} of the hub")
    errors = []
    for split in splits:
        try:
            with bars_on_terminals_only():
                return _numbered(datasets.load_dataset(name, subset, split=split), name)
        except Exception as error:  # the hub, the network and the dataset's own script have many errors
            errors.append(error)
    raise ValueError(f"data: {name!r} is no file, and could not be loaded as a hub dataset: {errors[0]}") from errors[0]


def _numbered(table: Iterable[Any], name: str) -> Iterable[Row]:
    return (Row(f"{name}, row {number}", dict(row)) for number, row in enumerate(table, start=1))
