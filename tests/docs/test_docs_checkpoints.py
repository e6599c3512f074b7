"""The examples of docs/checkpoints.md run as they stand, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import doc_examples
import pytest
import torch

from red_kernels import cli

PAGE = "docs/checkpoints.md"


def test_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = doc_examples.run_page(PAGE, tmp_path)
    shown = capsys.readouterr().out
    assert "10 sites loaded from edits/red_edits.safetensors" in shown
    assert "position 'more' (inferred from RobertaModel), kind 'all'" in shown
    assert {path.name for path in (tmp_path / "authors").iterdir()} == {"delta_vector.pth", "classifier.pth"}
    assert (tmp_path / "converted" / "red_head.safetensors").exists()
    assert torch.equal(names["other"](names["ids"]).logits, names["trained"])


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = (doc_examples.ROOT / PAGE).read_text()
    commands = re.findall(r"^red-kernels (\S+) .*$", text, flags=re.MULTILINE)
    assert set(commands) == {"convert", "push"}
    for command in sorted(set(commands)):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    options = set(re.findall(r"`(--[a-z]+)`", text))
    shown = capsys.readouterr().out
    assert options
    assert all(option in shown for option in options)
