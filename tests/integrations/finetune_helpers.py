"""Tiny models with data, and runs of `red-kernels finetune` on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ready
import safetensors.torch
import tiny_folders
import torch
from places import python_path

from red_kernels.checkpoints.checkpoint import TENSORS_NAME
from red_kernels.integrations.trainer import HEAD_NAME


def make_folders(root: Path) -> dict[str, Path]:
    """Tiny models, a text and a table of labelled texts."""
    text = root / "text.txt"
    text.write_text("".join(f"line {i} of the text, with {i * i} words in it.\n" for i in range(200)))
    table = root / "table.tsv"
    words = {"good": ("aaaa", "abab", "baaa"), "bad": ("zzzz", "zyzy", "yzzz")}
    rows = [f"{words[label][i % 3]} {words[label][i % 2]} {i}\t{label}" for i in range(60) for label in words]
    table.write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    return {
        "llama": tiny_folders.tiny_llama(root / "llama"),
        "bert": tiny_folders.tiny_bert(root / "bert"),
        "text": text,
        "table": table,
    }


def causal(folders: dict[str, Path], output: Path, *more: str) -> list[str]:
    """Arguments of a run on the text."""
    return [
        *("finetune", "--model", str(folders["llama"]), "--data", str(folders["text"]), "--output", str(output)),
        *("--length", "32", "--dtype", "fp32", "--device", "cpu", *more),
    ]


def classify(folders: dict[str, Path], output: Path, *more: str) -> list[str]:
    """Arguments of a run on the table."""
    return [
        *("finetune", "--task", "classification", "--model", str(folders["bert"]), "--data", str(folders["table"])),
        *("--output", str(output), "--length", "24", "--device", "cpu", *more),
    ]


def record(output: Path) -> dict[str, Any]:
    """What `run.json` holds."""
    content: dict[str, Any] = json.loads((output / "run.json").read_text())
    return content


def results(output: Path) -> dict[str, Any]:
    """Those of a finished run."""
    run = record(output)
    assert run["state"] == "finished"
    found: dict[str, Any] = run["results"]
    return found


def trained_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All that was trained, out of a folder of edits or a checkpoint."""
    tensors = safetensors.torch.load_file(folder / TENSORS_NAME)
    if (folder / HEAD_NAME).exists():
        tensors.update(safetensors.torch.load_file(folder / HEAD_NAME))
    return tensors


def assert_equal_runs(first: Path, second: Path) -> None:
    """Two finished runs have the same edits, to the bit, and the same results."""
    one, two = trained_tensors(first / "edits"), trained_tensors(second / "edits")
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert results(first)["after"] == results(second)["after"]


def environment() -> dict[str, str]:
    """That of processes that run the tree's own code."""
    return {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}


def launcher(count: int = 2) -> list[str]:
    """torchrun, with so many processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]


def launched(
    arguments: list[str], count: int = 2, program: Sequence[str] = ("-m", "red_kernels")
) -> subprocess.CompletedProcess[str]:
    """Run the command, or another program, in several processes, with the variables that torchrun gives them."""
    return ready.run_group([*program, *arguments], count)


def assert_near(first: Path, second: Path, tolerance: float) -> None:
    """Two folders hold the same trained values, to a tolerance."""
    one, other = trained_tensors(first), trained_tensors(second)
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=tolerance)
