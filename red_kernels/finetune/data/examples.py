"""The elements of training data: a text, a conversation, a prompt with its completion, a pair of answers."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]  # {"role": ..., "content": ...}, and further keys of the model's template: "tool_calls"
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Document:
    """A text, with its inseparable `group`, and its class (`label`) or number (`score`) if any."""

    text: str
    name: str
    group: Hashable
    label: str | None = None
    score: float | None = None
    where: str = ""

    def content(self) -> list[Any]:
        """The content of the example, without its source."""
        return [self.text, self.label, self.score]


@dataclass(frozen=True)
class Conversation:
    """Messages in order. Those before number `asked` are a prompt: no answer in them is trained."""

    messages: tuple[Message, ...]
    name: str
    where: str
    asked: int = 0
    tools: tuple[Any, ...] | None = None
    group: Hashable = field(init=False)
    label: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", as_json([_turns(self.messages), self.asked]))

    @property
    def text(self) -> str:
        """All contents, one a line."""
        return "\n".join(message["content"] for message in self.messages)

    def content(self) -> list[Any]:
        """The content of the example, without its source."""
        return [list(self.messages), self.asked, self.tools]


@dataclass(frozen=True)
class Completion:
    """A prompt and its completion; both are texts."""

    prompt: str
    completion: str
    name: str
    where: str
    group: Hashable = field(init=False)
    label: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", (self.prompt.strip(), self.completion.strip()))

    @property
    def text(self) -> str:
        """The prompt and the completion."""
        return self.prompt + self.completion

    def content(self) -> list[Any]:
        """The content of the example, without its source."""
        return [self.prompt, self.completion]


@dataclass(frozen=True)
class Preference:
    """A prompt with a better and a worse answer: three texts, or three lists of messages."""

    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    name: str
    where: str
    group: Hashable = field(init=False)
    label: None = field(default=None, init=False)

    def __post_init__(self) -> None:
        parts = [part.strip() if isinstance(part, str) else _turns(part) for part in self._parts()]
        object.__setattr__(self, "group", as_json(parts))

    @property
    def text(self) -> str:
        """The prompt and both answers, one a line."""
        texts = ([part] if isinstance(part, str) else [one["content"] for one in part] for part in self._parts())
        return "\n".join(text for part in texts for text in part)

    def content(self) -> list[Any]:
        """The content of the example, without its source."""
        return list(self._parts())

    def _parts(self) -> tuple[str | tuple[Message, ...], ...]:
        return self.prompt, self.chosen, self.rejected


Example = Document | Conversation | Completion | Preference


def as_json(value: Any) -> str:
    """Equal contents are equal texts."""
    return json.dumps(value, sort_keys=True, default=str)


def _turns(messages: Iterable[Message]) -> list[Message]:
    """The messages without blanks around their contents."""
    return [{**message, "content": message["content"].strip()} for message in messages]


@dataclass(frozen=True)
class Split:
    """Documents to train on and held-out documents; no group is in both."""

    train: list[Any]
    held_out: list[Any]


@dataclass(frozen=True)
class Columns:
    """The columns of a table with the text and the label.

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


def check_held_out(held_out: float) -> None:
    """Raises ValueError if the value is not a valid held-out fraction, for example NaN."""
    if not 0 < held_out <= 0.5:
        raise ValueError(f"held_out: got {held_out}, expected a fraction above 0 and at most 0.5")


def listed(names: Iterable[Any]) -> str:
    """Names for a message, in quotation marks."""
    return ", ".join(map(repr, names))


def sequence_of_names(names: str | Sequence[str], argument: str) -> tuple[str, ...]:
    """Names of sources as a tuple; one name stands for itself. Raises ValueError for none, or for another type."""
    given = (names,) if isinstance(names, str) else tuple(names)
    if not given or not all(isinstance(name, str) and name for name in given):
        raise ValueError(f"{argument}: got {names!r}, expected one or several files, folders or hub ids")
    return given
