"""Two processes train as one does, save once, and go on from what they saved."""

from __future__ import annotations

import json

import model_zoo as zoo
import pytest
import torch
import torch.distributed
from old_releases import resumes_on_cpus
from stack_helpers import STEPS, as_parameters, files, hold_vectors, trainer_of, training
from two_processes import run_pair

import red_kernels as rk
from red_kernels.checkpoints.peft_write import PEFT_NAMES

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def test_save_and_resume(tmp_path):
    """DDP, and FSDP2 around each layer and around the whole; one pair of processes, as these take long to start."""
    run_pair("stacks_worker.py", "save and resume", str(tmp_path))
    for how in ("ddp", "fsdp-layers", "fsdp-whole"):
        assert {path.name for path in (tmp_path / how).iterdir()} == {
            *("red_edits.safetensors", *PEFT_NAMES, "optimizer"),
        }


@resumes_on_cpus
def test_trainer(tmp_path):
    """DDP: two processes with half of the batch each, stopped and resumed half-way, end as one that went through."""
    pytest.importorskip("accelerate")
    base = zoo.tiny("llama")
    values = zoo.vectors(zoo.sites("llama"))
    unfused, truth = zoo.Unfused(base, values), zoo.exact(base, values)
    losses = []
    for peer in (unfused, truth):
        as_parameters(peer)
        trainer, watch = trainer_of(peer.model, training(peer.vectors), tmp_path / "one")
        trainer.train()
        losses.append(watch.losses)
    model = base
    rk.patch(model)
    zoo.fill(rk.edit_parameters(model), values)
    rk.save_edits(model, tmp_path / "start")

    run_pair("stacks_worker.py", "trainer", str(tmp_path))
    first, second = (json.loads((tmp_path / f"losses-{rank}.json").read_text()) for rank in range(2))
    found = first or second
    zoo.assert_as_exact("losses", *map(torch.tensor, (found, losses[0])), torch.tensor(losses[1]).double())
    last = tmp_path / f"checkpoint-{STEPS}"
    rk.load_edits(model, last)
    hold_vectors(rk.edit_parameters(model), unfused.vectors, truth.vectors)
    assert "model.safetensors" not in files(last)


def test_the_best_checkpoint(tmp_path):
    """`load_best_model_at_end` in both processes, with and without a limit of checkpoints, also resumed."""
    pytest.importorskip("accelerate")
    run_pair("stacks_worker.py", "best", str(tmp_path))
