"""The forms of data, inferred from the columns of a row, and the examples of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Set
from typing import Any

from ...support.parse import shown
from .examples import ASSISTANT, Columns, Completion, Conversation, Document, Example, Message, Preference, listed
from .files import Row
from .messages import check_text, is_messages, messages_of, tools_of

TEXT, LABELLED, SCORED = "text", "labelled", "scored"
CHAT, COMPLETION, PREFERENCE = "chat", "completion", "preference"
FORMS = (TEXT, LABELLED, SCORED, CHAT, COMPLETION, PREFERENCE)
TASK_FORMS = {"causal-lm": None, "classification": LABELLED, "regression": SCORED}  # None: inferred from the columns

# The columns that identify a form, and its optional columns; the first match is taken.
_TELLING: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    (PREFERENCE, ("chosen", "rejected"), ("prompt",)),
    (CHAT, ("messages",), ("tools",)),
    (CHAT, ("conversations",), ("tools", "system")),
    (COMPLETION, ("prompt", "completion"), ()),
    (COMPLETION, ("instruction", "output"), ("input",)),
)
KNOWN = (
    "'messages' or 'conversations' (chat), 'prompt' and 'completion', 'instruction' and 'output', "
    "'chosen' and 'rejected' (preference), or 'text'"
)


def form_of(row: Row, columns: Columns, task: str, asked: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The form of a row for a task, and its used columns; with `asked` this form, if its columns exist.

    Raises:
        ValueError: the columns match no form, or two; the message names them and the forms.
    """
    wanted = TASK_FORMS[task]
    if wanted is not None:
        return wanted, tuple(columns.wanted(True))
    names = {name for name, value in row.values.items() if value is not None}
    if columns.text is None and columns.header:
        if {"messages", "conversations"} <= names:
            raise ValueError(f"data: {row.where}: has both 'messages' and 'conversations', expected one of them")
        for form, telling, also in _TELLING:
            if names.issuperset(telling) and asked in (None, form):
                return form, (*telling, *(name for name in also if name in row.values))
    return TEXT, tuple(columns.wanted(False))


def examples_of(
    rows: Iterable[Row], source: str, columns: Columns, task: str, form: str | None = None, asked: str | None = None
) -> tuple[str | None, list[Example], list[str]]:
    """The form of a source's rows, its examples, and the unused columns.

    Args:
        rows: of the source.
        source: its name, for the names of the examples.
        columns: the columns of texts and labels.
        task: `"causal-lm"`, `"classification"` or `"regression"`.
        form: the required form; None for that of the first row.
        asked: the preferred form if a row's columns match several.

    Raises:
        ValueError: a row is invalid, or of another form than the first one.
    """
    examples: list[Example] = []
    unused: dict[str, None] = {}
    first: str | None = None
    for number, row in enumerate(rows):
        found, used = form_of(row, columns, task, asked)
        if form is None:
            form, first = found, row.where
        if found != form:
            expected = f"{form!r}, as {first} is" if first else repr(form)
            raise ValueError(
                f"data: {row.where}: is of the form {found!r} by its columns {_columns(row)}, expected "
                f"{expected}; all data has to be of one form"
            )
        unused.update(dict.fromkeys(name for name in row.values if name not in used))
        examples.append(_MAKERS[form](row, f"{source} #{number}", used, columns))
    return form, examples, list(unused)


def _columns(row: Row) -> str:
    """The columns of a row for a message: those without a value identify no form."""
    empty = [name for name, value in row.values.items() if value is None]
    return listed(row.values) + (f" (without a value: {listed(empty)})" if empty else "")


def missing_column(row: Row, name: str, labelled: bool) -> ValueError:
    """The error for a missing column: the present ones, and how to name the right one."""
    options = "--text-column and --label-column" if labelled else "--text-column"
    forms = "" if labelled else f"; a form of data is told from its columns: {KNOWN}"
    first_row = ", or pass --no-header if the first row is data" if row.separated else ""
    return ValueError(
        f"data: {row.where}: has no column {name!r}; its columns are {_columns(row)}{forms}; name the right ones "
        f"by {options}{first_row}"
    )


def _document(row: Row, name: str, used: tuple[str, ...], columns: Columns) -> Document:
    return Document(_text(row, used), name, _text(row, used).strip(), where=row.where)


def _labelled(row: Row, name: str, used: tuple[str, ...], columns: Columns) -> Document:
    text, value = _text(row, used), row.values[used[1]]
    if value is None or isinstance(value, (float, list, dict)) or str(value).strip() == "":
        raise ValueError(f"data: {row.where}: {used[1]!r} is {shown(value)}, expected a label (a word or an integer)")
    label = check_text(str(value).strip(), row.where, used[1])
    # Equal texts share a group, so that no duplicate is both held out and trained on.
    return Document(text, name, text.strip(), label, where=row.where)


def _scored(row: Row, name: str, used: tuple[str, ...], columns: Columns) -> Document:
    text, value = _text(row, used), row.values[used[1]]
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"data: {row.where}: {used[1]!r} is {shown(value)}, expected a finite number to predict")
    return Document(text, name, text.strip(), score=score, where=row.where)


def _text(row: Row, used: tuple[str, ...]) -> str:
    for name in used:
        if name not in row.values:
            raise missing_column(row, name, len(used) > 1)
    return check_text(row.values[used[0]], row.where, used[0])


