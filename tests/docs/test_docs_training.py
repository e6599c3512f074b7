"""The page about training stacks: its examples run, and leave behind what they say."""

from __future__ import annotations

import pytest
from doc_examples import run_page

import red_kernels as rk
from red_kernels.checkpoints.checkpoint import TENSORS_NAME

for package in ("accelerate", "datasets", "peft", "torchao", "trl"):
    pytest.importorskip(package)


def test_page(tmp_path):
    names = run_page("docs/training.md", tmp_path)
    written = ("run/checkpoint-4", "plain/checkpoint-4", "sft/checkpoint-4", "accelerated", "compiled", "ddp", "fsdp")
    for folder in (*written, "both/edits"):
        assert TENSORS_NAME in {path.name for path in (tmp_path / folder).iterdir()}, folder
    for run in ("run", "sft"):
        assert not list(tmp_path.glob(f"{run}/checkpoint-4/model*"))
    for folder in written:
        model = names["base_model"]()
        rk.patch(model, rk.saved_config(tmp_path / folder))
        rk.load_edits(model, tmp_path / folder)
