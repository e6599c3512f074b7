"""Conversations as tokens: the model's own template, and the loss on the answers alone, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_folders
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from red_kernels.finetune import data

ASK = "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
PLAIN = "{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}" + ASK
MARKED = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m['content'] + '<|end|>\\n' }}{% endif %}"
    "{% endfor %}" + ASK
)
# Thoughts stay in the last answer only, as in models that reason.
FORGETTING = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('=')[-1] }}{{ '<|end|>\\n' }}{% endfor %}" + ASK
)
REFUSING = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)
TALK = (
    ("system", "Cook."),
    ("user", "Why salt?"),
    ("assistant", " It helps é."),
    ("user", "So?"),
    ("assistant", "Aye!"),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens hold several characters, and whose characters may take several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.post_processor = processors.ByteLevel(trim_offsets=True)  # blanks are in no offsets
    made.decoder = decoders.ByteLevel()
    corpus = ["Why salt? It helps. So? Aye! Cook. assistant user system " * 3] * 20
    special = ["<|start|>", "<|end|>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", chat_template=PLAIN)


def talk(*turns: tuple[str, str], asked: int = 0, where: str = "a.jsonl, line 1") -> data.Conversation:
    return data.Conversation(tuple({"role": role, "content": text} for role, text in turns), "a", where, asked)


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def answers(tokenizer: Any, example: Any, **options: Any) -> list[str]:
    """The texts that have a loss."""
    [item] = data.chat_dataset([example], tokenizer, 500, **options)
    found: list[list[int]] = []
    before = False
    for own, label in zip(item["input_ids"], item["labels"], strict=True):
        assert label in (own, -100)
        if label != -100:
            if not before:
                found.append([])
            found[-1].append(own)
        before = label != -100
    return [text_of(tokenizer, ids) for ids in found]


def test_loss_on_the_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    assert answers(tokenizer, talk(*TALK)) == [" It helps é.<|end|>\n", "Aye!<|end|>\n"]
    assert answers(tokenizer, talk(*TALK), template=MARKED) == [" It helps é.<|end|>", "Aye!<|end|>"]
    assert answers(tokenizer, talk(*TALK[:3], TALK[4])) == [" It helps é.<|end|>\n", "Aye!<|end|>\n"]
    [item] = data.chat_dataset([talk(*TALK)], tokenizer, 500)
    assert item["input_ids"] == tokenizer.apply_chat_template(list(talk(*TALK).messages), return_dict=True)["input_ids"]
    assert any(len(token) > 2 for token in tokenizer.convert_ids_to_tokens(item["input_ids"]))  # bytes would be easier


def test_the_marks_of_a_template_say_the_same_as_its_prefixes(tokenizer: PreTrainedTokenizerFast) -> None:
    """But for what the template writes behind an answer."""
    [marked] = data.chat_dataset([talk(*TALK)], tokenizer, 500, template=MARKED)
    [plain] = data.chat_dataset([talk(*TALK)], tokenizer, 500)
    assert marked["input_ids"] == plain["input_ids"]
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    without = [
        -100 if [own] == line and before != -100 else own
        for before, own in zip([-100, *plain["labels"]], plain["labels"], strict=False)
    ]
    assert marked["labels"] == without


@pytest.mark.parametrize("blanks", ["  ", "\n\n", "\t", " é  "])
def test_blanks_around_answers_are_the_answers(blanks: str, tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (("user", f"Why?{blanks}"), ("assistant", f"{blanks}So.{blanks}"))
    assert answers(tokenizer, talk(*turns)) == [f"{blanks}So.{blanks}<|end|>\n"]


def test_blanks_with_nothing_behind_them(tokenizer: PreTrainedTokenizerFast) -> None:
    """The last one before another message is in the token of that message's first word, and not learnt."""
    bare = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    example = talk(("user", "a"), ("assistant", "b  "), ("user", "c"), ("assistant", "d  "))
    assert answers(tokenizer, example, template=bare) == ["b ", "d  "]


