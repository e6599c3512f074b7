"""The benchmark runs, checks that its implementations agree, and writes what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import red_kernels as rk
from benchmarks import harness, host_cost, norms

QUICK = "--widths 64 --rows 16 --dtypes bf16 --seconds 0.01 --inputs warm --operations edit_add_layer_norm"


def test_norms_writes_its_results(tmp_path, capsys):
    output = tmp_path / "results.json"
    norms.main([*QUICK.split(), "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["environment"]["torch"] == torch.__version__
    (result,) = found["results"]
    assert set(result["seconds"]) == {"ours", "eager", "compile", "copies"}
    ours = result["seconds"]["ours"]
    assert 0 < ours["low"] <= ours["median"] <= ours["high"]
    assert result["times_eager"] == pytest.approx(result["seconds"]["eager"]["median"] / ours["median"])
    assert "edit_add_layer_norm" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [output]


def test_output_in_a_missing_folder(tmp_path, monkeypatch):
    """It is made; where nothing can be written, that is said before anything is measured."""
    measured: list[tuple[object, ...]] = []

    def measure(*case):
        measured.append(case)
        raise KeyboardInterrupt

    monkeypatch.setattr(norms, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        norms.main([*QUICK.split(), "--output", str(tmp_path / "new" / "folder" / "results.json")])
    assert len(measured) == 1
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "folder"]
    assert not any((tmp_path / "new" / "folder").iterdir())

    (tmp_path / "file").write_text("")
    (tmp_path / "results.json").mkdir()
    for output in (tmp_path / "file" / "results.json", tmp_path / "results.json"):
        with pytest.raises(SystemExit, match=r"--output: cannot write .*results\.json"):
            norms.main([*QUICK.split(), "--output", str(output)])
    assert len(measured) == 1


def test_implementations_that_disagree_are_found():
    inputs = norms.Inputs(8, 16, torch.float32, fresh=False)
    right = inputs.step(norms.eager_rms)(0)
    wrong = [t.clone() for t in right]
    wrong[2][0, 0] += 0.01
    norms.check_same({"eager": right, "ours": right}, torch.float32, 8)
    with pytest.raises(AssertionError, match="ours, result 2"):
        norms.check_same({"eager": right, "ours": wrong}, torch.float32, 8)


def test_calls_are_interleaved():
    order: list[str] = []
    times = harness.interleave(
        {name: lambda number, name=name: order.append(name) for name in "ab"}, seconds=0.0, least=3, most=3
    )
    assert order == ["a", "b"] * 5  # two rounds to warm up, three measured
    assert set(times) == {"a", "b"}
    with pytest.raises(ValueError, match="calls is empty"):
        harness.interleave({}, seconds=1.0)


def test_host_cost_without_a_launch(tmp_path):
    """Every operation is timed up to the launch. In a process of its own, as it changes how malloc keeps memory."""
    output = tmp_path / "host.json"
    command = ["-m", "benchmarks.host_cost", "--rows", "4", "--width", "64", "--seconds", "0.001"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--output", str(output)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["seconds"]
    (name,) = (name for name in found if name.startswith("triton"))
    forwards = {"edit", "edit_add", "edit_add_rms_norm", "edit_add_layer_norm", "rms_norm_edit", "layer_norm_edit"}
    assert set(found[name]) == forwards | {f"{forward}, with backward" for forward in forwards}
    assert all(0 < timing["low"] <= timing["median"] for timing in found[name].values())
    assert "edit_add_layer_norm" in done.stdout
    names = {name for name in found if not name.startswith("torch")}
    there = {name for name in ("cpu", "cuda") if rk.available_backends()[name] is None}
    assert {name.split(",")[0] for name in names} == {"triton", *there}
    assert ("Not in the figures" in done.stdout) == ("cuda, 4 x 64, launch left out" in names)
    over = json.loads(output.read_text())["times_torch_rms_norm"]
    assert set(over) == names
    for name, values in over.items():
        assert set(values) == forwards
        host = name.startswith("cpu") or not torch.cuda.is_available()
        peer = found["torch, 4 x 64" if host else "torch on the GPU, 4 x 64"]["torch rms_norm"]["median"]
        assert values["edit"] == pytest.approx(found[name]["edit"]["median"] / peer)


def test_backend_without_a_launch_is_for_a_block_only():
    before = rk.available_backends()
    with host_cost.stubbed():
        assert rk.available_backends()["triton"] is None
    assert rk.available_backends() == before
