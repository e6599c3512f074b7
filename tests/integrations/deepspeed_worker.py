"""One of two processes that train a patched model under DeepSpeed's ZeRO, save and go on: test_stacks_deepspeed.py.

Arguments: the rank, the port, the stage, a folder for files.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["LOCAL_SIZE"] = "2"

import deepspeed
import model_zoo as zoo
import torch
import torch.distributed as dist
from stack_helpers import listed, training
from stacks_worker import HALF, NAME, STEPS, batches, one_process
from two_processes import in_group

import red_kernels as rk

# An operator of DeepSpeed's own for processes of one machine, which takes half a minute to compile; gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def wrapped(stage: int, model):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        # By default stage 3 leaves vectors as small as RED's whole in each process.
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = training(rk.edit_parameters(model))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def steps_of(engine, rank, chosen):
    losses = []
    for step in chosen:
        loss = engine(**batches(step)[rank]).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
    return losses


def patched(values=None):
    model = zoo.tiny(NAME)
    rk.patch(model)
    if values is not None:
        zoo.fill(rk.edit_parameters(model), values)
    return model


def gathered(stage: int, model):
    """All of the vectors in a `with` block; what process 0 changes in them is kept."""
    vectors = listed(rk.edit_parameters(model))
    return deepspeed.zero.GatheredParameters(vectors, modifier_rank=0) if stage == 3 else contextlib.nullcontext()


def main(stage: int, rank: int, folder: Path) -> None:
    base = zoo.tiny(NAME)
    values = zoo.vectors(zoo.sites(NAME))
    unfused, truth = zoo.Unfused(base, values), zoo.exact(base, values)
    plain, exact = one_process(unfused), one_process(truth)

    engine = wrapped(stage, patched(values))
    losses = steps_of(engine, rank, range(HALF))
    engine.save_checkpoint(str(folder / "engine"), exclude_frozen_parameters=True)
    losses += steps_of(engine, rank, range(HALF, STEPS))
    zoo.assert_as_exact("losses", *map(torch.tensor, (losses, plain)), torch.tensor(exact).double(), torch.float32)
    if stage == 3:
        for function in (rk.save_edits, rk.load_edits):
            if function is rk.load_edits and rank == 0:
                rk.save_edits(patched(values), folder / "start")
            dist.barrier()
            try:
                function(engine.module, folder / "start")
            except ValueError as error:
                assert "partitioned by DeepSpeed ZeRO-3" in str(error)  # noqa: PT017
            else:
                raise AssertionError("vectors that are elsewhere were saved or loaded")
    with gathered(stage, engine.module):
        found = rk.edit_parameters(engine.module)
        for site, parts in truth.vectors.items():
            for part, wanted in parts.items():
                zoo.assert_as_exact(f"{site}.{part}", found[site][part], unfused.vectors[site][part], wanted)
        if rank == 0:
            rk.save_edits(engine.module, folder / "edits")
        last = [own.detach().clone() for own in listed(found)]

    resumed = wrapped(stage, patched())
    resumed.load_checkpoint(str(folder / "engine"), load_module_strict=False)
    assert steps_of(resumed, rank, range(HALF, STEPS)) == losses[HALF:]
    with gathered(stage, resumed.module):
        assert all(map(torch.equal, listed(rk.edit_parameters(resumed.module)), last))

    dist.barrier()
    other = wrapped(stage, patched())
    with gathered(stage, other.module):
        if stage < 3 or rank == 0:
            rk.load_edits(other.module, folder / "edits")
    with gathered(stage, other.module):
        assert all(map(torch.equal, listed(rk.edit_parameters(other.module)), last))


if __name__ == "__main__":
    with in_group(initialise=False) as rank:
        deepspeed.init_distributed("gloo")
        main(int(sys.argv[3]), rank, Path(sys.argv[4]))
