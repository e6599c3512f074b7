"""Reading data, holding documents out, and cutting texts into blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folders
import torch
from transformers import AutoTokenizer

from red_kernels.finetune import data


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.tiny_llama(tmp_path_factory.mktemp("llama"))


TABLES = {
    "a.csv": 'id,text,label\n1,"one, with a comma\nand a second line",x\n2,two,y\n',
    "a.tsv": 'label\ttext\nx\t"one\ny\ttwo "quoted"\n',
    "a.jsonl": '{"text": "one", "label": 0}\n\n{"text": "two", "label": 1}\n',
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(TABLES[name])
    documents = data.load_documents(str(tmp_path / name), data.Columns(), True, 0.1)
    texts = {"a.csv": ["one, with a comma\nand a second line", "two"], "a.tsv": ['"one', 'two "quoted"']}
    assert [document.text for document in documents] == texts.get(name, ["one", "two"])
    assert [document.label for document in documents] == (["0", "1"] if name == "a.jsonl" else ["x", "y"])


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.csv", "text,id,text\na,1,b\n", "line 1"),
        ("a.csv", "text, text\na,b\n", "line 1"),
        ("a.tsv", "\n\ntext\tlabel\tlabel\na\tx\ty\n", "line 3"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1, "text": "c"}\n', "line 2"),
        ("a.parquet", None, "a.parquet"),
    ],
)
def test_a_column_that_is_there_twice(name: str, content: str | None, where: str, tmp_path: Path) -> None:
    if content is None:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pytest.importorskip("pyarrow").table([["a", "b"], ["c", "d"]], names=["text", "text"])
        parquet.write_table(table, tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{where}: has '(text|label)' twice"):
        data.load_documents(str(tmp_path / name), data.Columns(), False, 0.1)


def test_columns_without_a_name(tmp_path: Path) -> None:
    """An index that pandas wrote, and commas at the end of the lines."""
    (tmp_path / "a.csv").write_text(",text,,\n0,a,,\n1,b,,\n")
    documents = data.load_documents(str(tmp_path / "a.csv"), data.Columns(), False, 0.1)
    assert [document.text for document in documents] == ["a", "b"]


def test_a_label_that_is_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "\\ud800"}\n')
    with pytest.raises(ValueError, match="line 2: 'label' is no text that UTF-8 can encode"):
        data.load_documents(str(tmp_path / "a.jsonl"), data.Columns(), True, 0.1)


def test_folders_around_a_parquet_file_are_no_columns(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "label=7").mkdir()
    parquet.write_table(arrow.table({"text": ["a"], "label": ["x"]}), tmp_path / "label=7" / "a.parquet")
    [one] = data.load_documents(str(tmp_path / "label=7" / "a.parquet"), data.Columns(), True, 0.1)
    assert one.label == "x"


def test_a_parquet_value_that_python_cannot_hold(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = arrow.table({"text": ["a"], "when": arrow.array([2**52], arrow.timestamp("s"))})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet' is damaged"):
        data.load_documents(str(tmp_path / "a.parquet"), data.Columns(), False, 0.1)


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"body": ["one", "two"], "class": [3, 4]})
    parquet.write_table(table, tmp_path / "a.parquet")
    columns = data.Columns("body", "class")
    documents = data.load_documents(str(tmp_path / "a.parquet"), columns, True, 0.1)
    assert [(document.text, document.label) for document in documents] == [("one", "3"), ("two", "4")]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match="damaged or no parquet"):
        data.load_documents(str(tmp_path / "b.parquet"), columns, True, 0.1)


def test_table_without_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("one\tx\ntwo\ty\n")
    documents = data.load_documents(str(tmp_path / "a.tsv"), data.Columns(header=False), True, 0.1)
    assert [(document.text, document.label) for document in documents] == [("one", "x"), ("two", "y")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\none\tx\ntwo\n", "line 3: has 1 fields, expected 2"),
        ("a.tsv", "one\tx\ntwo\ty\n", "no column 'text'; its columns are 'one', 'x'.*--no-header"),
        ("a.tsv", "text\tlabel\n", "holds no documents"),
        ("a.tsv", "text\tlabel\none\t \n", "line 2: 'label' is ' ', expected a label"),
        ("a.csv", 'text,label\n"one,x\n', "unexpected end of data"),
        ("a.csv", "", "holds no documents"),
        ("a.jsonl", '{"text": "one", "label": "x"}\n{"text": ', "line 2: is not JSON"),
        ("a.jsonl", "[1]\n", "line 1: is a list"),
        ("a.jsonl", '{"text": 3, "label": "x"}\n', "'text' is int, expected a text"),
        ("a.jsonl", '{"text": "one", "label": 0.5}\n', "'label' is 0.5"),
        ("a.txt", "some text", "plain text without labels"),
        ("a.doc", "some text", "none of .txt, .csv"),
        ("a.csv", b"text,label\n\xff\xfe,x\n", "not UTF-8"),
    ],
)
def test_wrong_tables(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        data.load_documents(str(tmp_path / name), data.Columns(), True, 0.1)


def test_no_document_is_on_both_sides() -> None:
    documents = data.python_topics()
    split = data.split_documents(documents, 0.1)
    held_out, train = ({document.name for document in part} for part in (split.held_out, split.train))
    assert held_out
    assert held_out | train == {document.name for document in documents}
    assert not held_out & train
    passages = {" ".join(part.split()) for document in split.train for part in document.text.split("\n\n")}
    for document in split.held_out:
        for part in document.text.split("\n\n"):
            assert len(" ".join(part.split())) < 60 or " ".join(part.split()) not in passages
    share = sum(len(document.text) for document in split.held_out) / sum(len(document.text) for document in documents)
    assert 0.05 < share < 0.2


def test_duplicates_stay_together_and_every_label_is_held_out() -> None:
    documents = [data.Document(f"text {i % 40}", str(i), f"text {i % 40}", "ab"[i % 40 % 2]) for i in range(200)]
    split = data.split_documents(documents, 0.2)
    assert not {document.text for document in split.train} & {document.text for document in split.held_out}
    assert {document.label for document in split.held_out} == {document.label for document in split.train} == {"a", "b"}


def test_too_little_to_hold_out() -> None:
    with pytest.raises(ValueError, match="1 different document"):
        data.split_documents([data.Document("a", "1", 0), data.Document("b", "2", 0)], 0.1)
    with pytest.raises(ValueError, match="label 'y' has 1"):
        data.split_documents([data.Document(str(i), str(i), i, "x" if i else "y") for i in range(5)], 0.1)
    with pytest.raises(ValueError, match="at least two different ones"):
        data.label_numbers([data.Document("a", "1", 0, "x")])


def test_label_order() -> None:
    def numbered(*labels: str) -> dict[str, int]:
        return data.label_numbers([data.Document("", "", 0, label) for label in labels])

    assert numbered("10", "9", "-1") == {"-1": 0, "9": 1, "10": 2}
    assert numbered("no", "10", "9") == {"10": 0, "9": 1, "no": 2}


def test_blocks_hold_every_token_but_the_rest(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    blocks = data.TokenBlocks(["abc", "de"], tokenizer, 3)
    assert len(blocks) == 2
    assert blocks.tokens == 6
    assert blocks.said == ["1 token at the end left out: less than a block of 3."]
    assert data.TokenBlocks(["ab"], tokenizer, 3).said == []
    ids = torch.stack([blocks[0]["input_ids"], blocks[1]["input_ids"]]).flatten().tolist()
    assert ids == [*tokenizer("abc")["input_ids"], 1, *tokenizer("de")["input_ids"]]
    with pytest.raises(ValueError, match="7 tokens are less than one block of length 8"):
        data.TokenBlocks(["abc", "de"], tokenizer, 8)