def test_loss_on_all(tokenizer: PreTrainedTokenizerFast) -> None:
    [item] = data.chat_dataset([talk(*TALK[:4])], tokenizer, 500, "all")
    assert item["labels"] == [-100, *item["input_ids"][1:]]
    [item] = data.chat_dataset([talk(*TALK)], tokenizer, 500, "all", template=FORGETTING)
    assert -100 not in item["labels"][1:]


def test_a_prompt_of_messages_has_no_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (None, MARKED):
        example = talk(*TALK, asked=4)
        assert [text.strip() for text in answers(tokenizer, example, template=template)] == ["Aye!<|end|>"]


def test_an_answer_of_no_weight_is_not_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    example = talk(*TALK)
    for weights, wanted in (((0, 1), ["Aye!<|end|>"]), ((1, 0), ["It helps é.<|end|>"])):
        for message, weight in zip((example.messages[2], example.messages[4]), weights, strict=True):
            message["weight"] = weight
        for template in (None, MARKED):
            assert [text.strip() for text in answers(tokenizer, example, template=template)] == wanted


def test_tools_reach_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{{ tools[0]['name'] + ':' if tools }}" + PLAIN
    example = data.Conversation(talk(*TALK[1:3]).messages, "a", "a", tools=({"name": "add"},))
    [item] = data.chat_dataset([example], tokenizer, 500, template=template)
    assert text_of(tokenizer, item["input_ids"]).startswith("add:<|start|>user")
    assert answers(tokenizer, example, template=template) == [" It helps é.<|end|>\n"]


