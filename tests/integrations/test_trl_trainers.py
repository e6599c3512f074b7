"""TRL's trainers on tokenised data: SFT packed or not, and DPO whose reference is the model without its edits."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from stack_helpers import Losses, files, listed, same_vectors
from tiny_folders import VOCABULARY, tokenizer

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.finetune import data, trl_trainers
from red_kernels.finetune.resume import ResumingTrainer
from red_kernels.patching.patch import patch

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

LENGTH = 24


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "seed": 3,
        **options,
    }


def patched(random: bool = False) -> torch.nn.Module:
    model = zoo.tiny("llama", vocab_size=VOCABULARY)
    patch(model, RedConfig())
    if random:
        zoo.fill(edit_parameters(model), other_vectors(model))
    return model


def other_vectors(model: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(7)
    return {
        site: {part: own.detach() + 0.5 * torch.randn(own.shape, generator=generator) for part, own in parts.items()}
        for site, parts in edit_parameters(model).items()
    }


def completions(count: int = 8) -> data.Tokenised:
    made = [data.Completion("ab" * (place % 3 + 1), "cd" * (place % 4 + 1), "", "") for place in range(count)]
    return data.chat_dataset(made, tokenizer(), LENGTH)


def preferences(count: int = 8) -> data.Tokenised:
    made = [
        data.Preference("ab" * (place % 3 + 1), "cd" * (place % 4 + 1), "ef" * (place % 2 + 1), "", "")
        for place in range(count)
    ]
    return data.preference_dataset(made, tokenizer(), LENGTH)


def optimizer(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, None]:
    return torch.optim.SGD(listed(edit_parameters(model)), lr=0.05), None


@pytest.mark.parametrize("packs", [False, True])
def test_sft_learns_as_a_loop_of_ones_own(packs: bool, tmp_path: Path) -> None:
    """All examples in each step: the losses are those of all answers' tokens, packed or padded."""
    train: Any = completions()
    model, mine = patched(), patched()
    rows = data.packed(train, LENGTH) if packs else train
    watch = Losses()
    trainer = trl_trainers.sft_trainer(
        model,
        tokenizer(),
        rows,
        arguments(tmp_path, per_device_train_batch_size=len(rows)),
        callbacks=[watch],
        optimizers=optimizer(model),
    )
    assert isinstance(trainer, trl.SFTTrainer)
    assert type(trainer).__name__ == "RedSFTTrainer"
    trainer.train()
    steps, _ = optimizer(mine)
    losses = []
    for _ in range(3):
        loss: Any = 0.0
        for example in train:
            batch = {name: torch.tensor([value]) for name, value in example.items()}
            own = sum(label != -100 for label in example["labels"])
            loss = loss + mine(**batch).loss * own / train.learnt
        loss.backward()
        steps.step()
        steps.zero_grad()
        losses.append(loss.item())
    assert watch.losses == pytest.approx(losses, rel=1e-4)
    assert losses[2] < losses[0]
    for one, other in zip(listed(edit_parameters(model)), listed(edit_parameters(mine)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_sft_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    def run(**options: Any) -> Any:
        model = patched()
        trainer = trl_trainers.sft_trainer(
            model,
            tokenizer(),
            completions(),
            arguments(tmp_path, save_strategy="steps", save_steps=2, learning_rate=0.05),
            held_out=completions(3),
            base=ResumingTrainer,
        )
        assert math.isfinite(trainer.evaluate()["eval_loss"])
        trainer.train(**options)
        return model

    whole = run()
    assert {"red_edits.safetensors", "optimizer.pt"} <= files(tmp_path / "checkpoint-2")
    assert "model.safetensors" not in files(tmp_path / "checkpoint-2")
    assert same_vectors(whole, run(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))


def test_sft_on_blocks_of_text(tmp_path: Path) -> None:
    """Any data set of `input_ids` and `labels` will do, of tensors too."""
    blocks, watch = data.TokenBlocks(["some words and more of them"] * 8, tokenizer(), 16), Losses()
    model = patched()
    with torch.no_grad():
        wanted = model(input_ids=blocks[:]["input_ids"], labels=blocks[:]["labels"]).loss.item()
    options = arguments(tmp_path, per_device_train_batch_size=len(blocks), max_steps=1)
    trl_trainers.sft_trainer(model, tokenizer(), blocks, options, callbacks=[watch]).train()
    assert watch.losses == [pytest.approx(wanted, abs=1e-3)]


def log_probabilities(model: torch.nn.Module, pairs: data.Tokenised) -> list[list[float]]:
    """Of the chosen and of the rejected answers."""
    found: list[list[float]] = []
    for name in ("chosen_ids", "rejected_ids"):
        found.append([])
        for pair in pairs:
            ids = torch.tensor([pair["prompt_ids"] + pair[name]])
            with torch.no_grad():
                values = model(input_ids=ids).logits.log_softmax(-1)
            start = len(pair["prompt_ids"])
            places = torch.arange(start, ids.shape[1])
            found[-1].append(values[0, places - 1, ids[0, start:]].sum().item())
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_begins_at_log_2(checkpointing: bool, tmp_path: Path) -> None:
    model, watch = patched(), Losses()
    trainer = trl_trainers.dpo_trainer(
        model,
        tokenizer(),
        preferences(),
        arguments(tmp_path, per_device_train_batch_size=8, gradient_checkpointing=checkpointing, beta=0.5),
        callbacks=[watch],
        optimizers=optimizer(model),
    )
    assert type(trainer).__name__ == "RedDPOTrainer"
    assert trainer.args.gradient_checkpointing is checkpointing
    trainer.train()
    assert watch.losses[0] == pytest.approx(math.log(2), abs=1e-4)  # TRL rounds what it logs
    assert watch.losses[2] < watch.losses[0] - 1e-3


def test_checkpointing_by_the_name_of_transformers(tmp_path: Path) -> None:
    """The newer name as the former one, off by default; and no option that was not given is warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*gradient_checkpointing. is deprecated", category=FutureWarning)
        off = trl_trainers.dpo_trainer(patched(), tokenizer(), preferences(), arguments(tmp_path))
        named = arguments(tmp_path, **{trl_trainers.CHECKPOINTING: True})
        on = trl_trainers.dpo_trainer(patched(), tokenizer(), preferences(), named)
    assert not off.args.gradient_checkpointing
    assert on.args.gradient_checkpointing


def test_the_reference_is_the_base_model(tmp_path: Path) -> None:
    """Of a model that begins with edits: in the loss, and where TRL computes the reference's values beforehand."""
    model, base, pairs = patched(random=True), zoo.tiny("llama", vocab_size=VOCABULARY), preferences()
    edited, plain = log_probabilities(model, pairs), log_probabilities(base, pairs)
    with pytest.warns(UserWarning, match="the base model without edits"):
        trainer = trl_trainers.dpo_trainer(model, tokenizer(), pairs, arguments(tmp_path, beta=0.5))
    assert len(list(trainer.ref_model.parameters())) == 0  # nothing is there twice
    batch = trainer.data_collator([pairs[place] for place in range(len(pairs))])
    reference = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    for one, other, far in zip(reference, plain, edited, strict=True):
        assert one.tolist() == pytest.approx(other, rel=1e-5)
        assert one.tolist() != pytest.approx(far, rel=1e-3)
    margin = torch.tensor(edited[0]) - torch.tensor(plain[0]) - torch.tensor(edited[1]) + torch.tensor(plain[1])
    wanted = -torch.nn.functional.logsigmoid(0.5 * margin).mean()
    assert trainer.compute_loss(model, batch).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert log_probabilities(model, pairs) == edited  # the edits are on again


def test_reference_values_computed_beforehand(tmp_path: Path) -> None:
    pairs = preferences()
    trainer = trl_trainers.dpo_trainer(
        patched(), tokenizer(), pairs, arguments(tmp_path, precompute_ref_log_probs=True), held_out=preferences(2)
    )
    plain = log_probabilities(zoo.tiny("llama", vocab_size=VOCABULARY), pairs)
    assert list(trainer.train_dataset["ref_chosen_logps"]) == pytest.approx(plain[0], rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (trl_trainers.sft_trainer, {"packing": True}, "packing is True, expected False"),
        (trl_trainers.sft_trainer, {"max_length": 7}, "max_length is 7, expected None"),
        (trl_trainers.dpo_trainer, {"sync_ref_model": True}, "sync_ref_model is True"),
        (trl_trainers.dpo_trainer, {"fsdp": "full_shard"}, "fsdp is set"),
    ],
)
def test_arguments_that_do_not_fit(make: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    train = preferences() if make is trl_trainers.dpo_trainer else completions()
    with pytest.raises(ValueError, match=f"arguments: {message}"):
        make(patched(), tokenizer(), train, arguments(tmp_path, **options))


def test_models_and_data_that_do_not_fit(tmp_path: Path) -> None:
    packed = data.packed(completions(), LENGTH)
    with pytest.raises(ValueError, match="both packed, or none"):
        trl_trainers.sft_trainer(patched(), tokenizer(), packed, arguments(tmp_path), held_out=completions())
    model = zoo.tiny("opt", vocab_size=VOCABULARY)
    patch(model, RedConfig())
    with pytest.raises(ValueError, match=r"packing: .*reads one packed document in the next"):
        trl_trainers.sft_trainer(model, tokenizer(), packed, arguments(tmp_path))
    with pytest.raises(ValueError, match=r"not patched|rk\.patch"):
        trl_trainers.dpo_trainer(
            zoo.tiny("llama", vocab_size=VOCABULARY), tokenizer(), preferences(), arguments(tmp_path)
        )


@pytest.mark.parametrize("make", [trl_trainers.sft_trainer, trl_trainers.dpo_trainer])
def test_without_trl(make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install red-kernels\[train\]"):
        make(patched(), tokenizer(), completions(), arguments(tmp_path))
