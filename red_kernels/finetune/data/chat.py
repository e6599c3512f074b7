"""Conversations and completions as tokens, with the loss on the answers or on everything."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import Dataset

from ...support.errors import one_line
from .examples import ASSISTANT, Completion, Conversation, Document, Message, Preference

ANSWERS, ALL = "answers", "all"
IGNORED = -100  # a label that has no loss

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ADVICE = "with --loss-on all the template need not mark answers"

Span = tuple[int, int]  # characters of a text, the second one behind the last
Place = tuple[int, int, int]  # of a token: where it begins, where its first character that is no blank is, its end


class Tokenised(Dataset[dict[str, list[int]]]):
    """Examples as tokens, each cut at its end to the most tokens that it may have.

    Attributes:
        cut: how many examples were cut.
        dropped: how many were left out, as nothing to learn was left of them.
        tokens: in all items.
        learnt: the tokens that have a loss.
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

    A conversation is written by the chat template. Its answers are the messages of the assistant with everything that
    the template writes behind them, such as the mark of their end. A completion and a text get the end-of-text token.
    A label of -100 has no loss; the first token of each example has this label, as nothing predicts it.

    Args:
        examples: what `load_data` gives for the forms `"chat"`, `"completion"` and `"text"`.
        tokenizer: of the model, with offsets (a fast one).
        length: the most tokens of an example.
        loss_on: `"answers"`, or `"all"`; a text has its loss on all tokens.
        template: a chat template in place of the tokenizer's.

    Raises:
        ValueError: an argument is out of range, a conversation needs a template and there is none, a template refuses
            a conversation or does not tell where its answers are, a conversation ends without an answer, or no example
            is left. The message names the row.
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
    """Pairs of answers as `{"prompt_ids": [...], "chosen_ids": [...], "rejected_ids": [...]}`, as TRL's DPO has them.

    Both answers are cut so that with the prompt they have `length` tokens at most; `cut` counts the pairs where one
    was. A pair whose prompt alone is as long is dropped.

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
        # Where a token holds the end of the prompt and the beginning of an answer, it belongs to the answers.
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
    """A conversation as the chat template writes it; with `ask`, up to where the assistant is to answer.

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
    """The tokens of an example, which of them are learnt, and whether one of them straddles prompt and answer."""
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
    # A token that begins in an answer and goes on behind it is an answer's, but not for a blank in front alone.
    answer = [any(stop > first and start < last for first, last in spans) for _, start, stop in places]
    return ids, answer, any(begin < first < stop for first, _ in spans for begin, _, stop in places)


def _weightless(message: Message) -> bool:
    """Whether a message has a weight, as OpenAI's form has, of 0: it is read, and not learnt."""
    return message.get("weight") == 0


def _answers(example: Conversation, text: str, tokenizer: Any, template: str | None) -> list[Span]:
    """Where in a rendered conversation its answers are: each begins where the conversation before it ends."""
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
    """Which tokens the template marks as generated by the assistant."""
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
    """The tokens of a prompt with an answer, and how many of them lie within the prompt."""
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
    """The tokens of a text, and which characters each of them covers: all of the text is covered."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"model: its tokenizer {type(tokenizer).__name__} gives no offsets, expected a fast tokenizer")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places: list[Place] = []
    end = 0
    for start, stop in found["offset_mapping"]:
        # Blanks may be left out of offsets, and all tokens of one character have the same.
        begin = min(start, end)
        places.append((begin, start if start < stop else begin, stop))
        end = max(end, stop)
    return list(found["input_ids"]), places


def _begun(ids: list[int], tokenizer: Any) -> list[int]:
    """With the token of the beginning in front, where the tokenizer itself puts one."""
    begin = tokenizer.bos_token_id
    if begin is None or ids[:1] == [begin]:
        return ids
    return [begin, *ids] if list(tokenizer("a", verbose=False)["input_ids"])[:1] == [begin] else ids


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """With the end-of-text token behind."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _check_length(length: int) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise ValueError(f"length: got {length!r}, expected at least 2 tokens")


def _counted(count: int, cut: int, dropped: int, length: int, what: str) -> list[str]:
    """Sentences about examples that were cut or dropped. Raises ValueError if none is left."""
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
