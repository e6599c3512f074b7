"""Data as people have it: chat, completions, preferences, texts; all kinds of files; several sources; validation."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from red_kernels.finetune import data

QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(folder: Path, name: str, *rows: Any) -> str:
    """A file of JSON Lines."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(*values: str) -> list[dict[str, str]]:
    return [{"text": value} for value in values]


def load(source: Any, **options: Any) -> data.Loaded:
    return data.load_data(source, options.pop("columns", data.Columns()), options.pop("task", "causal-lm"), **options)


def everything(loaded: data.Loaded) -> list[Any]:
    return [*loaded.train, *loaded.held_out]


def one_of(folder: Path, row: dict[str, Any], form: str) -> Any:
    """The example that a row stands for."""
    path = write(folder, "a.jsonl", row)
    loaded = load(path, validation=path)
    assert loaded.form == form
    return loaded.train[0]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [SYSTEM, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, [QUESTION, ANSWER]),
        (
            {
                "conversations": [{"from": "user", "value": "Why?"}, {"from": "model", "value": "So."}],
                "system": "Be brief.",
            },
            [SYSTEM, QUESTION, ANSWER],
        ),
        ({"conversations": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
                    ANSWER,
                ]
            },
            [QUESTION, ANSWER],
        ),
        ({"messages": [{**QUESTION, "name": None}, {**ANSWER, "name": "A"}]}, [QUESTION, {**ANSWER, "name": "A"}]),
        (
            {
                "messages": [
                    {"role": "function", "content": "3"},
                    {"role": "assistant", "content": None, "tool_calls": [1]},
                ]
            },
            [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "", "tool_calls": [1]}],
        ),
    ],
)
def test_chat(row: dict[str, Any], messages: list[dict[str, Any]], tmp_path: Path) -> None:
    example = one_of(tmp_path, row, "chat")
    assert list(example.messages) == messages
    assert example.asked == 0
    assert example.where == "a.jsonl, line 1"


def test_tools(tmp_path: Path) -> None:
    for tools in ([{"name": "add"}], '[{"name": "add"}]'):
        example = one_of(tmp_path, {"messages": [QUESTION, ANSWER], "tools": tools}, "chat")
        assert example.tools == ({"name": "add"},)


def test_completions(tmp_path: Path) -> None:
    plain = one_of(tmp_path, {"prompt": "Why?", "completion": " So."}, "completion")
    assert (plain.prompt, plain.completion) == ("Why?", " So.")
    chat = one_of(tmp_path, {"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]}, "completion")
    assert (list(chat.messages), chat.asked) == ([SYSTEM, QUESTION, ANSWER], 2)
    alpaca = one_of(tmp_path, {"instruction": "Add.", "input": "1 and 2", "output": "3"}, "completion")
    assert [message["content"] for message in alpaca.messages] == ["Add.\n\n1 and 2", "3"]
    assert alpaca.asked == 1
    without = one_of(tmp_path, {"instruction": "Sing.", "input": "", "output": "La"}, "completion")
    assert without.messages[0]["content"] == "Sing."


BETTER, WORSE = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [QUESTION, BETTER], "rejected": [QUESTION, WORSE]},
        {"prompt": [QUESTION], "chosen": [BETTER], "rejected": [WORSE]},
        {"prompt": [QUESTION], "chosen": [QUESTION, BETTER], "rejected": [QUESTION, WORSE]},
        {"prompt": "Why?", "chosen": [QUESTION, BETTER], "rejected": [QUESTION, WORSE]},
        {"prompt": "Why?", "chosen": [BETTER], "rejected": [WORSE], "messages": [QUESTION]},
    ],
)
def test_preferences_of_messages(row: dict[str, Any], tmp_path: Path) -> None:
    example = one_of(tmp_path, row, "preference")
    assert (example.prompt, example.chosen, example.rejected) == ((QUESTION,), (BETTER,), (WORSE,))


