"""Long runs: the fused edit drifts no further than rounding takes the eager one, and a process keeps nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.tools import long_run


def test_drift_and_memory() -> None:
    found = long_run.drift(200)
    assert [look["step"] for look in found["looks"]] == list(range(20, 201, 20))
    assert found["moved"]["mean"] > 0.05  # it learns
    for look in found["looks"]:
        distance = look["distance"]
        assert 0 < distance["eager"]["mean"] < 1e-6  # rounding, and the fp64 run is another one
        assert distance["fused"]["mean"] < 1.5 * distance["eager"]["mean"]
    growth = [look["objects"] for look in found["looks"][2:]]
    assert growth[-1] - growth[0] < 50, "a step leaves objects behind"


class Drifting(long_run.Learner):
    def step(self, ids: torch.Tensor, steps: int) -> float:
        loss = super().step(ids, steps)
        with torch.no_grad():
            for own in self.vectors:
                own.mul_(1 + 3e-7)
        return loss


def test_a_drift_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Drifting.fused()
    monkeypatch.setattr(long_run.Learner, "fused", classmethod(lambda cls: made))
    last = long_run.drift(40)["looks"][-1]["distance"]
    assert last["fused"]["mean"] > 1.5 * last["eager"]["mean"]


def test_resuming_twice_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert long_run.resumed_equals(30)
    real = long_run.Learner.resumed

    def forgetful(folder: Path) -> long_run.Learner:
        learner = real(folder)
        learner.optimizer.state.clear()
        return learner

    monkeypatch.setattr(long_run.Learner, "resumed", forgetful)
    assert not long_run.resumed_equals(30)


def test_many_edits_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "long.json"
    assert long_run.main(["--steps", "10", "--edits", "9", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["many_edits"]["same_rows"]
    assert found["many_edits"]["loaded"]
    assert found["many_edits"]["after"]["objects"] < found["many_edits"]["before"]["objects"] + 200
    assert "resumed twice, the same bits: yes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        long_run.main(["--steps", "9"])
