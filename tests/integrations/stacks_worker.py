"""One of two processes that train, save and resume in the ways of test_stacks_distributed.py.

Arguments: the rank, the port, what to run, a folder for files.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import model_zoo as zoo
import safetensors.torch
import torch
import torch.distributed as dist
from distributed_worker import wrapped
from stack_helpers import BATCH, STEPS, hold_vectors, listed, rows, same_vectors, trainer_of, training
from torch.distributed import checkpoint as sharded_checkpoint
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback, TrainerState, TrainingArguments
from two_processes import in_group

import red_kernels as rk
from red_kernels.checkpoints import checkpoint
from red_kernels.edits.find import edit_parameters
from red_kernels.integrations.trainer import RedTrainer
from red_kernels.integrations.trainer_callback import SaveEdits
from red_kernels.support import sharded as _sharded

HALF = STEPS // 2
NAME = "llama"


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    """A batch for each process."""
    return [zoo.inputs(NAME, seed=10 * step + rank) for rank in range(2)]


def steps_of(model, optimizer, rank, chosen):
    """Train on this process's batches; the losses are the means of both processes."""
    losses = []
    for step in chosen:
        loss = model(**batches(step)[rank]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().double()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
    return losses


def one_process(peer):
    """The same of a peer by one process, on both batches together."""
    optimizer = training(peer.vectors)
    losses = []
    for step in range(STEPS):
        loss = sum(peer.model(**batch).loss for batch in batches(step)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fresh(how: str, values=None, folder: Path | None = None):
    """A model, patched, filled or loaded, and wrapped; and its optimizer."""
    model = zoo.tiny(NAME)
    rk.patch(model)
    if values is not None:
        zoo.fill(edit_parameters(model), values)
    parallel = wrapped(how, model)
    if folder is not None:
        rk.load_edits(model, folder)
    return model, parallel, training(edit_parameters(model))


def full(model):
    return {
        site: {part: _sharded.whole(own) for part, own in parts.items()}
        for site, parts in edit_parameters(model).items()
    }


@contextlib.contextmanager
def counted():
    """The folders that this process writes edits to."""
    written, write = [], checkpoint.write_files

    def writing(folder, contents):
        if checkpoint.TENSORS_NAME in contents:  # PEFT's form is written apart
            written.append(folder)
        write(folder, contents)

    checkpoint.write_files = writing
    try:
        yield written
    finally:
        checkpoint.write_files = write


def save(how: str, model, optimizer, folder: Path, rank: int) -> None:
    with counted() as written:
        if how != "ddp" or rank == 0:
            rk.save_edits(model, folder)
    assert len(written) == (rank == 0), (how, rank, written)
    dist.barrier()
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    sharded_checkpoint.save(state, checkpoint_id=folder / "optimizer")


def train_and_resume(how: str, rank: int, folder: Path) -> None:
    base = zoo.tiny(NAME)
    values = zoo.vectors(zoo.sites(NAME))
    unfused, truth = zoo.Unfused(base, values), zoo.exact(base, values)
    plain, exact = one_process(unfused), one_process(truth)

    model, parallel, optimizer = fresh(how, values)
    losses = steps_of(parallel, optimizer, rank, range(HALF))
    save(how, model, optimizer, folder, rank)
    losses += steps_of(parallel, optimizer, rank, range(HALF, STEPS))
    zoo.assert_as_exact(
        f"{how}: losses", *map(torch.tensor, (losses, plain)), torch.tensor(exact).double(), torch.float32
    )
    hold_vectors(full(model), unfused.vectors, truth.vectors)

    resumed, parallel, optimizer = fresh(how, folder=folder)
    state = {"optimizer": get_optimizer_state_dict(resumed, optimizer)}
    sharded_checkpoint.load(state, checkpoint_id=folder / "optimizer")
    set_optimizer_state_dict(resumed, optimizer, state["optimizer"])
    assert steps_of(parallel, optimizer, rank, range(HALF, STEPS)) == losses[HALF:]
    for first, second in zip(listed(full(model)), listed(full(resumed)), strict=True):
        assert torch.equal(first, second)

    # One process alone reads what both have written.
    alone = zoo.tiny(NAME)
    rk.patch(alone, rk.saved_config(folder))
    rk.load_edits(alone, folder)
    again = zoo.tiny(NAME)
    rk.patch(again)
    zoo.fill(edit_parameters(again), values)
    assert not same_vectors(alone, again)


def a_write_that_fails(rank: int, folder: Path) -> None:
    """The process that writes has the error itself; the other is not left waiting."""
    model, _, _ = fresh("fsdp whole")
    folder.mkdir(exist_ok=True)
    file = folder / "file"
    file.write_text("in the way")
    try:
        rk.save_edits(model, file)
    except OSError as error:
        assert rank == 0, error  # noqa: PT017
    except RuntimeError as error:
        assert rank == 1, error  # noqa: PT017
        assert "process 0 could not write the edits" in str(error)  # noqa: PT017
    else:
        raise AssertionError("nothing was raised")


def by_trainer(rank: int, folder: Path) -> None:
    """Half of the steps, then all of them from the checkpoint; the losses as one process has them go into a file."""
    losses = []
    for start in (None, str(folder / f"checkpoint-{HALF}")):
        model = zoo.tiny(NAME)
        rk.patch(model)
        rk.load_edits(model, folder / "start")
        trainer, watch = trainer_of(
            model,
            training(edit_parameters(model)),
            folder,
            RedTrainer,
            per_device_train_batch_size=BATCH // 2,
            ddp_backend="gloo",
            dataloader_pin_memory=False,
            save_strategy="steps",
            save_steps=HALF,
        )
        if start is None:
            trainer.add_callback(StopAt(HALF))
        with counted() as written:
            trainer.train(resume_from_checkpoint=start)
        assert len(written) == (rank == 0), (rank, written)
        losses += watch.losses
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))