def test_preferences(tmp_path: Path) -> None:
    texts = one_of(tmp_path, {"prompt": "Why?", "chosen": " Yes.", "rejected": " No."}, "preference")
    assert (texts.prompt, texts.chosen, texts.rejected) == ("Why?", " Yes.", " No.")
    row = {
        "chosen": [SYSTEM, QUESTION, ANSWER, QUESTION, BETTER],
        "rejected": [SYSTEM, QUESTION, ANSWER, QUESTION, WORSE],
    }
    assert one_of(tmp_path, row, "preference").prompt == (SYSTEM, QUESTION, ANSWER, QUESTION)
    row = {"prompt": "Why?", "chosen": [SYSTEM, QUESTION, BETTER], "rejected": [SYSTEM, QUESTION, WORSE]}
    assert one_of(tmp_path, row, "preference").prompt == (SYSTEM, QUESTION)


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        (
            "\n\nHuman: Why?\n\nAssistant: Help.",
            "\n\nHuman: Why?\n\nAssistant: Hello.",
            "\n\nHuman: Why?\n\nAssistant: ",
        ),
        ("Why? So.", "Why? So. And so on.", "Why? "),  # one is the beginning of the other
        ("Why? So.", "Why? So.", "Why? "),
        ("问：为什么？答：是", "问：为什么？答：否", "问：为什么？答："),
    ],
)
def test_a_prompt_that_both_texts_begin_with(chosen: str, rejected: str, prompt: str, tmp_path: Path) -> None:
    found = one_of(tmp_path, {"chosen": chosen, "rejected": rejected}, "preference")
    assert found.prompt == prompt
    assert (found.prompt + found.chosen, found.prompt + found.rejected) == (chosen, rejected)
    assert found.chosen.strip()
    assert found.rejected.strip()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Why?"}, "'messages' is 'Why\\?', expected a list of messages"),
        ({"messages": []}, "'messages' is \\[\\], expected a list"),
        ({"messages": [QUESTION, "So."]}, "'messages', message 2: is 'So.', expected an object with a role"),
        ({"messages": [{"content": "Why?"}]}, "message 1: has no role; its entries are 'content'"),
        ({"messages": [{"role": "user"}]}, "message 1: has no content, expected a text under 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1: 'content' is int, expected a text"),
        ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, "message 2: its weight is 0.5, expected 0"),
        ({"messages": [{"role": "king", "content": "We"}]}, "'role' is 'king', expected one of 'user', 'human'"),
        ({"conversations": [{"from": "king", "value": "We"}]}, "'from' is 'king'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "parts of the types 'image', expected only texts",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "no text that UTF-8 can encode"),
        ({"messages": [QUESTION], "conversations": [QUESTION]}, "both 'messages' and 'conversations'"),
        ({"messages": [QUESTION], "tools": 3}, "'tools' is 3, expected a list"),
        ({"conversations": [SYSTEM, QUESTION], "system": "Be."}, "column 'system' and a system message"),
        ({"prompt": "Why?", "completion": [ANSWER]}, "expected two texts or two lists of messages"),
        ({"prompt": 3, "completion": "So."}, "'prompt' is 3 and"),
        ({"chosen": "Yes.", "rejected": "No."}, "do not begin with the same words, and no 'prompt' is given"),
        ({"chosen": "Why?\n", "rejected": "Why? No."}, "do not begin with the same words"),  # blanks are no answer
        ({"prompt": None, "chosen": "Yes", "rejected": "Yeah"}, "do not begin with the same words"),
        ({"prompt": [QUESTION], "chosen": "Yes.", "rejected": "No."}, "expected a text, like 'chosen'"),
        ({"prompt": "Why?", "chosen": "Yes.", "rejected": 3}, "'chosen' is 'Yes.' and 'rejected' 3"),
        ({"chosen": [BETTER], "rejected": [WORSE]}, "do not begin with the same prompt"),
        ({"chosen": [QUESTION, BETTER], "rejected": [QUESTION, QUESTION]}, "'rejected' does not end with an answer"),
        (
            {"prompt": "How?", "chosen": [QUESTION, BETTER], "rejected": [QUESTION, WORSE]},
            "begin with a different prompt",
        ),
        (
            {"prompt": None, "completion": "a"},
            "its columns are 'prompt', 'completion' \\(without a value: 'prompt'\\);",
        ),
        ({"story": "a"}, "no column 'text'; its columns are 'story'; .*'messages' or 'conversations' \\(chat\\)"),
    ],
)
def test_rows_out_of_form(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"messages": [QUESTION, ANSWER]} if "messages" in row and len(row) == 1 else row
    path = write(tmp_path, "a.jsonl", good, row)
    with pytest.raises(ValueError, match=f"a.jsonl, line [12].*{message}") as raised:
        load(path)
    assert "--no-header" not in str(raised.value)


