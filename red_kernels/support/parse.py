"""Reading numbers and JSON from users: each fault is a ValueError that names its place."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["MOST_LAYERS", "checked_count", "layer_number", "parse_json", "read_json", "shown"]

MOST_LAYERS = 100_000  # in a list of layers: no model has as many, and a longer list would fill the memory
_DIGITS = 9  # of an index: a longer number is no layer index, and int() refuses 4,301 digits
_SHOWN = 80  # characters of a value in a message


def layer_number(text: str) -> int | None:
    """The number of ASCII digits, at most nine; None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS else None


def parse_json(content: str | bytes, where: str, **options: Any) -> Any:
    """Parse JSON.

    Args:
        content: the text; bytes are UTF-8.
        where: its name, for example the file's, for the message.
        options: for `json.loads`.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(content, **options)
    except RecursionError:
        raise ValueError(f"{where}: its JSON is nested too deeply") from None
    except ValueError as error:  # also for bytes that are not UTF-8, and for numbers with too many digits
        raise ValueError(f"{where}: is not JSON: {error}") from error


def read_json(path: Path, kind: type | None = dict) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        kind: the required type of its content; None for any.

    Raises:
        ValueError: as `parse_json`, or the content is of another type.
        OSError: the file cannot be read.
    """
    content = parse_json(path.read_bytes(), str(path))
    if kind is not None and not isinstance(content, kind):
        raise ValueError(f"{path}: is a {type(content).__name__}, expected a {kind.__name__}")
    return content


def shown(value: object) -> str:
    """A value in a message: its `repr`, shortened if it is long; it never raises an error."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # deep nesting; an integer of too many digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def checked_count(values: Iterable[Any], name: str, most: int = MOST_LAYERS) -> list[Any]:
    """The values as a list. Raises ValueError for more than `most`, before they fill the memory."""
    found: list[Any] = []
    for value in values:
        if len(found) == most:
            raise ValueError(f"{name}: got {shown(values)}, expected at most {most:,}")
        found.append(value)
    return found
