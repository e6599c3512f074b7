"""The command under torchrun: one run, whose result is that of one process with the same batches."""

from __future__ import annotations

import json
import math
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finetune_helpers import (
    assert_near,
    causal,
    classify,
    environment,
    launched,
    launcher,
    make_folders,
    record,
    results,
)
from patience import HANGS

from red_kernels import cli
from red_kernels.finetune.job import _check_shares
from red_kernels.finetune.processes import Processes
from red_kernels.finetune.settings import Settings
from red_kernels.integrations.trainer import checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


def test_two_processes_are_one_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """Under torchrun: evaluations, a schedule, samples; and what two processes began, one ends."""
    more = ("--steps", "6", "--schedule", "linear", "--eval-every", "3", "--sample", "line 3", "--no-compare")
    two = tmp_path / "two"
    line = [*launcher(), "-m", "red_kernels", *causal(folders, two, *more)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Trainable parameters") == 1
    assert "2 processes, each with 2 of a batch" in done.stdout
    assert cli.main(causal(folders, tmp_path / "one", *more)) == 0
    found, alone = results(two), results(tmp_path / "one")
    assert_near(tmp_path / "one" / "edits", two / "edits", 1e-5)
    for name in ("before", "after", "reloaded"):
        assert found[name]["loss"] == pytest.approx(alone[name]["loss"], rel=1e-5)
    assert [own["step"] for own in found["samples"]] == [0, 3, 6]

    assert cli.main(["finetune", "--output", str(two), "--resume", "--steps", "8"]) == 0
    assert cli.main(["finetune", "--output", str(tmp_path / "one"), "--resume", "--steps", "8"]) == 0
    assert_near(tmp_path / "one" / "edits", two / "edits", 1e-5)


def test_a_classifier_on_two_processes(folders: dict[str, Path], tmp_path: Path) -> None:
    """The scores are of all held-out texts, whichever process has judged them; an error is said once."""
    two = tmp_path / "two"
    more = ("--steps", "4", "--accumulate", "2", "--no-compare")
    done = launched(classify(folders, two, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(two)["after"]["targets"] == 12
    again = launched(classify(folders, two, *more))
    assert again.returncode != 0
    assert again.stderr.count("already holds a run") == 1


def test_preferences_on_two_processes(folders: dict[str, Path], tmp_path: Path) -> None:
    """DPO, with the rate that falls, evaluations and accumulation; what two processes began, one ends."""
    pytest.importorskip("trl")
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i} and 1? ", "chosen": f"{i + 1}", "rejected": f"{i} no"} for i in range(48)]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    wanted = {**folders, "text": pairs}
    more = ("--steps", "4", "--accumulate", "2", "--schedule", "linear", "--eval-every", "2")
    two = tmp_path / "two"
    done = launched(causal(wanted, two, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert cli.main(causal(wanted, tmp_path / "one", *more)) == 0
    found, alone = results(two), results(tmp_path / "one")
    assert_near(tmp_path / "one" / "edits", two / "edits", 1e-5)
    for step in ("2", "4"):
        assert found["evaluated"][step]["loss"] == pytest.approx(alone["evaluated"][step]["loss"], rel=1e-5)
    assert found["after"]["targets"] == alone["after"]["targets"]
    assert found["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for output in (two, tmp_path / "one"):
        assert cli.main(["finetune", "--output", str(output), "--resume", "--steps", "6"]) == 0
    assert_near(tmp_path / "one" / "edits", two / "edits", 1e-5)


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(
        ValueError, match="batch_size: got 3, expected a multiple of 2, the number of processes that share a batch"
    ):
        _check_shares(Settings(batch_size=3), Processes(2))
    _check_shares(Settings(batch_size=3), Processes(2, tp=2))
    with pytest.raises(
        ValueError, match="expected a multiple of 2, the number of groups of processes that share a batch"
    ):
        _check_shares(Settings(batch_size=3), Processes(4, tp=2))


def test_a_signal_stops_both_behind_one_step(folders: dict[str, Path], tmp_path: Path) -> None:
    """A scheduler ends a job by SIGTERM to its launcher, which hands it on; one process goes on with the run."""
    output = tmp_path / "out"
    arguments = causal(folders, output, "--steps", "4000", "--save-every", "50", "--no-compare")
    with subprocess.Popen(
        [*launcher(), "-m", "red_kernels", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as job:
        deadline = time.monotonic() + HANGS
        while not checkpoints(output):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=HANGS)
    run = record(output)
    assert run["state"] == "interrupted"
    reached = run["results"]["steps"]
    assert reached < 4000
    newest = checkpoints(output)[-1]
    assert newest.name == f"checkpoint-{reached}"
    assert_near(newest, output / "edits", 0.0)
    assert cli.main(["finetune", "--output", str(output), "--resume", "--steps", str(reached + 2)]) == 0


def test_two_groups_of_processes(folders: dict[str, Path], tmp_path: Path) -> None:
    """As on two machines: a launcher on each, which find each other at one address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", address, "-m", "red_kernels"]
    arguments = causal(folders, tmp_path / "out", "--steps", "3", "--no-compare")
    machines = [
        subprocess.Popen(
            [*torchrun, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        said = [machine.communicate(timeout=HANGS)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(said)
    assert sum(text.count("Trainable parameters") for text in said) == 1
    assert cli.main(causal(folders, tmp_path / "one", "--steps", "3", "--no-compare")) == 0
    assert_near(tmp_path / "one" / "edits", tmp_path / "out" / "edits", 1e-5)