def test_a_chat_file_where_texts_are_wanted(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", {"messages": [QUESTION, ANSWER]})
    with pytest.raises(ValueError, match="no column 'text'; its columns are 'messages'") as raised:
        load(path, task="classification")
    assert "--no-header" not in str(raised.value)
    (tmp_path / "a.csv").write_text("one,two\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 2: has no column 'text'.*--no-header"):
        load(str(tmp_path / "a.csv"))


def test_mixed_forms(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", {"text": "a"}, {"messages": [QUESTION, ANSWER]})
    with pytest.raises(ValueError, match=r"line 2: is of the form 'chat' .* expected 'text', as a.jsonl, line 1 is"):
        load(path)
    other = write(tmp_path, "b.jsonl", {"prompt": "a", "completion": "b"})
    first = write(tmp_path, "c.jsonl", {"text": "a"})
    with pytest.raises(ValueError, match=r"b.jsonl, line 1: is of the form 'completion'"):
        load([first, other])
    (tmp_path / "d.txt").write_text("some text\n")
    with pytest.raises(ValueError, match=r"d.txt' is of the form 'text', the other data of 'completion'"):
        load([other, str(tmp_path / "d.txt")])


def test_a_form_that_is_asked_for(tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, {**ANSWER, "content": str(i)}], "text": f"t{i}"} for i in range(9)]
    path = write(tmp_path, "a.jsonl", *rows)
    assert load(path).form == "chat"
    assert "a.jsonl: 9 conversations; columns not used: 'text'." in load(path).said
    assert load(path, form="text").form == "text"
    assert load(path, columns=data.Columns(text="text")).form == "text"
    with pytest.raises(ValueError, match=r"is of the form 'text'.*expected 'preference'"):
        load(path, form="preference")
    with pytest.raises(ValueError, match="form: got 'poem'"):
        load(path, form="poem")


def test_scores(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", *({"text": f"t{i}", "label": i / 2} for i in range(8)))
    loaded = load(path, task="regression")
    assert loaded.form == "scored"
    assert sorted(one.score for one in everything(loaded)) == [i / 2 for i in range(8)]
    for value in ("nan", True, None, "much", 10**400):
        with pytest.raises(ValueError, match=r"line 1: 'label' is .*, expected a finite number"):
            load(write(tmp_path, "b.jsonl", {"text": "a", "label": value}), task="regression")
    with pytest.raises(
        ValueError, match="task: got 'chess', expected one of 'causal-lm', 'classification', 'regression'"
    ):
        load(path, task="chess")


LINES = "".join(json.dumps(row) + "\n" for row in texts("one", "two", "three")).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](LINES[:15]) + PACK[suffix](LINES[15:]))  # as such files are joined
    assert [one.text for one in load(str(path), validation=str(path)).train] == ["one", "two", "three"]
    for damaged in (PACK[suffix](LINES)[:-9], b"not compressed"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"a.jsonl{suffix}' is damaged or no {suffix} file"):
            load(str(path))


