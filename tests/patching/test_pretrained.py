"""`save_pretrained` of a patched model: the state as it is, the edits beside it, and a word on how they are loaded."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import warnings
import weakref

import model_zoo as zoo
import pytest
import torch
import transformers
from checkpoint_helpers import same, trained, values
from safetensors.torch import load_file
from stack_helpers import STEPS, files, same_vectors, trainer_of, training
from torch import nn

import red_kernels as rk
from red_kernels.edits.find import edit_parameters

SAID = r"no edits; they are next to it.*rk\.patch\(model, rk\.saved_config\('.*'\)\); rk\.load_edits\(model, '.*'\)"


def into(model, folder):
    """Do with a fresh base model what the warning says."""
    rk.patch(model, rk.saved_config(folder))
    rk.load_edits(model, folder)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "roberta"])
def test_both_lines_bring_the_edits_back(name, tmp_path):
    model = trained(name)
    keys = list(model.state_dict())
    with pytest.warns(UserWarning, match=SAID) as said:
        model.save_pretrained(tmp_path)
    assert len(said) == 1
    assert list(model.state_dict()) == keys
    assert {key for key in load_file(tmp_path / "model.safetensors") if ".red_edit." in key}  # Trainer resumes from it
    fresh = into(type(model).from_pretrained(tmp_path), tmp_path)
    assert same(values(model), values(fresh))
    batch = zoo.inputs(name)
    assert torch.equal(model.eval()(**batch).logits, fresh.eval()(**batch).logits)


def test_it_is_said_in_each_call_and_no_more_after_unpatching(tmp_path):
    model = trained()
    for folder in ("one", "two"):
        with pytest.warns(UserWarning, match=SAID):
            model.save_pretrained(tmp_path / folder)
    rk.unpatch(model)
    assert "save_pretrained" not in model.__dict__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "plain")
    assert not any("red" in name for name in files(tmp_path / "plain"))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy of the copy"])
def test_copies_save_themselves(how, tmp_path):
    model = trained()
    one = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)
    one = copy.deepcopy(one) if how == "deepcopy of the copy" else one
    with torch.no_grad():
        for parts in edit_parameters(one).values():
            for own in parts.values():
                own.add_(1)
    wanted = values(one)
    del model
    gc.collect()
    with pytest.warns(UserWarning, match=SAID):
        one.save_pretrained(tmp_path)
    assert same(wanted, values(into(transformers.LlamaForCausalLM.from_pretrained(tmp_path), tmp_path)))
    rk.unpatch(one)
    assert "save_pretrained" not in one.__dict__


def test_a_model_is_freed_at_once():
    zoo.tiny("llama")  # the first one of a process is held by a cycle of its library's
    gc.disable()
    try:
        model = zoo.tiny("llama")
        rk.patch(model)
        assert "save_pretrained" in model.__dict__
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_the_method_looks_as_before():
    model = zoo.tiny("llama")
    before = inspect.signature(model.save_pretrained)
    rk.patch(model)
    assert inspect.signature(model.save_pretrained) == before
    assert model.save_pretrained.__doc__ == type(model).save_pretrained.__doc__


def test_a_method_of_the_instance_comes_back(tmp_path):
    """Somebody has replaced the method before: it is called, and stands there again after `unpatch`."""
    model = zoo.tiny("llama")
    calls = []

    def own(save_directory):
        calls.append(save_directory)
        type(model).save_pretrained(model, save_directory)

    model.save_pretrained = own
    rk.patch(model)
    with pytest.warns(UserWarning, match=SAID):
        model.save_pretrained(tmp_path)
    assert calls == [tmp_path]
    rk.unpatch(model)
    assert model.save_pretrained is own


def test_a_part_of_the_model(tmp_path):
    """The base model inside of one with a head has its edits beside it, by its own names."""
    model = trained("roberta")
    with pytest.warns(UserWarning, match=SAID):
        model.roberta.save_pretrained(tmp_path)
    fresh = into(transformers.RobertaModel.from_pretrained(tmp_path), tmp_path)
    assert same(values(model), values(fresh))


class Transformer(nn.Module):
    """As in sentence-transformers: a module that holds a model, and saves it into a folder of its own."""

    def __init__(self, model):
        super().__init__()
        self.auto_model = model

    def save(self, path):
        self.auto_model.save_pretrained(path)


class Sentences(nn.Sequential):
    def save_pretrained(self, path):
        for number, module in enumerate(self):
            (path / str(number)).mkdir(parents=True)
            module.save(path / str(number))


class Plain(Sentences):
    """The same without a method of that name: only the model inside has it."""

    save_pretrained = None

    def save(self, path):
        Sentences.save_pretrained(self, path)


@pytest.mark.parametrize("kind", [Sentences, Plain])
def test_a_model_inside_of_another_library_s(kind, tmp_path):
    """It is said once, and the edits lie where the outermost `save_pretrained` has saved."""
    model = kind(Transformer(zoo.tiny("bert").bert))
    rk.patch(model)
    zoo.fill(edit_parameters(model), zoo.vectors(edit_parameters(model)))
    with pytest.warns(UserWarning, match=SAID) as said:
        (model.save_pretrained or model.save)(tmp_path)
    assert len(said) == 1
    inner = transformers.BertModel.from_pretrained(tmp_path / "0")
    fresh = into(kind(Transformer(inner)), tmp_path if kind is Sentences else tmp_path / "0")
    assert same(values(model), values(fresh))


def test_plain_trainer(tmp_path):
    """Each of its checkpoints holds the edits; it resumes from the state, which holds the vectors as before."""

    def run(**options):
        model = zoo.tiny("llama")
        rk.patch(model)
        optimizer = training(edit_parameters(model))
        trainer, _ = trainer_of(model, optimizer, tmp_path, save_strategy="steps", save_steps=2)
        with pytest.warns(UserWarning, match=SAID):
            trainer.train(**options)
        return model

    model = run()
    fresh = into(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-4"), tmp_path / f"checkpoint-{STEPS}"
    )
    assert same_vectors(model, fresh)
    assert same_vectors(model, run(resume_from_checkpoint=str(tmp_path / "checkpoint-2")))


def test_a_process_that_does_not_write_says_nothing(tmp_path):
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "one", is_main_process=False)
        model.save_pretrained(tmp_path / "two", False)
    assert not any(files(tmp_path / name) for name in ("one", "two"))


def test_several_edits(tmp_path):
    model = trained()
    rk.add_edit(model, "alice")
    rk.switch_edit(model, "alice")
    with pytest.warns(UserWarning, match="of the active edit, one of default, alice"):
        model.save_pretrained(tmp_path)
    fresh = into(transformers.LlamaForCausalLM.from_pretrained(tmp_path), tmp_path)
    assert same(values(model), values(fresh))


def test_edits_that_have_no_values(tmp_path):
    """What cannot be written is said, and the base is saved all the same."""
    model = trained()
    for parts in edit_parameters(model).values():
        for own in parts.values():
            own.ds_numel = own.numel() + 1  # as DeepSpeed's ZeRO-3 leaves a partitioned parameter
    with pytest.warns(UserWarning, match=r"were not written: .*ZeRO-3.*rk\.save_edits"):
        model.save_pretrained(tmp_path)
    assert "model.safetensors" in files(tmp_path)


def test_an_error_of_the_method_itself(tmp_path):
    """It comes through, nothing is said, and the next call says it again."""
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(TypeError):
            model.save_pretrained()
        with pytest.raises(AttributeError):
            model.save_pretrained(tmp_path, state_dict=3)
    with pytest.warns(UserWarning, match=SAID):
        model.save_pretrained(tmp_path)
