"""transformers' Trainer with a patched model: every way of running the model that its arguments offer, and resuming."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from stack_helpers import BATCH, STEPS, files, hold_training, listed, same_vectors, trainer_of, training
from transformers import Trainer

from red_kernels.checkpoints.checkpoint import load_edits, saved_config
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.integrations.trainer import RedTrainer
from red_kernels.integrations.trainer_callback import SaveEdits
from red_kernels.patching.patch import patch

pytest.importorskip("accelerate")

WAYS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "autocast": {"bf16": True},
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_ways_of_training(name, way, tmp_path):
    def train(model, optimizer, **options):
        inputs = []
        site = model.get_submodule(zoo.sites(name)[1])
        if "torch_compile" not in options:
            site.register_forward_pre_hook(lambda module, args: inputs.append(args[0].dtype))
        trainer, watch = trainer_of(model, optimizer, tmp_path, name=name, **options)
        trainer.train()
        if "gradient_checkpointing" in options:
            assert len(inputs) == 2 * STEPS, "nothing was recomputed"
        if "bf16" in options and name != "t5":  # whose last projection is kept in float32
            assert set(inputs) == {torch.bfloat16}
        return watch.losses

    hold_training(
        name,
        lambda model, optimizer: train(model, optimizer, **WAYS[way]),
        torch.bfloat16 if way == "autocast" else torch.float32,
        exactly=train,  # one batch, nothing recomputed, nothing cast
    )


@pytest.mark.parametrize("kind", [Trainer, RedTrainer])
def test_resuming(kind, tmp_path):
    """A run that stopped half-way and went on ends as one that did not: each loss, each bit of the vectors."""

    def run(folder, **options):
        model = zoo.tiny("llama")
        patch(model, RedConfig())
        optimizer = torch.optim.AdamW(listed(edit_parameters(model)), lr=1e-2, weight_decay=0.0)
        trainer, watch = trainer_of(
            model, optimizer, folder, kind, save_strategy="steps", save_steps=2, lr_scheduler_type="linear"
        )
        trainer.train(**options)
        return model, watch.losses

    whole, losses = run(tmp_path)
    checkpoint = tmp_path / f"checkpoint-{STEPS // 2}"
    assert ("model.safetensors" in files(checkpoint)) == (kind is Trainer)
    assert "red_edits.safetensors" in files(checkpoint) or kind is Trainer
    resumed, later = run(tmp_path, resume_from_checkpoint=str(checkpoint))
    assert later == losses[STEPS // 2 :]
    assert len(later) == STEPS // 2
    assert same_vectors(whole, resumed)


def test_a_plain_checkpoint_is_saved_with_its_vectors(tmp_path):
    """Trainer's own checkpoint holds the base model too; SaveEdits puts the edits beside it, as rk.save_edits does."""
    model = zoo.tiny("llama")
    patch(model, RedConfig())
    trainer, _ = trainer_of(model, training(edit_parameters(model)), tmp_path, save_strategy="steps", save_steps=2)
    trainer.add_callback(SaveEdits())
    trainer.train()
    other = zoo.tiny("llama")
    last = tmp_path / f"checkpoint-{STEPS}"
    patch(other, saved_config(last))
    load_edits(other, last)
    assert same_vectors(model, other)
    patch(first := zoo.tiny("llama"), RedConfig())
    load_edits(first, tmp_path / "checkpoint-2")
    assert not same_vectors(model, first)
