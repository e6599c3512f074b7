"""Messages of conversations: both usual forms, converted into one."""

from __future__ import annotations

from typing import Any

from ...support.parse import parse_json, shown
from .examples import ASSISTANT, Message, listed

# Names of the speakers; chat templates know those on the right.
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "model", "bot"), ASSISTANT),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
    "developer": "developer",
}


def messages_of(value: Any, where: str, column: str) -> tuple[Message, ...]:
    """The messages of a conversation: `role` and `content`, or ShareGPT's `from` and `value`.

    Raises:
        ValueError: it is not a list of messages, or a message is invalid.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(
            f"data: {where}: {column!r} is {shown(value)}, expected a list of messages, each with a role and a content"
        )
    return tuple(_message(one, f"{where}, {column!r}, message {number}") for number, one in enumerate(value, start=1))


def is_messages(value: Any) -> bool:
    """Whether a value is like messages instead of a text."""
    return isinstance(value, (list, tuple)) and all(isinstance(one, dict) for one in value)


def tools_of(value: Any, where: str) -> tuple[Any, ...] | None:
    """The tools of a conversation: a list, or its JSON text. Raises ValueError for any other value."""
    if isinstance(value, str):
        value = parse_json(value, f"data: {where}, 'tools'") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ValueError(f"data: {where}: 'tools' is {shown(value)}, expected a list of tools")
    return tuple(value)


def check_text(text: Any, where: str, column: str) -> str:
    """The text itself.

    Raises:
        ValueError: it is not a text, or has half a surrogate pair, which JSON can escape but no tokenizer accepts.
    """
    if not isinstance(text, str):
        raise ValueError(f"data: {where}: {column!r} is {type(text).__name__}, expected a text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"data: {where}: {column!r} is no text that UTF-8 can encode: {error}") from error
    return text


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"data: {where}: is {shown(value)}, expected an object with a role and a content")
    given = {name: own for name, own in value.items() if own is not None}  # tables fill missing values with None
    role_name, content_name = ("from", "value") if "from" in given and "role" not in given else ("role", "content")
    role = given.pop(role_name, None)
    if role is None:
        raise ValueError(f"data: {where}: has no role; its entries are {listed(given)}, expected 'role' and 'content'")
    if not isinstance(role, str) or role.strip().lower() not in ROLES:
        raise ValueError(f"data: {where}: {role_name!r} is {shown(role)}, expected one of {listed(ROLES)}")
    content = given.pop(content_name, None)
    if content is None and not given.get("tool_calls"):
        raise ValueError(f"data: {where}: has no content, expected a text under {content_name!r}")
    if given.get("weight", 1) not in (0, 1):
        raise ValueError(f"data: {where}: its weight is {shown(given['weight'])}, expected 0 (no loss) or 1")
    text = check_text(_joined("" if content is None else content, where), where, content_name)
    return {"role": ROLES[role.strip().lower()], "content": text, **given}


def _joined(content: Any, where: str) -> Any:
    """The text of a content that is a list of parts. Raises ValueError if some are not texts."""
    if not (isinstance(content, list) and content and all(isinstance(part, dict) for part in content)):
        return content
    if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
        kinds = sorted({str(part.get("type")) for part in content})
        raise ValueError(f"data: {where}: its content has parts of the types {listed(kinds)}, expected only texts")
    return "".join(part["text"] for part in content)
