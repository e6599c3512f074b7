"""TRL's trainers with a reference model: one that begins as the model does, loaded edits included."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from tiny_folders import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import red_kernels as rk
from red_kernels.edits.find import edit_parameters
from red_kernels.integrations.trainer import RedTrainer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = ("scale", "bias", "edit", "norm", "residual", "stream")
ROWS = [
    {"prompt": f"{WORDS[row % 6]} ", "chosen": WORDS[(row + 1) % 6], "rejected": WORDS[(row + 2) % 6]}
    for row in range(4)
]
UNPAIRED = [
    {"prompt": row["prompt"], "completion": row["chosen" if label else "rejected"], "label": label}
    for row in ROWS
    for label in (True, False)
]
TRAINERS = {
    "DPO": (trl.DPOTrainer, trl.DPOConfig, ROWS, math.log(2)),
    "KTO": (trl.KTOTrainer, trl.KTOConfig, UNPAIRED, 0.5),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model, and edits of it that change much."""
    base = tiny_llama(tmp_path_factory.mktemp("base"))
    edits = tmp_path_factory.mktemp("edits")
    model = AutoModelForCausalLM.from_pretrained(base)
    rk.patch(model)
    torch.manual_seed(4)
    with torch.no_grad():
        for parts in edit_parameters(model).values():
            for own in parts.values():
                own.add_(torch.randn_like(own), alpha=5.0)
    rk.save_edits(model, edits)
    return base, edits


def loaded(folders):
    base, edits = folders
    model = AutoModelForCausalLM.from_pretrained(base)
    rk.patch(model, rk.saved_config(edits))
    rk.load_edits(model, edits)
    return model


def first_loss(name, folders, tmp_path, model, with_red=True, **options):
    kind, arguments, table, _ = TRAINERS[name]
    reference = options.pop("ref_model", None)
    trainer = type("Both", (RedTrainer, kind) if with_red else (kind,), {})(
        model=model,
        ref_model=reference,
        args=arguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, max_length=64, learning_rate=0.05, **options,
        ),
        train_dataset=datasets.Dataset.from_list(table),
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] != losses[0], "nothing was learnt"
    return losses[0]


@pytest.mark.parametrize("with_red", [True, False])
@pytest.mark.parametrize("how", ["a copy", "loaded twice", "computed before"])
@pytest.mark.parametrize("name", TRAINERS)
def test_the_first_loss_is_that_of_equal_models(name, how, with_red, folders, tmp_path):
    model = loaded(folders)
    options = {
        "a copy": lambda: {"ref_model": copy.deepcopy(model).requires_grad_(False)},
        "loaded twice": lambda: {"ref_model": loaded(folders)},
        "computed before": lambda: {"precompute_ref_log_probs": True},
    }[how]()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ref_model")
        loss = first_loss(name, folders, tmp_path, model, with_red, **options)
    assert loss == pytest.approx(TRAINERS[name][-1], abs=1e-5)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_reference_without_the_loaded_edits_is_said(name, folders, tmp_path):
    with pytest.warns(UserWarning, match="ref_model: is the base model without edits"):
        loss = first_loss(name, folders, tmp_path, loaded(folders))
    assert abs(loss - TRAINERS[name][-1]) > 0.01


def test_nothing_is_said_where_the_edits_begin_as_the_identity(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    rk.patch(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ref_model")
        loss = first_loss("DPO", folders, tmp_path, model)
    assert loss == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_trainers_without_an_argument_for_the_reference(kind, given, folders, tmp_path):
    """It is put in their attribute; the policy's divergence from it is 0 at first."""
    model = loaded(folders)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=lambda completions, **columns: [float(len(set(text))) for text in completions],
        args=getattr(trl, f"{kind}Config")(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=4,
            beta=0.1, use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )  # fmt: skip
    if given:
        trainer.ref_model = copy.deepcopy(model).requires_grad_(False)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    assert (abs(first["kl"]) < 1e-6) == given
