"""Settings without effect because of others: each is an error that names it and the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..support.parse import shown
from .data import PYTHON_TOPICS
from .data.examples import Conversation, Preference
from .data.files import file_type

__all__ = ["check_template", "check_used", "unused", "without_unused"]

_NO_TABLE = "the data is plain text, which has no columns"


def _labelled(settings: Any) -> bool:
    return settings.task != "causal-lm"


def _sources(settings: Any) -> list[str]:
    data = settings.data if settings.data is not None else PYTHON_TOPICS
    return [*([data] if isinstance(data, str) else data), *(settings.validation or ())]


def _types(settings: Any) -> set[str]:
    """The types of the sources: those of files, or `"folder"`, or `"hub"`."""
    found = set()
    for source in _sources(settings):
        suffix = ".txt" if source == PYTHON_TOPICS else file_type(Path(source))[0]
        found.add(suffix or ("folder" if Path(source).exists() else "hub"))
    return found


def _is_plain(settings: Any) -> bool:
    return _types(settings) == {".txt"}


# The setting, its requested value, the condition under which it has no effect, and the reason.
_Rule = tuple[str, Callable[[Any], Any], Callable[[Any], bool], str]
_RULES: tuple[_Rule, ...] = (
    (
        "held_out",
        lambda own: own.held_out,
        lambda own: own.validation is not None,
        "the held-out data has its own source, validation",
    ),
    (
        "subset",
        lambda own: own.subset,
        lambda own: "hub" not in _types(own),
        "no source is a hub dataset; other sources have no configurations",
    ),
    (
        "label_column",
        lambda own: own.columns.label,
        lambda own: not _labelled(own),
        "labels are for classification and regression (task)",
    ),
    ("text_column", lambda own: own.columns.text, _is_plain, _NO_TABLE),
    (
        "no_header",
        lambda own: not own.columns.header or None,
        lambda own: not _types(own) & {".csv", ".tsv"},
        "no source is a csv or tsv file; other files have no header",
    ),
    (
        "loss_on",
        lambda own: own.loss_on if own.loss_on != type(own).loss_on else None,
        _labelled,
        "the loss is on labels, not on texts",
    ),
    ("template", lambda own: own.template, _labelled, "labelled texts are no conversations"),
    ("packing", lambda own: own.packing or None, _labelled, "labelled texts are not packed"),
    ("sample", lambda own: own.sample or None, _labelled, "a model of labels generates no text"),
    (
        "position",
        lambda own: own.position if own.position != type(own).position else None,
        lambda own: own.sites is not None,
        "sites alone names the modules",
    ),
)


def unused(settings: Any) -> dict[str, str]:
    """The settings (a `Settings`) without effect, by the names of the options, with sentences on the reasons."""
    found = {}
    for name, value, idle, why in _RULES:
        asked = value(settings)
        if asked is not None and idle(settings):
            found[name] = f"{name}: got {shown(asked)}, which has no effect: {why}"
    return found


def check_used(settings: Any) -> None:
    """Raises ValueError for the first setting that has no effect."""
    for message in unused(settings).values():
        raise ValueError(message)


def without_unused(settings: Any, given: Iterable[str]) -> Any:
    """The settings without those that have no effect. Raises ValueError if one of them is among `given`."""
    asked = set(given)
    for name, message in unused(settings).items():
        if name in asked:
            raise ValueError(message)
        if name == "no_header":
            settings = replace(settings, columns=replace(settings.columns, header=True))
        elif name.endswith("_column"):
            none: dict[str, Any] = {name.removesuffix("_column"): None}
            settings = replace(settings, columns=replace(settings.columns, **none))
        else:
            settings = replace(settings, **{name: getattr(type(settings), name)})
    return settings


def check_template(template: str | None, examples: Iterable[Any], sample: Iterable[str] = ()) -> None:
    """Raises ValueError for a chat template without conversations or prompts for it."""
    if template is None or list(sample):
        return
    for own in examples:
        if isinstance(own, Conversation) or (isinstance(own, Preference) and not isinstance(own.prompt, str)):
            return
    raise ValueError(f"template: got {template!r}, which has no effect: the data holds no conversations")