def test_completions_and_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    example = data.Completion("Why salt?", " It helps", "a", "a")
    assert answers(tokenizer, example) == [" It helps<eos>"]
    [item] = data.chat_dataset([example], tokenizer, 500, "all")
    assert item["labels"] == [-100, *item["input_ids"][1:]]
    [item] = data.chat_dataset([data.Document("Why salt?", "a", "a")], tokenizer, 500)
    assert text_of(tokenizer, item["input_ids"]) == "Why salt?<eos>"
    assert item["labels"] == [-100, *item["input_ids"][1:]]
    [item] = data.chat_dataset([data.Completion("Why salt?", " It helps<eos>", "a", "a")], tokenizer, 500)
    assert item["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_token_of_prompt_and_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    [joined] = tokenizer(" salt", add_special_tokens=False)["input_ids"]  # else the test says nothing
    made = data.chat_dataset(
        [data.Completion(" sa", "lt", "a", "a"), data.Completion("Why?", "lt", "a", "a")], tokenizer, 9
    )
    assert made.said == [
        "In 1 of 2 examples a token holds the end of the prompt and the beginning of the answer; "
        "it counts as the answer's."
    ]
    assert made[0]["input_ids"] == [joined, tokenizer.eos_token_id]
    blank = data.chat_dataset([data.Completion("Why? ", "salt", "a", "a")], tokenizer, 9)
    assert blank.said[0].startswith("In 1 of 1 examples a token holds")


def test_the_beginning_of_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Where the tokenizer puts a token in front, a completion and a text have it; a chat has what the template says."""
    made = tiny_folders.tokenizer()
    made.add_special_tokens({"bos_token": "<bos>"})
    begin = made.bos_token_id
    made._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", begin)]
    )
    [item] = data.chat_dataset([data.Completion("ab", "cd", "a", "a")], made, 50)
    assert item["input_ids"][0] == begin
    assert item["input_ids"].count(begin) == 1
    assert text_of(made, [own for own in item["labels"] if own != -100]) == "cd<eos>"
    [pair] = data.preference_dataset([data.Preference("ab", "cd", "ef", "a", "a")], made, 50)
    assert pair["prompt_ids"][0] == begin
    [chat] = data.chat_dataset([talk(*TALK[1:3])], made, 500, template=PLAIN)
    assert begin not in chat["input_ids"]


def test_what_is_cut_and_dropped_is_counted() -> None:
    """One token a byte: 17 and more before the answer of two, an end and a line's end."""
    made = tiny_folders.tokenizer()
    examples = [data.Completion("p" * size, "a" * 4, "a", "a") for size in (3, 5, 6, 9, 10, 11)]
    found = data.chat_dataset(examples, made, 10)
    assert (len(found), found.cut, found.dropped) == (4, 2, 2)
    assert found.tokens == 8 + 10 + 10 + 10
    assert found.learnt == 5 + 5 + 4 + 1
    assert found.said == [
        "2 of 6 examples cut to 10 tokens.",
        "2 of 6 examples dropped: no answer is within their first 10 tokens.",
    ]
    with pytest.raises(ValueError, match=r"no answer of its 6 examples is within their first 2 tokens \(--length\)"):
        data.chat_dataset(examples, made, 2)


@pytest.mark.parametrize(
    ("turns", "template", "message"),
    [
        (TALK[:4], None, "its last message is by 'user', expected one by the assistant; --loss-on all"),
        (TALK[2:], None, "its first message is by the assistant"),
        (
            (("user", "a"), ("assistant", "think=b"), ("user", "c"), ("assistant", "d")),
            FORGETTING,
            "renders the first 2 messages differently .*--loss-on all",
        ),
        (TALK, REFUSING, "the chat template refuses the conversation: .*no system"),
        (TALK, PLAIN + "{% if false %}{% generation %}{% endgeneration %}{% endif %}", "marks no answer"),
        (TALK, "{{ no such thing", "the chat template refuses"),
    ],
)
def test_conversations_that_do_not_fit(
    turns: tuple[tuple[str, str], ...], template: str | None, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=f"data: b.jsonl, line 7: .*{message}"):
        data.chat_dataset([talk(*turns, where="b.jsonl, line 7")], tokenizer, 500, template=template)


def test_a_template_that_forgets_is_right_for_one_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    example = talk(("user", "a"), ("assistant", "think=b"))
    assert answers(tokenizer, example, template=FORGETTING) == ["think=b<|end|>\n"]


def test_arguments_that_do_not_fit(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"its tokenizer has no chat template, .*'prompt' and 'completion'"):
        data.chat_dataset([talk(*TALK)], tiny_folders.tokenizer(), 500)
    with pytest.raises(ValueError, match="loss_on: got 'some', expected 'answers' or 'all'"):
        data.chat_dataset([talk(*TALK)], tokenizer, 500, "some")
    for length in (1, True, 2.5):
        with pytest.raises(ValueError, match="length: got"):
            data.chat_dataset([talk(*TALK)], tokenizer, length)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there are no examples"):
        data.chat_dataset([], tokenizer, 500)


def test_pairs_of_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = talk(*TALK).messages
    example = data.Preference(messages[:4], messages[4:], ({"role": "assistant", "content": "No é"},), "a", "a")
    [pair] = data.preference_dataset([example], tokenizer, 500)
    wanted = tokenizer.apply_chat_template(list(messages[:4]), add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert pair["prompt_ids"] == wanted
    assert text_of(tokenizer, pair["chosen_ids"]) == "Aye!<|end|>\n"
    assert text_of(tokenizer, pair["rejected_ids"]) == "No é<|end|>\n"


def test_pairs_of_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    """A token of prompt and answer is the answer's, for both answers alike."""
    [pair] = data.preference_dataset([data.Preference("Why sa", "lt", "x", "a", "a")], tokenizer, 50)
    whole = [text_of(tokenizer, pair["prompt_ids"] + pair[name]) for name in ("chosen_ids", "rejected_ids")]
    assert whole == ["Why salt<eos>", "Why sax<eos>"]
    assert text_of(tokenizer, pair["prompt_ids"]) == "Why"


def test_pairs_that_are_cut_and_dropped() -> None:
    made = tiny_folders.tokenizer()
    pairs = [data.Preference("p" * size, "a" * 4, "b" * 2, "a", "a") for size in (3, 7, 10)]
    found = data.preference_dataset(pairs, made, 10)
    assert (len(found), found.cut, found.dropped) == (2, 1, 1)
    assert [len(found[1][name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [7, 3, 3]
    assert found.tokens == 3 + 5 + 3 + 7 + 3 + 3
    assert found.learnt == 5 + 3 + 3 + 3
    with pytest.raises(ValueError, match="no answer of its 3 examples"):
        data.preference_dataset(pairs, made, 2)