def _chat(row: Row, name: str, used: tuple[str, ...], columns: Columns) -> Conversation:
    messages = messages_of(row.values[used[0]], row.where, used[0])
    system = row.values.get("system") if "system" in used else None
    if system:
        if messages[0]["role"] == "system":
            raise ValueError(f"data: {row.where}: has a column 'system' and a system message, expected one of them")
        messages = ({"role": "system", "content": check_text(system, row.where, "system")}, *messages)
    return Conversation(messages, name, row.where, tools=tools_of(row.values.get("tools"), row.where))


def _completion(row: Row, name: str, used: tuple[str, ...], columns: Columns) -> Conversation | Completion:
    if used[0] == "instruction":
        return _instruction(row, name)
    prompt, completion = row.values["prompt"], row.values["completion"]
    if is_messages(prompt) and is_messages(completion):
        before = messages_of(prompt, row.where, "prompt")
        return Conversation((*before, *messages_of(completion, row.where, "completion")), name, row.where, len(before))
    if isinstance(prompt, str) and isinstance(completion, str):
        check_text(prompt, row.where, "prompt")
        check_text(completion, row.where, "completion")
        return Completion(prompt, completion, name, row.where)
    raise ValueError(
        f"data: {row.where}: 'prompt' is {shown(prompt)} and 'completion' {shown(completion)}, expected two texts or "
        "two lists of messages"
    )


def _instruction(row: Row, name: str) -> Conversation:
    """Alpaca's form: a conversation of two messages."""
    texts = {
        column: check_text(row.values.get(column) or "", row.where, column)
        for column in ("instruction", "input", "output")
    }
    asked = "\n\n".join(filter(None, (texts["instruction"], texts["input"])))
    question, answer = {"role": "user", "content": asked}, {"role": ASSISTANT, "content": texts["output"]}
    return Conversation((question, answer), name, row.where, asked=1)


def _preference(row: Row, name: str, used: tuple[str, ...], columns: Columns) -> Preference:
    prompt, chosen, rejected = (row.values.get(column) for column in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        check_text(chosen, row.where, "chosen")
        check_text(rejected, row.where, "rejected")
        if prompt is None:
            return Preference(*_beginning_apart(chosen, rejected, row.where), name, row.where)
        if not isinstance(prompt, str):
            raise ValueError(
                f"data: {row.where}: 'prompt' is {shown(prompt)}, expected a text, like 'chosen' and 'rejected'"
            )
        return Preference(check_text(prompt, row.where, "prompt"), chosen, rejected, name, row.where)
    if not (is_messages(chosen) and is_messages(rejected)):
        raise ValueError(
            f"data: {row.where}: 'chosen' is {shown(chosen)} and 'rejected' {shown(rejected)}, expected two texts or "
            "two lists of messages"
        )
    better, worse = (messages_of(row.values[column], row.where, column) for column in ("chosen", "rejected"))
    before, better, worse = _prompt_apart(prompt, better, worse, row.where)
    for column, answer in (("chosen", better), ("rejected", worse)):
        if not answer or answer[-1]["role"] != ASSISTANT:
            raise ValueError(
                f"data: {row.where}: {column!r} does not end with an answer of the assistant after the prompt"
            )
    return Preference(before, better, worse, name, row.where)


def _beginning_apart(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The words with which two texts begin, and the rest of each.

    The exact place of the split does not matter: the shared words count the same for both.
    """
    # Each keeps an answer, even if one is a prefix of the other, and no word is cut.
    longest = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1
    same = next((place for place in range(longest) if chosen[place] != rejected[place]), longest)
    place = next((place for place in range(same, 0, -1) if _between_words(chosen, place)), 0)
    if not chosen[:place].strip():
        raise ValueError(
            f"data: {where}: 'chosen' and 'rejected' do not begin with the same words, and no 'prompt' is given"
        )
    return chosen[:place], chosen[place:], rejected[place:]


def _between_words(text: str, place: int) -> bool:
    return text[place].isspace() or not text[place - 1].isalnum()


_Messages = tuple[Message, ...]


def _prompt_apart(prompt: Any, chosen: _Messages, rejected: _Messages, where: str) -> tuple[_Messages, ...]:
    """The prompt and both answers without it; the prompt may be a column, the beginning of both lists, or both."""
    if prompt is None:
        same = 0
        # The last message of each is an answer, even if both are equal.
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        if same == 0:
            raise ValueError(
                f"data: {where}: 'chosen' and 'rejected' do not begin with the same prompt, and none is given"
            )
        return chosen[:same], chosen[same:], rejected[same:]
    if isinstance(prompt, str):
        given: _Messages = ({"role": "user", "content": check_text(prompt, where, "prompt")},)
    else:
        given = messages_of(prompt, where, "prompt")
    answers = []
    for messages in (chosen, rejected):
        repeated = len(messages) > len(given) and messages[: len(given)] == given
        answers.append(messages[len(given) :] if repeated else messages)
        if not repeated and messages[0]["role"] in ("system", "developer", "user"):
            # A system message may precede a prompt that is the user's text.
            if isinstance(prompt, str) and chosen[:2] == rejected[:2] and chosen[1:2] == given:
                return chosen[:2], chosen[2:], rejected[2:]
            raise ValueError(
                f"data: {where}: 'prompt' is {shown(prompt)}, but the messages of 'chosen' and 'rejected' begin with "
                "a different prompt"
            )
    return (given, *answers)


_MAKERS: dict[str, Callable[[Row, str, tuple[str, ...], Columns], Example]] = {
    TEXT: _document,
    LABELLED: _labelled,
    SCORED: _scored,
    CHAT: _chat,
    COMPLETION: _completion,
    PREFERENCE: _preference,
}


def shared(first: Iterable[Example], second: Set[Any]) -> int:
    """How many of the examples are among these groups."""
    return sum(example.group in second for example in first)
