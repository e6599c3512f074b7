"""The stacks of `benchmarks.tools.compiled_layers`: the same results by other ways, and what a run writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tools import compiled_layers
from benchmarks.tools.compiled_layers import FROZEN, OPERATOR, PLAIN, STACKS, Shape, Stack

SMALL = Shape(width=64, inner=96, layers=2, batch=2, length=8)
WORDS = [f"--{name}={value}" for name, value in vars(SMALL).items()]


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stacks without a minute of compiling."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


def test_the_edits_are_the_same_and_the_frozen_stack_has_none() -> None:
    torch.manual_seed(0)
    found: dict[str, Any] = {edit: Stack(SMALL, edit).double() for edit in (PLAIN, OPERATOR, FROZEN)}
    for stack in found.values():
        stack.load_state_dict(found[PLAIN].state_dict())
    x = torch.randn(2, 8, 64, dtype=torch.float64)
    results = {}
    for edit, stack in found.items():
        own = x.clone().requires_grad_()
        y = stack(own)
        y.backward(torch.ones_like(y))
        results[edit] = [y.detach(), own.grad, *(vector.grad for vector in stack.vectors())]
    for one, two in zip(results[PLAIN], results[OPERATOR], strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)  # the plain one rounds to fp32
    assert not torch.allclose(results[FROZEN][0], results[PLAIN][0])
    assert results[FROZEN][2:] == [None] * 4


@pytest.mark.usefixtures("_uncompiled")
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "found.json"
    assert compiled_layers.main([*WORDS, "--rounds", "2", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert set(found["over_frozen"]) == set(found["processor_seconds"]) == set(STACKS)
    assert found["over_frozen"]["frozen, compiled"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert found["shape"] == vars(SMALL)
    assert found["environment"]["torch"] == torch.__version__
    assert "operator, not compiled" in capsys.readouterr().out


@pytest.mark.usefixtures("_uncompiled")
def test_a_wrong_operator_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = compiled_layers.rk.edit_add_rms_norm
    monkeypatch.setattr(compiled_layers.rk, "edit_add_rms_norm", lambda h, x, s, *rest: right(h, x, 1.01 * s, *rest))
    with pytest.raises(ArithmeticError, match="operator, compiled: differs from the plain edit by"):
        compiled_layers.measure(SMALL, torch.float32, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--width", "100"], "width: got 100, expected a multiple of 64"),
        (["--layers", "0"], "layers: got 0, expected at least 1"),
        (["--rounds", "1"], "rounds: got 1, expected at least 2"),
    ],
)
def test_wrong_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compiled_layers.main(words)
    assert said in capsys.readouterr().err