def best_by_trainer(rank: int, folder: Path) -> None:
    """Each process names the best checkpoint as it is called in the end, has its values, and resumes from it."""

    def train(how: str, steps: int, resume: str | bool | None = None, **options):
        model = zoo.tiny(NAME)
        rk.patch(model)
        optimizer = torch.optim.SGD(listed(edit_parameters(model)), lr=0.05)
        arguments = TrainingArguments(
            str(folder / how), max_steps=steps, use_cpu=True, ddp_backend="gloo", per_device_train_batch_size=2,
            save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, report_to="none",
            disable_tqdm=True, dataloader_pin_memory=False, **options,
        )  # fmt: skip
        trainer = RedTrainer(
            model=model,
            args=arguments,
            train_dataset=rows(NAME, 8),
            eval_dataset=rows(NAME, 4, seed=51),
            optimizers=(optimizer, None),
            callbacks=[Upward(2)],
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.best_global_step == 2, (rank, trainer.state.best_global_step)
        best = folder / how / "checkpoint-2"
        assert trainer.state.best_model_checkpoint == str(best), (rank, trainer.state.best_model_checkpoint)
        fresh = zoo.tiny(NAME)
        rk.patch(fresh)
        rk.load_edits(fresh, best)
        assert same_vectors(model, fresh), (rank, how)
        return {path.name for path in (folder / how).iterdir() if "checkpoint" in path.name or "partial" in path.name}

    limited = {"save_total_limit": 1, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    for how, options in {"all": {}, "limited": limited}.items():
        train(how, 2, **options)  # ends at its best: the newest checkpoint
        kept = train(how, 4, True, **options)  # finds that one, and goes on to what is worse
        dist.barrier()
        wanted = {"checkpoint-2"} if how == "limited" else {f"checkpoint-{step}" for step in range(1, 5)}
        assert rank or kept == wanted, (how, kept)


def sharded_in_a_trainer(rank: int, folder: Path) -> None:
    """RedTrainer's checkpoint of a sharded model with a trained head, and SaveEdits: all processes give their parts."""
    model = zoo.tiny("roberta")
    rk.patch(model)
    zoo.fill(edit_parameters(model), zoo.vectors(zoo.sites("roberta")))
    model.classifier.requires_grad_(True)
    trainer, _ = trainer_of(model, training(edit_parameters(model)), folder, RedTrainer, "roberta", ddp_backend="gloo")
    trained = [own for own in model.parameters() if own.requires_grad]
    wanted = [own.detach().clone() for own in trained]
    fully_shard(model)
    trained = [own for own in model.parameters() if own.requires_grad]
    assert all(map(_sharded.is_sharded, trained))
    with counted() as written:
        trainer.save_model(str(folder / "checkpoint-7"))
        assert len(written) == (rank == 0)
        state = TrainerState(global_step=8, is_world_process_zero=rank == 0)
        SaveEdits().on_save(trainer.args, state, trainer.control, model=model)
        assert len(written) == 2 * (rank == 0)
    assert same_tensors(folder / "checkpoint-7", folder / "checkpoint-8", "red_edits.safetensors")
    with torch.no_grad():
        for own in trained:
            own.zero_()
    trainer._load_from_checkpoint(str(folder / "checkpoint-7"))
    for own, before in zip(trained, wanted, strict=True):
        assert torch.equal(_sharded.whole(own), before)


def same_tensors(first: Path, second: Path, name: str) -> bool:
    """The descriptions differ: one of both says that there is a head."""
    one, two = (safetensors.torch.load_file(folder / name) for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


class StopAt(TrainerCallback):
    """Ends the training after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


class Upward(TrainerCallback):
    """Has the loss rise after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer.param_groups[0]["maximize"] = state.global_step >= self.step


def main(what: str, rank: int, folder: Path) -> None:
    if what == "save and resume":
        for how in ("ddp", "fsdp layers", "fsdp whole"):
            train_and_resume(how, rank, folder / how.replace(" ", "-"))
        a_write_that_fails(rank, folder)
        sharded_in_a_trainer(rank, folder / "trainer")
    elif what == "best":
        best_by_trainer(rank, folder)
    else:
        by_trainer(rank, folder)


if __name__ == "__main__":
    with in_group() as rank:
        main(sys.argv[3], rank, Path(sys.argv[4]))
