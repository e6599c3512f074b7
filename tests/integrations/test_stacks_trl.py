"""TRL's SFTTrainer with a patched model: its own losses and defaults, and checkpoints without base weights."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from stack_helpers import Losses, files, hold_training, listed, same_vectors
from tiny_folders import VOCABULARY, tiny_llama

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.integrations.trainer import RedTrainer
from red_kernels.patching.patch import patch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
STEPS = 4


class RedSFTTrainer(RedTrainer, trl.SFTTrainer):
    """SFTTrainer with RedTrainer's checkpoints."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(tiny_llama(tmp_path_factory.mktemp("tokenizer")))


def texts(count):
    words = ("scale", "bias", "edit", "norm", "residual")
    lines = [" ".join(words[(row + place) % 5] for place in range(2 + row % 4)) for row in range(count)]
    return datasets.Dataset.from_dict({"text": lines})


def trainer_of(model, optimizer, folder, tokenizer, kind=trl.SFTTrainer, **options):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "max_length": 32,
        "lr_scheduler_type": "constant",
    }
    watch = Losses()
    trainer = kind(
        model=model,
        args=trl.SFTConfig(**{**defaults, **options}),
        train_dataset=texts(4 * STEPS),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[watch],
    )
    return trainer, watch


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "dft"}, {"packing": True, "packing_strategy": "wrapped"}], ids=str
)
def test_losses_and_vectors(options, tokenizer, tmp_path):
    """With SFTTrainer's own defaults, activation checkpointing among them."""

    def train(model, optimizer):
        trainer, watch = trainer_of(model, optimizer, tmp_path, tokenizer, **options)
        trainer.train()
        return watch.losses

    hold_training("llama", train, vocab_size=VOCABULARY)


def test_resuming(tokenizer, tmp_path):
    def run(**options):
        model = zoo.tiny("llama", vocab_size=VOCABULARY)
        patch(model, RedConfig())
        optimizer = torch.optim.AdamW(listed(edit_parameters(model)), lr=1e-2, weight_decay=0.0)
        trainer, watch = trainer_of(
            model, optimizer, tmp_path, tokenizer, RedSFTTrainer, save_strategy="steps", save_steps=2
        )
        trainer.train(**options)
        return model, watch.losses

    whole, losses = run()
    checkpoint = tmp_path / "checkpoint-2"
    assert "red_edits.safetensors" in files(checkpoint)
    assert "model.safetensors" not in files(checkpoint)
    resumed, later = run(resume_from_checkpoint=str(checkpoint))
    assert later == losses[2:]
    assert len(later) == STEPS - 2
    assert same_vectors(whole, resumed)
