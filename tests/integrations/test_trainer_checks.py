"""RedTrainer and SaveEdits: what they refuse before anything is trained, and what their checkpoints hold."""

from __future__ import annotations

from concurrent.futures import Future

import model_zoo as zoo
import pytest
import torch
import transformers
from stack_helpers import STEPS, files, listed, rows, trainer_of, training
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import red_kernels as rk
from red_kernels.edits.find import edit_parameters
from red_kernels.integrations.trainer import RedTrainer, head_parameters
from red_kernels.integrations.trainer_callback import SaveEdits

pytest.importorskip("accelerate")


def peft():
    return pytest.importorskip("peft")


def patched(name="llama"):
    model = zoo.tiny(name)
    rk.patch(model)
    return model


def merged():
    model = patched()
    rk.merge(model, loadable=False)
    return model


def unpatched():
    model = patched()
    rk.unpatch(model)
    return model


def with_red_adapter():
    peft()
    from red_kernels.integrations.peft import RedPeftConfig

    return peft().get_peft_model(zoo.tiny("llama"), RedPeftConfig(task_type="CAUSAL_LM"))


def with_red_adapter_by_transformers():
    return with_red_adapter().base_model.model


def with_lora():
    return peft().get_peft_model(zoo.tiny("llama"), peft().LoraConfig(target_modules=["q_proj"]))


class Wrapper(nn.Module):
    """Holds a model, as a person's own classes do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


NOT_PATCHED = {
    "a plain model": (lambda: zoo.tiny("llama"), "is not patched"),
    "an encoder with a head": (lambda: zoo.tiny("bert"), "is not patched"),
    "a wrapped model": (lambda: Wrapper(zoo.tiny("llama")), "is not patched"),
    "a compiled model": (lambda: torch.compile(zoo.tiny("llama"), backend="eager"), "is not patched"),
    "a merged model": (merged, "is not patched"),
    "an unpatched model": (unpatched, "is not patched"),
    "a part of a patched model": (lambda: patched().model, "patched through another model"),
    "LoRA alone": (with_lora, "is not patched"),
    "RED in PEFT": (with_red_adapter, "plain Trainer"),
    "RED in PEFT, wrapped": (lambda: Wrapper(with_red_adapter()), "plain Trainer"),
    "RED in PEFT by transformers": (with_red_adapter_by_transformers, "plain Trainer"),
}
MAKERS = pytest.mark.parametrize(("make", "message"), NOT_PATCHED.values(), ids=NOT_PATCHED)


def arguments(folder, **options):
    return TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options)


@MAKERS
def test_refused_at_construction(make, message, tmp_path):
    model = make()
    with pytest.raises(ValueError, match=message) as error:
        RedTrainer(model=model, args=arguments(tmp_path / "run"), train_dataset=rows("llama", 4))
    assert "RedTrainer" in str(error.value)
    with pytest.raises(ValueError, match=message):
        RedTrainer(model, arguments(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=message) as error:
        Trainer(model=model, args=arguments(tmp_path / "run"), callbacks=[SaveEdits()])
    assert "SaveEdits" in str(error.value)


@MAKERS
def test_refused_from_model_init(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RedTrainer(model_init=make, args=arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        Trainer(model_init=make, args=arguments(tmp_path / "run"), callbacks=[SaveEdits()])


def test_a_class_of_both_is_refused_too(tmp_path):
    class Other(Trainer):
        pass

    class Both(RedTrainer, Other):
        pass

    with pytest.raises(ValueError, match="Both saves the edits"):
        Both(model=zoo.tiny("llama"), args=arguments(tmp_path / "run"))


def test_a_trainer_that_wraps_its_model_is_looked_at_again(tmp_path):
    """As TRL's trainers do by `peft_config`: what they have made of the model counts."""

    class Replacing(Trainer):
        def __init__(self, model=None, **options):
            super().__init__(model=zoo.tiny("llama"), **options)

    class Both(RedTrainer, Replacing):
        pass

    with pytest.raises(ValueError, match="is not patched"):
        Both(model=patched(), args=arguments(tmp_path / "run"))