def test_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.jsonl.zst"
    parts = [arrow.compress(part, codec="zstd", asbytes=True) for part in (LINES[:15], LINES[15:])]
    path.write_bytes(b"".join(parts))
    assert [one.text for one in load(str(path), validation=str(path)).train] == ["one", "two", "three"]
    path.write_bytes(parts[0][:-2])
    with pytest.raises(ValueError, match=r"is damaged or no \.zst file"):
        load(str(path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"a \.zst file needs the package 'pyarrow': pip install pyarrow"):
        load(str(path))


def test_compressed_texts_and_tables(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text\n" * 20))
    assert load(str(tmp_path / "a.txt.gz")).train[0].text.startswith("some text\n")
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress(b"text\none\ntwo\n"))
    assert len(everything(load(str(tmp_path / "a.csv.xz")))) == 2
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert len(everything(load(str(tmp_path / "a.parquet.gz")))) == 2
    with pytest.raises(FileNotFoundError, match=r"the file .*b\.json\.gz' does not exist"):
        load(str(tmp_path / "b.json.gz"))


@pytest.mark.parametrize(
    ("content", "wheres"),
    [
        ('[{"text": "a"},\n {"text": "b"}]', ["a.json, row 1", "a.json, row 2"]),
        ('{"version": 2, "data": [{"text": "a"}, {"text": "b"}]}', ["a.json, row 1", "a.json, row 2"]),
        ('{"text": "a"}\n\n{"text": "b"}\n', ["a.json, line 1", "a.json, line 3"]),
    ],
)
def test_json(content: str, wheres: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    loaded = load(str(tmp_path / "a.json"), validation=str(tmp_path / "a.json"))
    assert [(one.text, one.where) for one in loaded.train] == list(zip("ab", wheres, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": [], "b": []}', "an object with 2 lists among 'a', 'b'"),
        ('{"a": 1}', "an object with 0 lists"),
        ('[{"text": "a"}, 3]', "row 2: is a int, expected an object"),
        ('[{"text": "a", "text": "b"}]', "row 1: has 'text' twice"),
        ('[{"text": "a"}', "a.json: is not JSON"),
        ('{"text": "a"}\n{"text": ', "line 2: is not JSON"),
        ("[]", "holds no documents"),
    ],
)
def test_wrong_json(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "a.json"))


def test_a_single_conversation_in_a_json_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"messages": [QUESTION, ANSWER]}))
    with pytest.raises(ValueError, match="holds 1 different document"):
        load(str(tmp_path / "a.json"))


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"messages": [QUESTION, {**ANSWER, "content": str(i)}]} for i in range(9)])
    table.save_to_disk(tmp_path / "one")
    found = load(str(tmp_path / "one"))
    assert found.form == "chat"
    assert sorted(one.where for one in everything(found)) == [f"one, row {i}" for i in range(1, 10)]
    splits = datasets.DatasetDict({"train": table, "test": table.select([0, 1])})
    splits.save_to_disk(tmp_path / "several")
    folder = str(tmp_path / "several")
    assert len(everything(load(folder))) == 9
    assert "several: the split 'train' is read, not 'test'." in load(folder).said
    apart = load(folder, validation=folder)
    assert (len(apart.train), len(apart.held_out)) == (9, 2)
    datasets.DatasetDict({"odd": table}).save_to_disk(tmp_path / "odd")
    with pytest.raises(ValueError, match="has the splits 'odd', expected 'train'"):
        load(str(tmp_path / "odd"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="is a folder, but not of datasets' save_to_disk"):
        load(str(tmp_path / "none"))
    (tmp_path / "none" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="none' could not be loaded by datasets"):
        load(str(tmp_path / "none"))


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def answer(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        if split == "validation":
            raise ValueError("no such split")
        return datasets.Dataset.from_list(texts("a", "b", "c"))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert (
        len(
            load(
                "some/set",
                subset="en",
                validation="some/set",
            ).held_out
        )
        == 3
    )
    assert asked == [("some/set", "en", "train"), ("some/set", "en", "validation"), ("some/set", "en", "test")]
    with pytest.raises(FileNotFoundError, match="neither a file nor the id of a dataset"):
        load("no/such/file")


def test_several_sources(tmp_path: Path) -> None:
    one = write(tmp_path, "a.jsonl", *texts(*(f"a{i}" for i in range(10))))
    (tmp_path / "b.csv").write_text("text,id\n" + "".join(f"b{i},{i}\n" for i in range(5)))
    (tmp_path / "c.txt").write_text("line of a text\n" * 40)
    found = load([one, str(tmp_path / "b.csv"), str(tmp_path / "c.txt")], held_out=0.2)
    assert len(everything(found)) == 17
    assert found.said == [
        "a.jsonl: 10 documents.",
        "b.csv: 5 documents; columns not used: 'id'.",
        "c.txt: a text of 600 characters.",
    ]
    assert [one.name for one in found.train if "c.txt" in one.name] == ["c.txt (first part)"]
    assert [one.name for one in found.held_out if "c.txt" in one.name] == ["c.txt (last part)"]
    for wrong in ([], "", [3]):
        with pytest.raises(ValueError, match=r"data: got .* expected one or several"):
            load(wrong)


def test_texts_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("line of a text\n" * 40)
    (tmp_path / "b.txt").write_text("another text\n" * 40)
    found = load([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    assert [one.name for one in found.held_out] == ["a.txt (last part)", "b.txt (last part)"]
    apart = load(str(tmp_path / "a.txt"), validation=[str(tmp_path / "b.txt")])
    assert [one.text for one in everything(apart)] == ["line of a text\n" * 40, "another text\n" * 40]
    (tmp_path / "c.txt").write_text("a")
    with pytest.raises(ValueError, match=r"c\.txt \(first part\) is empty: the text is too short"):
        load(str(tmp_path / "c.txt"))


def test_python_topics() -> None:
    found = load("python-topics")
    assert found.form == "text"
    split = data.split_documents(data.python_topics(), 0.1)
    assert (found.train, found.held_out) == (split.train, split.held_out)
    with pytest.raises(ValueError, match="python-topics has no labels"):
        load("python-topics", task="classification")


def test_equal_conversations_stay_together(tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, {**ANSWER, "content": f"{i % 20} "[: 2 + i % 2]}]} for i in range(60)]
    found = load(write(tmp_path, "a.jsonl", *rows), held_out=0.3)
    train, held_out = ({one.messages[1]["content"].strip() for one in part} for part in (found.train, found.held_out))
    assert not train & held_out
    assert train | held_out == {str(i) for i in range(20)}
    assert len(everything(found)) == 60
    assert any("training examples repeat others." in sentence for sentence in found.said)


def test_a_validation_source_and_contamination(tmp_path: Path) -> None:
    train = write(tmp_path, "a.jsonl", *texts("a", "b", "c"))
    found = load(train, validation=write(tmp_path, "b.jsonl", *texts("b ", "d", "c", "c")))
    assert [one.text for one in found.train] == ["a", "b", "c"]
    assert [one.text for one in found.held_out] == ["b ", "d", "c", "c"]
    assert found.said[-1].startswith("Contamination: 3 of the 4 validation examples are also training examples")
    clean = load(train, validation=write(tmp_path, "c.jsonl", *texts("d")))
    assert clean.said == ["a.jsonl: 3 documents.", "c.jsonl: 1 document."]
    with pytest.raises(ValueError, match=r"d.jsonl, line 1: is of the form 'chat'"):
        load(train, validation=write(tmp_path, "d.jsonl", {"messages": [QUESTION, ANSWER]}))
    labelled = write(tmp_path, "e.jsonl", {"text": "a", "label": "x"}, {"text": "b", "label": "y"})
    other = write(tmp_path, "f.jsonl", {"text": "c", "label": "z"})
    with pytest.raises(ValueError, match=r"validation: f.jsonl, line 1: the label 'z' is none of .* 'x', 'y'"):
        load(labelled, task="classification", validation=other)


def test_equal_answers_are_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "a" if i == 1 else "b"} for i in range(3)]
    path = write(tmp_path, "a.jsonl", *rows)
    assert (
        "1 of the 3 pairs have two equal answers, so nothing is learnt from them." in load(path, validation=path).said
    )


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    rows = [{"messages": [QUESTION, {**ANSWER, "content": str(i)}]} for i in range(9)]
    one = load(write(tmp_path, "a.jsonl", *rows)).digest
    assert len(one) == 64
    assert load(write(tmp_path, "b.jsonl", *rows)).digest == one
    assert load(write(tmp_path, "a.jsonl", *rows[::-1])).digest != one
    rows[3]["messages"][1]["content"] = "x"
    assert load(write(tmp_path, "a.jsonl", *rows)).digest != one
    two = write(tmp_path, "c.jsonl", *texts("a", "b")), write(tmp_path, "d.jsonl", *texts("c"))
    other = write(tmp_path, "c2.jsonl", *texts("a")), write(tmp_path, "d2.jsonl", *texts("b", "c"))
    assert load(two[0], validation=two[1]).digest != load(other[0], validation=other[1]).digest
