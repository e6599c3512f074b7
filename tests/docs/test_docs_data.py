"""The page about data: its examples run, its rows are of the forms that it says, and the demo's conversations fit."""

from __future__ import annotations

import json
import re

import model_zoo as zoo
import pytest
import tiny_folders
from doc_examples import run_page
from places import ROOT

import red_kernels as rk
from red_kernels.finetune import data

PAGE = ROOT / "docs" / "data.md"
CHAT = ROOT / "examples" / "chat.jsonl"
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_page(tmp_path, capsys):
    pytest.importorskip("trl")
    tokenizer = tiny_folders.tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = zoo.tiny("llama", vocab_size=tiny_folders.VOCABULARY)
    rk.patch(model)
    names = run_page("docs/data.md", tmp_path, {"tokenizer": tokenizer, "model": model})
    assert "chat 36 4 sums.jsonl: 40 conversations." in capsys.readouterr().out
    assert names["train"].dropped == 0
    assert names["loss"].isfinite()
    assert names["dpo"].state.global_step == 2


def test_rows_of_the_page(tmp_path):
    found = {}
    for name, block in re.findall(r"\*\*(\w+)[^`]*?\*\*.*?```json\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        for line in block.splitlines():
            path = tmp_path / "a.jsonl"
            path.write_text(line)
            found.setdefault(name, []).append(data.load_data(str(path), validation=str(path)).form)
    assert found == {"Preferences": ["preference"] * 2, "Chat": ["chat"] * 2, "Prompt": ["completion"] * 2}


def test_the_conversations_of_the_demo():
    """The style can be told from each answer."""
    loaded = data.load_data(str(CHAT))
    assert loaded.form == "chat"
    assert loaded.said == ["chat.jsonl: 110 conversations."]
    answers = 0
    for line in CHAT.read_text().splitlines():
        for message in json.loads(line)["messages"][1::2]:
            answers += 1
            assert re.fullmatch(r"Aye, mate! [^\n]+\.\nAs we say in the galley: [^\n]+\.", message["content"])
    assert answers == 120
