"""Conversations and completions as tokens, with the loss on the answers or on all tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import Dataset

from ...support.errors import one_line
from .examples import ASSISTANT, Completion, Conversation, Document, Message, Preference

ANSWERS, ALL = "answers", "all"
IGNORED = -100  # a label without loss

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ADVICE = "with --loss-on all the template need not mark answers"

Span = tuple[int, int]  # characters of a text, the second one exclusive
Place = tuple[int, int, int]  # of a token: its start, its first character that is not blank, its end


class Tokenised(Dataset[dict[str, list[int]]]):
    """Examples as tokens, each cut at its end to the maximum length.

    Attributes:
        cut: the number of cut examples.
        dropped: the number of dropped examples, of which no token with a loss was left.
        tokens: in all items.
        learnt: the number of tokens with a loss.
        said: sentences about these numbers.
    """

    def __init__(self, items: list[dict[str, list[int]]], cut: int, dropped: int, learnt: int, said: list[str]) -> None:
        self._items = items
        self.cut, self.dropped, self.learnt, self.said = cut, dropped, learnt, said
        self.tokens = sum(len(ids) for item in items for name, ids in item.items() if name != "labels")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._items[index]


def chat_dataset(
    examples: Iterable[Conversation | Completion | Document],
    tokenizer: Any,
    length: int,
    loss_on: str = ANSWERS,
    *,
    template: str | None = None,
) -> Tokenised:
    """Conversations, completions and texts as `{"input_ids": [...], "labels": [...]}`.

    The chat template renders a conversation. Its answers are the messages of the assistant with the text that the
    template writes after them, such as an end mark. A completion and a text get the end-of-text token. A label of -100
    has no loss; the first token of each example has this label, since nothing predicts it.

    Args:
        examples: examples of `load_data` of the forms `"chat"`, `"completion"` and `"text"`.
        tokenizer: of the model, with offsets (a fast one).
        length: the most tokens of an example.
        loss_on: `"answers"`, or `"all"`; a text has its loss on all tokens.
        template: a chat template instead of the tokenizer's.

    Raises:
        ValueError: an argument is out of range, a conversation needs a template but there is none, a template refuses a
            conversation or does not mark its answers, a conversation ends without an answer, or no example is left. The
            message names the row.
    """
    if loss_on not in (ANSWERS, ALL):
        raise ValueError(f"loss_on: got {loss_on!r}, expected {ANSWERS!r} or {ALL!r}")
    _check_length(length)
    items, cut, dropped, learnt, count, merged = [], 0, 0, 0, 0, 0
    for example in examples:
        count += 1
        ids, answer, straddles = _tokens(example, tokenizer, loss_on, template)
        merged += straddles
        labels = [own if learn else IGNORED for own, learn in zip(ids, answer, strict=True)][:length]
        labels[:1] = [IGNORED] * len(labels[:1])
        if any(label != IGNORED for label in labels):
            items.append({"input_ids": ids[:length], "labels": labels})
            cut += len(ids) > length
            learnt += sum(label != IGNORED for label in labels)
        else:
            dropped += 1
    said = _counted(count, cut, dropped, length, "answer" if loss_on == ANSWERS else "token to predict")
    if merged:
        said.append(
            f"In {merged:,} of {count:,} examples a token holds the end of the prompt and the beginning of the answer; "
            "it counts as the answer's."
        )
    return Tokenised(items, cut, dropped, learnt, said)


def preference_dataset(
    examples: Iterable[Preference], tokenizer: Any, length: int, *, template: str | None = None
) -> Tokenised:
    """Pairs of answers as `{"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}`, as in TRL's DPO.

    Both answers are cut so that with the prompt they have at most `length` tokens; `cut` counts the pairs with a cut. A
    pair whose prompt alone has that many tokens is dropped.

    Raises:
        ValueError: as `chat_dataset`.
    """
    _check_length(length)
    items, cut, dropped, learnt, count = [], 0, 0, 0, 0
    for example in examples:
        count += 1
        better, worse = (
            _answered(example, answer, tokenizer, template) for answer in (example.chosen, example.rejected)
        )
        # A token with the end of the prompt and the beginning of an answer belongs to the answers.
        prompt = min(better[1], worse[1])
        while better[0][:prompt] != worse[0][:prompt]:
            prompt -= 1
        if prompt >= length:
            dropped += 1
            continue
        cut += max(len(better[0]), len(worse[0])) > length
        item = {"prompt_ids": better[0][:prompt]}
        for name, (ids, _) in (("chosen_ids", better), ("rejected_ids", worse)):
            item[name] = ids[prompt:length]
            learnt += len(item[name])
        items.append(item)
    return Tokenised(items, cut, dropped, learnt, _counted(count, cut, dropped, length, "answer"))


def render(
    messages: Sequence[Message], tokenizer: Any, template: str | None, where: str, ask: bool = False, tools: Any = None
) -> str:
    """A conversation as the chat template renders it; with `ask`, up to the start of the assistant's answer.

    Raises:
        ValueError: there is no template, or it refuses the conversation.
    """
    if template is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "model: its tokenizer has no chat template, which conversations need; pass one by --template FILE, or use "
            "data of 'prompt' and 'completion' as texts, or of 'text'"
        )
    options = {"tokenize": False, "add_generation_prompt": ask, "tools": list(tools) if tools else None}
    try:
        text: str = tokenizer.apply_chat_template(list(messages), chat_template=template, **options)
    except Exception as error:  # templates are programs, and raise what they like
        raise ValueError(f"data: {where}: the chat template refuses the conversation: {one_line(error)}") from error
    return text


def _tokens(
    example: Conversation | Completion | Document, tokenizer: Any, loss_on: str, template: str | None
) -> tuple[list[int], list[bool], bool]:
    """The tokens of an example, which of them have a loss, and whether one of them spans prompt and answer."""
    if isinstance(example, Document):
        ids = _ended(_begun(_encoded(example.text, tokenizer)[0], tokenizer), tokenizer)
        return ids, [True] * len(ids), False
    if isinstance(example, Completion):
        prompt = len(example.prompt)
        ids, places = _encoded(example.text, tokenizer)
        answer = [loss_on == ALL or stop > prompt for _, _, stop in places]
        straddles = any(begin < prompt < stop for begin, _, stop in places)
        front = len(_begun(ids, tokenizer)) - len(ids)
        ids = _ended(_begun(ids, tokenizer), tokenizer)
        answer = [loss_on == ALL] * front + answer
        return ids, answer + [True] * (len(ids) - len(answer)), straddles
    text = render(example.messages, tokenizer, template, example.where, tools=example.tools)
    ids, places = _encoded(text, tokenizer)
    if loss_on == ALL:
        return ids, [True] * len(ids), False
    if example.messages[-1]["role"] != ASSISTANT:
        raise ValueError(
            f"data: {example.where}: its last message is by {example.messages[-1]['role']!r}, expected one by the "
            "assistant; --loss-on all also trains on conversations without a last answer"
        )
    chosen = template if template is not None else tokenizer.get_chat_template(tools=example.tools or None)
    if example.asked == 0 and _MARKED.search(chosen) and not any(map(_weightless, example.messages)):
        return ids, _marked(example, tokenizer, template, ids), False
    spans = _answers(example, text, tokenizer, template)
    # A token that starts in an answer and continues after it is an answer's, unless only leading blanks are in it.
    answer = [any(stop > first and start < last for first, last in spans) for _, start, stop in places]
    return ids, answer, any(begin < first < stop for first, _ in spans for begin, _, stop in places)


def _weightless(message: Message) -> bool:
    """Whether a message has a weight of 0, as in OpenAI's form: it is read, but has no loss."""
    return message.get("weight") == 0


