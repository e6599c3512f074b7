"""Timing in turn, and what a call costs the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from patience import HANGS
from places import ROOT

import red_kernels as rk
from benchmarks import harness
from benchmarks.tools import host_cost


def test_calls_are_interleaved():
    order: list[str] = []
    times = harness.interleave(
        {name: lambda number, name=name: order.append(name) for name in "ab"}, seconds=0.0, least=3, most=3
    )
    assert all(sorted(order[first : first + 2]) == ["a", "b"] for first in range(0, 10, 2))
    assert len(order) == 10  # two rounds to warm up, three measured
    assert set(times) == {"a", "b"}
    with pytest.raises(ValueError, match="calls is empty"):
        harness.interleave({}, seconds=1.0)


def test_host_cost_without_a_launch(tmp_path):
    """Every operation is timed up to the launch. In a process of its own, as it changes how malloc keeps memory."""
    output = tmp_path / "host.json"
    command = ["-m", "benchmarks.tools.host_cost", "--rows", "4", "--width", "64", "--seconds", "0.001"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command, "--output", str(output)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
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
    assert ("The figures of the CUDA operators without" in done.stdout) == ("cuda, 4 x 64, launch left out" in names)
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