@pytest.mark.parametrize("how", ["model_init", "wrapped", "compiled", "positional"])
def test_patched_models_are_taken_however_they_arrive(how, tmp_path):
    model = patched()
    options = {"args": arguments(tmp_path / "run", max_steps=1), "train_dataset": rows("llama", 4)}
    if how == "model_init":
        trainer = RedTrainer(model_init=lambda: patched(), **options)
        trainer.train()  # makes the model anew
    elif how == "wrapped":
        trainer = RedTrainer(model=Wrapper(model), **options)
    elif how == "compiled":
        trainer = RedTrainer(model=torch.compile(model, backend="eager"), **options)
    else:
        trainer = RedTrainer(model, **options)
    trainer.save_model(str(tmp_path / "saved"))
    fresh = zoo.tiny("llama")
    rk.patch(fresh, rk.saved_config(tmp_path / "saved"))
    rk.load_edits(fresh, tmp_path / "saved")


def test_a_model_that_model_init_makes_later_is_checked_before_training(tmp_path):
    models = [patched(), zoo.tiny("llama")]
    trainer = RedTrainer(
        model_init=lambda: models.pop(0), args=arguments(tmp_path, max_steps=1), train_dataset=rows("llama", 4)
    )
    with pytest.raises(ValueError, match="is not patched"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_save_edits_added_later_is_checked_before_training(tmp_path):
    trainer = Trainer(model=with_red_adapter(), args=arguments(tmp_path, max_steps=1), train_dataset=rows("llama", 4))
    trainer.add_callback(SaveEdits())
    with pytest.raises(ValueError, match="plain Trainer"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_plain_trainer_saves_red_in_peft(tmp_path):
    """The remedy that the refusal names."""
    model = with_red_adapter()
    optimizer = torch.optim.SGD([own for own in model.parameters() if own.requires_grad], lr=0.1)
    trainer, _ = trainer_of(model, optimizer, tmp_path, save_strategy="steps", save_steps=STEPS)
    trainer.train()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files(tmp_path / f"checkpoint-{STEPS}")


def several(name="llama"):
    """A model with three edits of random values, of which `alice` is active."""
    model = patched(name)
    zoo.fill(edit_parameters(model), zoo.vectors(zoo.sites(name)))
    rk.add_edit(model, "alice", copy_of="default")
    rk.add_edit(model, "bob")
    rk.switch_edit(model, "alice")
    return model


def values(model, name):
    return [own.detach().clone() for own in listed(edit_parameters(model, name))]


@pytest.mark.parametrize("frozen", [True, False])
def test_other_edits_are_no_head(frozen):
    """Whether or not the vectors of edits that are not active are trainable."""
    model = several()
    for name in ("default", "bob"):
        for own in listed(edit_parameters(model, name)):
            own.requires_grad_(not frozen)
    assert head_parameters(model) == {}
    model = several("roberta")
    for own in listed(edit_parameters(model, "default")):
        own.requires_grad_(not frozen)
    model.classifier.requires_grad_(True)
    assert {own.partition(".")[0] for own in head_parameters(model)} == {"classifier"}


def test_a_checkpoint_of_one_edit_of_several(tmp_path):
    """It holds the active edit alone: a model with one edit resumes from it, and the others' values stay."""
    model = several()
    others = {name: values(model, name) for name in ("default", "bob")}

    def trainer_for(model):
        optimizer = training(edit_parameters(model))
        return trainer_of(model, optimizer, tmp_path, RedTrainer, save_strategy="steps", save_steps=2)[0]

    trainer_for(model).train()
    trained = values(model, "alice")
    checkpoint = tmp_path / "checkpoint-2"
    assert not any("head" in name for name in files(checkpoint))
    for name, before in others.items():
        assert all(map(torch.equal, before, values(model, name))), name
    assert not all(map(torch.equal, others["default"], trained))

    one = patched()
    trainer_for(one).train(resume_from_checkpoint=str(checkpoint))
    assert all(map(torch.equal, trained, values(one, "default")))

    again = several()
    trainer_for(again).train(resume_from_checkpoint=str(checkpoint))
    assert all(map(torch.equal, trained, values(again, "alice")))
    for name, before in others.items():
        assert all(map(torch.equal, before, values(again, name))), name


def test_a_checkpoint_of_one_edit_of_several_merges(tmp_path):
    from tiny_folders import tiny_llama
    from transformers import AutoModelForCausalLM

    from red_kernels.cli import main

    tiny_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    rk.patch(model, rk.RedConfig(kind="scaling"))
    rk.add_edit(model, "alice")
    rk.switch_edit(model, "alice")
    trainer = RedTrainer(
        model=model,
        args=arguments(tmp_path / "run", max_steps=2, save_steps=2, learning_rate=0.1),
        train_dataset=rows("llama", 4),
    )
    trainer.train()
    command = ["merge", "--model", str(tmp_path / "base"), "--edits", str(tmp_path / "run" / "checkpoint-2")]
    assert not main([*command, "--output", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("save_total_limit", [None, 1])
def test_the_best_checkpoint_is_known_by_its_own_name(save_total_limit, tmp_path):
    """Also after the folder of a run has moved: Trainer forgets the old name, and finds the checkpoint again."""

    class Upward(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **options):
            optimizer.param_groups[0]["maximize"] = True

    def train(folder, steps, resume=None):
        model = patched()
        trainer = RedTrainer(
            model=model,
            args=arguments(
                folder, max_steps=steps, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                save_total_limit=save_total_limit, load_best_model_at_end=True, per_device_train_batch_size=2,
            ),
            train_dataset=rows("llama", 8),
            eval_dataset=rows("llama", 4, seed=51),
            optimizers=(torch.optim.SGD(listed(edit_parameters(model)), lr=0.05), None),
            callbacks=[] if resume is None else [Upward()],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        best = folder / f"checkpoint-{trainer.state.best_global_step}"
        assert trainer.state.best_model_checkpoint == str(best)
        assert best.is_dir()
        assert not [name for name in files(folder) if name.startswith(".partial")]
        fresh = patched()
        rk.load_edits(fresh, best)
        assert all(map(torch.equal, values(model, "default"), values(fresh, "default")))
        return trainer

    first = train(tmp_path / "run", 2)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    second = train(moved, 6, str(moved / "checkpoint-2"))  # the loss rises: the first stays the best
    assert first.state.best_global_step == second.state.best_global_step == 2
    kept = {name for name in files(moved) if name.startswith("checkpoint")}
    assert kept == ({"checkpoint-2"} if save_total_limit else {"checkpoint-2", "checkpoint-4", "checkpoint-6"})


def test_a_push_has_the_edits_and_no_partial_folder(tmp_path, monkeypatch):
    """What Trainer uploads while training: the output folder with the newest edits, the checkpoint by its last name."""
    from transformers import trainer as module

    uploads = []

    class Hub:
        def upload_folder(self, *, folder_path, path_in_repo=None, **options):
            uploads.append((folder_path, path_in_repo, files(type(tmp_path)(folder_path))))
            done = Future()
            done.set_result(None)
            return done

    monkeypatch.setattr(module, "hf_api", Hub)
    monkeypatch.setattr(
        Trainer, "init_hf_repo", lambda self, token=None: vars(self).update(hub_model_id="me/x", push_in_progress=None)
    )
    model = patched()
    trainer, _ = trainer_of(
        model, training(edit_parameters(model)), tmp_path, RedTrainer, save_strategy="steps", save_steps=2,
        push_to_hub=True, hub_strategy="all_checkpoints", hub_always_push=True,
    )  # fmt: skip
    trainer.train()
    assert [path for path, _, _ in uploads] == [
        str(folder) for step in (2, 4) for folder in (tmp_path, tmp_path / f"checkpoint-{step}")
    ]
    assert [where for _, where, _ in uploads] == [None, "checkpoint-2", None, "checkpoint-4"]
    for path, _, names in uploads:
        assert any(name.startswith("red_edits") for name in names), path
        assert not any(name.startswith(".") for name in names), path
    fresh = patched()
    rk.load_edits(fresh, tmp_path)
    assert all(map(torch.equal, values(model, "default"), values(fresh, "default")))


def test_no_edit_has_weight_decay(tmp_path):
    """It would pull a scale toward 0. A head that is trained beside the edits has it, as with any Trainer."""
    model = transformers.LlamaForSequenceClassification(zoo.tiny("llama").config)
    rk.patch(model, rk.RedConfig(train_head=True))
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to="none")
    groups = RedTrainer(model=model, args=arguments).create_optimizer().param_groups
    decayed = {id(own) for group in groups if group["weight_decay"] for own in group["params"]}
    trained = {name for name, own in model.named_parameters() if own.requires_grad and id(own) in decayed}
    assert trained == {"score.weight"}
    assert sum(len(group["params"]) for group in groups) == 1 + sum(map(len, edit_parameters(model).values()))