def _answers(example: Conversation, text: str, tokenizer: Any, template: str | None) -> list[Span]:
    """The positions of the answers in a rendered conversation: each starts at the end of the conversation before it."""
    spans = []
    for place, message in enumerate(example.messages):
        if message["role"] != ASSISTANT or place < example.asked or _weightless(message):
            continue
        if place == 0:
            raise ValueError(
                f"data: {example.where}: its first message is by the assistant, expected a prompt before it; {_ADVICE}"
            )
        ends = []
        for count, ask in ((place, True), (place + 1, False)):
            part = render(example.messages[:count], tokenizer, template, example.where, ask, example.tools)
            if not text.startswith(part):
                raise ValueError(
                    f"data: {example.where}: the chat template renders the first {count} messages differently when "
                    f"more follow, so the answers cannot be located; {_ADVICE}"
                )
            ends.append(len(part))
        spans.append((ends[0], ends[1]))
    return spans


def _marked(example: Conversation, tokenizer: Any, template: str | None, ids: list[int]) -> list[bool]:
    """The tokens that the template marks as generated by the assistant."""
    found = tokenizer.apply_chat_template(
        list(example.messages),
        chat_template=template,
        tools=list(example.tools) if example.tools else None,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    if list(found["input_ids"]) != ids or 1 not in found["assistant_masks"]:
        raise ValueError(f"data: {example.where}: the chat template marks no answer in the conversation; {_ADVICE}")
    return [bool(own) for own in found["assistant_masks"]]


def _answered(
    example: Preference, answer: str | tuple[Message, ...], tokenizer: Any, template: str | None
) -> tuple[list[int], int]:
    """The tokens of a prompt with an answer, and the number of tokens in the prompt."""
    if isinstance(example.prompt, str):
        assert isinstance(answer, str)  # all three are texts, or none is
        ids, places = _encoded(example.prompt + answer, tokenizer)
        front = len(_begun(ids, tokenizer)) - len(ids)
        inside = sum(stop <= len(example.prompt) for _, _, stop in places)
        return _ended(_begun(ids, tokenizer), tokenizer), front + inside
    prompt = render(example.prompt, tokenizer, template, example.where, ask=True)
    text = render((*example.prompt, *answer), tokenizer, template, example.where)
    if not text.startswith(prompt):
        raise ValueError(
            f"data: {example.where}: the chat template renders the prompt differently when an answer follows, "
            "so the answers cannot be located"
        )
    ids, places = _encoded(text, tokenizer)
    return ids, sum(stop <= len(prompt) for _, _, stop in places)


def _encoded(text: str, tokenizer: Any) -> tuple[list[int], list[Place]]:
    """The tokens of a text, and the characters of each; together they cover the text."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"model: its tokenizer {type(tokenizer).__name__} gives no offsets, expected a fast tokenizer")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places: list[Place] = []
    end = 0
    for start, stop in found["offset_mapping"]:
        # Blanks may be missing from offsets, and all tokens of one character have the same offsets.
        begin = min(start, end)
        places.append((begin, start if start < stop else begin, stop))
        end = max(end, stop)
    return list(found["input_ids"]), places


def _begun(ids: list[int], tokenizer: Any) -> list[int]:
    """With the beginning-of-text token in front, if the tokenizer itself adds one."""
    begin = tokenizer.bos_token_id
    if begin is None or ids[:1] == [begin]:
        return ids
    return [begin, *ids] if list(tokenizer("a", verbose=False)["input_ids"])[:1] == [begin] else ids


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With the end-of-text token at the end."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _check_length(length: int) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise ValueError(f"length: got {length!r}, expected at least 2 tokens")


def _counted(count: int, cut: int, dropped: int, length: int, what: str) -> list[str]:
    """Sentences about cut or dropped examples. Raises ValueError if no example is left."""
    if count == 0:
        raise ValueError("data: there are no examples")
    if dropped == count:
        raise ValueError(
            f"data: no {what} of its {count:,} examples is within their first {length:,} tokens (--length)"
        )
    said = []
    if cut:
        said.append(f"{cut:,} of {count:,} examples cut to {length:,} tokens.")
    if dropped:
        said.append(f"{dropped:,} of {count:,} examples dropped: no {what} is within their first {length:,} tokens.")
    return said
