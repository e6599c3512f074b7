"""The README's example runs as it stands, on a small model in place of the one it names."""

from __future__ import annotations

import re

import torch
import transformers
from places import ROOT

import red_kernels as rk

README = ROOT / "README.md"


def test_example(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 14

    def small(name, dtype):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
        )
        return transformers.LlamaForCausalLM(config).to(dtype)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", small)
    monkeypatch.chdir(tmp_path)
    batches = [torch.randint(0, 64, (2, 8)) for _ in range(3)]
    names = {"batches": batches}
    exec(compile(code, str(README), "exec"), names)
    assert (tmp_path / "my-edits").is_dir()
    assert rk.edit_names(names["model"]) == ("default",)


def test_report():
    """The block behind the example is what `print(report)` prints of that model, here with random weights."""
    (said,) = re.findall(r"```text\n(RED in .*?)\n```", README.read_text(), flags=re.DOTALL)
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    report = rk.patch(model)
    model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    assert str(report) == said


def test_length():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    lines = [line for line in text.splitlines() if not line.startswith(("|", "  <img"))]
    assert max(map(len, lines)) <= 120


def test_counts_of_architectures():
    """Those of the page that is written from the runs."""
    page = (ROOT / "docs" / "architectures.md").read_text()
    (found,) = re.findall(
        r"edits (\d+) of the (\d+) architectures of transformers ([\d.]+) .*? (\d+) \(\[list\]",
        README.read_text(),
        flags=re.DOTALL,
    )
    edited, with_ffn, release, fused = found
    head = page.partition("## Counts")[0]
    assert head.startswith(f"# Architectures\n\nEvery architecture of transformers {release}")
    for row, count in {
        "of these have an FFN of linear layers or experts": with_ffn,
        "of these are edited at `ffn`": edited,
        "have all `ffn` sites fused with their addition": fused,
    }.items():
        (line,) = (line for line in head.splitlines() if line.startswith(f"| {row} |"))
        assert re.match(rf" {count}\b", line.split("|")[2]), row


def test_commands_exist():
    text, makefile = README.read_text(), (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", text)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
