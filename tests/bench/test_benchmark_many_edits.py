"""The benchmark of many edits runs, checks its results and writes what it measured."""

from __future__ import annotations

import json

import model_zoo as zoo
import pytest
import torch

import red_kernels as rk
from benchmarks.tools import many_edits

TINY = "--hidden 64 --layers 2 --batches 2x4 6x2 --edits 1 2 6 --lora 2 --seconds 0.01 --dtype fp32"


def test_it_writes_its_results(tmp_path, capsys):
    output = tmp_path / "many.json"
    many_edits.main([*TINY.split(), "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["device"] == "cpu"
    results = {(entry["what"], entry["pass"], entry["rows"]): entry for entry in found["results"]}
    assert results.keys() == {
        (what, name, rows)
        for what, rows in (("model", 2), ("model", 6), ("edit_add_rms_norm", 12))
        for name in many_edits.PASSES
    }
    names = {"frozen", "single", *(f"use_edits, {count}" for count in (1, 2, 6))}
    assert results["model", "forward", 6]["seconds"].keys() == names | {"lora, 1", "lora, 2"}
    operation = results["edit_add_rms_norm", "forward and backward", 12]
    assert operation["seconds"].keys() == {"single", *(f"{k}, {c}" for k in ("ids", "eager") for c in (1, 2, 6))}
    seconds = operation["seconds"]
    assert operation["over_single"]["ids, 6"] == pytest.approx(
        seconds["ids, 6"]["median"] / seconds["single"]["median"]
    )
    assert "use_edits, 6" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]


def test_what_is_timed_is_what_it_says():
    """By rows and with one edit: different logits; and all edits get a gradient."""
    forwards, steps = many_edits.model_calls(64, 2, 4, 3, [2, 4], torch.float32, lora=0)
    for count in (2, 4):
        assert not torch.allclose(forwards[f"use_edits, {count}"](0), forwards["single"](0))
    assert all(call(0).abs().sum() > 0 for call in steps.values())
    model = zoo.tiny("llama")
    assert many_edits.patched(model, 3) == ["edit0", "edit1", "edit2"]
    assert rk.edit_names(model) == ("default", "edit0", "edit1", "edit2")


def test_an_operation_that_disagrees_is_found(monkeypatch):
    right = rk.edit_add_rms_norm
    monkeypatch.setattr(
        rk, "edit_add_rms_norm", lambda *args, **options: tuple(1.01 * found for found in right(*args, **options))
    )
    with pytest.raises(AssertionError, match="1 edits: the results differ"):
        many_edits.operation_calls(8, 16, [1, 4], torch.float32)
