"""The README's example runs as it stands, on a small model in place of the one it names."""

from __future__ import annotations

import re

import torch
import transformers
from places import ROOT

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
    assert not hasattr(names["model"].model.layers[0].mlp.down_proj, "red_edit")  # unpatched at the end


def test_commands_exist():
    text, makefile = README.read_text(), (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", text)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
