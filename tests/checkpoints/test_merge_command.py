"""`red-kernels merge`: a folder that plain transformers loads, written whole or not at all."""

from __future__ import annotations

import json
import os

import model_zoo as zoo
import position_cases as cases
import pytest
import torch
import transformers

import red_kernels as rk
from red_kernels.cli import main
from red_kernels.support.replaced import MARKER


@pytest.fixture
def folders(tmp_path):
    """A base model, its edits, and the logits of the model merged in memory."""
    base = zoo.tiny("llama")
    base.save_pretrained(tmp_path / "base")
    rk.patch(base, rk.RedConfig(position="ffn_attn"))
    zoo.fill(rk.edit_parameters(base), cases.values(rk.edit_parameters(base)))
    rk.save_edits(base, tmp_path / "edits")
    rk.merge(base)
    with torch.no_grad():
        logits = base(**zoo.inputs("llama")).logits
    arguments = ["merge", "--model", str(tmp_path / "base"), "--edits", str(tmp_path / "edits")]
    return tmp_path, [*arguments, "--output", str(tmp_path / "merged")], logits


def test_a_folder_that_transformers_loads(folders, capsys):
    path, arguments, expected = folders
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "config: attention_bias=True, mlp_bias=True" in printed
    assert "no tokenizer was saved" in printed
    model = transformers.AutoModelForCausalLM.from_pretrained(path / "merged")
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config.mlp_bias
    with torch.no_grad():
        found = model(**zoo.inputs("llama")).logits
    assert torch.equal(found, expected)
    assert sorted(os.listdir(path)) == ["base", "edits", "merged"]


def test_the_output_is_replaced_only_if_asked(folders, capsys):
    path, arguments, _ = folders
    assert main(arguments) == 0
    first = json.loads((path / "merged" / MARKER).read_text())
    assert set(first["files"]) == set(os.listdir(path / "merged")) - {MARKER}
    capsys.readouterr()
    assert main(arguments) == 2
    assert "exists already; pass --overwrite" in capsys.readouterr().err
    assert json.loads((path / "merged" / MARKER).read_text()) == first
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads((path / "merged" / MARKER).read_text())["token"] != first["token"]
    assert sorted(os.listdir(path)) == ["base", "edits", "merged"]


def test_errors(folders, capsys, monkeypatch):
    path, arguments, _ = folders
    for change, match in (
        (["--edits", str(path / "none")], "none"),
        (["--model", str(path / "edits")], "no config.json"),
        (["--dtype", "bf16", "--model", str(path / "base")], "swallow"),
    ):
        if match == "swallow":
            model = zoo.tiny("llama")
            rk.patch(model, rk.RedConfig(position="ffn_attn"))
            with torch.no_grad():
                for parts in rk.edit_parameters(model).values():
                    parts["scale"].fill_(1.0005)
            rk.save_edits(model, path / "edits")
        assert main([*arguments, *change]) == 2
        assert match in capsys.readouterr().err
        assert sorted(os.listdir(path)) == ["base", "edits"]

    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", fails)
    assert main([*arguments, "--force"]) == 2
    assert sorted(os.listdir(path)) == ["base", "edits"]


def test_a_damaged_head_is_not_left_out_silently(folders, capsys):
    path, arguments, _ = folders
    (path / "edits" / "red_head.safetensors").write_bytes(b"")
    assert main(arguments) == 2
    assert "red_head.safetensors: is damaged" in capsys.readouterr().err
    assert sorted(os.listdir(path)) == ["base", "edits"]
