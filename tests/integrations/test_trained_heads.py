"""What was trained beside the edits: it is loaded, named, and merged, with the names of its labels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import authors_forms
import model_zoo as zoo
import pytest
import safetensors.torch
import tiny_folders
import torch
from checkpoint_helpers import as_earlier, change_base, every_vector, patched, same, trained, values
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

import red_kernels as rk
from red_kernels.checkpoints import checkpoint
from red_kernels.checkpoints.checkpoint import HEAD_NAME, TENSORS_NAME
from red_kernels.checkpoints.convert import convert
from red_kernels.cli import main
from red_kernels.finetune.head import train_head
from red_kernels.integrations.trainer import head_parameters, load_trained, save_trained

LABELS = ("bad", "good", "odd")
IDS = torch.tensor([[5, 9, 30, 41]])


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Base models without a head."""
    root = tmp_path_factory.mktemp("bases")
    return {"bert": tiny_folders.tiny_bert(root / "bert"), "llama": tiny_folders.tiny_llama(root / "llama")}


def classifier(base: Path, labels: tuple[str, ...] = LABELS, **options: Any) -> tuple[Any, set[str]]:
    torch.manual_seed(len(labels))
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: n for n, label in enumerate(labels)}}
    made, loading = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(labels), output_loading_info=True, **names, **options
    )
    return made.eval(), set(loading["missing_keys"])


def finetuned(base: Path, folder: Path, **options: Any) -> Any:
    """A patched classifier with edits and a head of random values, saved in `folder`."""
    model, new = classifier(base, **options)
    rk.patch(model)
    train_head(model, new)
    with torch.no_grad():
        for own in (*every_vector(model), *head_parameters(model).values()):
            own.add_(torch.randn(own.shape) * 0.3)
    save_trained(model, folder)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_fresh_model_gets_the_head_and_the_labels(kind, earlier, bases, tmp_path):
    source = finetuned(bases[kind], tmp_path)
    if earlier:
        as_earlier(tmp_path)
    fresh = AutoModelForSequenceClassification.from_pretrained(bases[kind], num_labels=3).eval()
    assert fresh.config.id2label[0] == "LABEL_0"
    rk.patch(fresh, rk.saved_config(tmp_path))  # and nothing of it is trainable
    report = rk.load_edits(fresh, tmp_path)
    assert set(report.head) == set(head_parameters(source))
    assert report.labels == LABELS
    assert "head: " in str(report)
    assert "the labels: bad, good, odd" in str(report)
    assert torch.equal(logits(fresh), logits(source))
    assert (fresh.config.id2label, fresh.config.num_labels) == (dict(enumerate(LABELS)), 3)
    assert fresh.config.label2id == {"bad": 0, "good": 1, "odd": 2}


def test_a_wrapped_model_gets_it_too(bases, tmp_path):
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

    source = finetuned(bases["bert"], tmp_path)
    fresh, _ = classifier(bases["bert"])
    wrapper = Wrapper(fresh)
    rk.patch(wrapper, rk.saved_config(tmp_path))
    report = rk.load_edits(wrapper, tmp_path)
    assert "inner.classifier.weight" in report.head
    assert torch.equal(logits(fresh), logits(source))


def test_the_vectors_alone(bases, tmp_path):
    finetuned(bases["bert"], tmp_path)
    fresh, _ = classifier(bases["bert"], ("a", "b"))
    before = fresh.classifier.weight.detach().clone()
    rk.patch(fresh)
    report = rk.load_edits(fresh, tmp_path / TENSORS_NAME)
    assert (report.head, report.labels, report.checkpoint_only) == ((), (), ())
    assert torch.equal(fresh.classifier.weight, before)
    assert fresh.config.id2label == {0: "a", 1: "b"}


def test_a_model_without_such_a_head(bases, tmp_path):
    finetuned(bases["llama"], tmp_path)
    model = tiny = __import__("transformers").AutoModelForCausalLM.from_pretrained(bases["llama"])
    rk.patch(model)
    before = values(model)
    with pytest.raises(ValueError, match=r"score\.weight.*LlamaForSequenceClassification, num_labels=3.*strict=False"):
        rk.load_edits(model, tmp_path)
    assert same(before, values(model))
    labels = dict(tiny.config.id2label)
    report = rk.load_edits(model, tmp_path, strict=False)
    assert report.checkpoint_only == ("score.weight",)
    assert (report.head, report.labels) == ((), ())
    assert tiny.config.id2label == labels
    assert not same(before, values(model))


@pytest.mark.parametrize("strict", [True, False])
def test_another_number_of_labels_changes_nothing(strict, bases, tmp_path):
    finetuned(bases["bert"], tmp_path)
    model, _ = classifier(bases["bert"], ("a", "b"))
    rk.patch(model)
    before = {name: own.detach().clone() for name, own in model.named_parameters()}
    with pytest.raises(ValueError, match=r"red_head\.safetensors: classifier\.weight has shape .3, 32.*num_labels=3"):
        rk.load_edits(model, tmp_path, strict=strict)
    assert all(torch.equal(own, before[name]) for name, own in model.named_parameters())
    assert model.config.id2label == {0: "a", 1: "b"}


def test_precision(bases, tmp_path):
    """A head in fp32 keeps its values where the modules are fp32, as train_head makes them; elsewhere it is rounded."""
    source = finetuned(bases["bert"], tmp_path, dtype=torch.bfloat16)
    fresh, new = classifier(bases["bert"], dtype=torch.bfloat16)
    rk.patch(fresh)
    train_head(fresh, new)
    rk.load_edits(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(source))
    rounded, _ = classifier(bases["bert"], dtype=torch.bfloat16)
    rk.patch(rounded)
    rk.load_edits(rounded, tmp_path)
    assert torch.equal(rounded.classifier.weight, source.classifier.weight.bfloat16())


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ('{"labels": {"0": 3}}', "labels must map numbers"),
        ('{"labels": {"1": "a"}}', "numbered from 0"),
        ('{"labels": ["a"]}', "labels must map numbers"),
        ('{"mark": 3}', "must be text"),
        ("[" * 100_000, "damaged"),
        ("3", "not a description"),
    ],
)
def test_damaged_descriptions_of_a_head(said, match, bases, tmp_path):
    finetuned(bases["bert"], tmp_path)
    head = safetensors.torch.load_file(tmp_path / HEAD_NAME)
    safetensors.torch.save_file(head, tmp_path / HEAD_NAME, {"red_kernels": said})
    model, _ = classifier(bases["bert"])
    rk.patch(model)
    before = values(model)
    with pytest.raises(ValueError, match=rf"red_head\.safetensors: .*{match}"):
        rk.load_edits(model, tmp_path)
    assert same(before, values(model))


def test_edits_that_are_not_trained_are_no_head(bases, tmp_path):
    model = finetuned(bases["bert"], tmp_path)
    rk.add_edit(model, "alice")
    rk.switch_edit(model, "alice")
    assert set(head_parameters(model)) == {"classifier.weight", "classifier.bias", *_pooler(model)}
    save_trained(model, tmp_path)
    assert set(safetensors.torch.load_file(tmp_path / HEAD_NAME)) == set(head_parameters(model))


def _pooler(model: nn.Module) -> list[str]:
    return [name for name, own in model.named_parameters() if ".pooler." in name and own.requires_grad]


# ---- the command


def merge(base: Path, folder: Path, *more: str) -> int:
    arguments = ["merge", "--model", str(base), "--edits", str(folder / "edits"), "--output", str(folder / "merged")]
    return main([*arguments, *more])


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_merged_with_its_head(kind, earlier, bases, tmp_path, capsys):
    source = finetuned(bases[kind], tmp_path / "edits")
    if earlier:
        as_earlier(tmp_path / "edits")
    assert merge(bases[kind], tmp_path) == 0
    assert "note" not in capsys.readouterr().out
    plain, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert type(plain).__name__ == type(source).__name__.removeprefix("Patched")
    torch.testing.assert_close(logits(plain.eval()), logits(source), atol=1e-6, rtol=1e-6)
    assert plain.config.id2label == dict(enumerate(LABELS))
    assert plain.config.label2id == {"bad": 0, "good": 1, "odd": 2}


def test_merged_in_the_precision_of_the_model(bases, tmp_path, capsys):
    finetuned(bases["bert"], tmp_path / "edits")
    assert merge(bases["bert"], tmp_path, "--dtype", "bf16", "--force") == 0
    assert "note: the head was rounded to bfloat16" in capsys.readouterr().out


def test_a_base_with_another_head(bases, tmp_path):
    """The base is a classifier of two labels itself; the head of three replaces that one."""
    two, _ = classifier(bases["bert"], ("a", "b"))
    two.save_pretrained(tmp_path / "two")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "two", num_labels=3, ignore_mismatched_sizes=True
    ).eval()
    rk.patch(model)
    train_head(model, [])
    save_trained(model, tmp_path / "edits")
    assert merge(tmp_path / "two", tmp_path) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-6, rtol=1e-6)


def test_a_head_that_fits_no_class(bases, tmp_path, capsys):
    finetuned(bases["bert"], tmp_path / "edits")
    assert merge(bases["llama"], tmp_path) == 2
    assert "no class with a place for the trained head (classifier" in capsys.readouterr().err
    as_earlier(tmp_path / "edits")
    safetensors.torch.save_file({"other.weight": torch.ones(3)}, tmp_path / "edits" / HEAD_NAME)
    assert merge(bases["bert"], tmp_path) == 2
    assert "other.weight (3,)" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e6])
@pytest.mark.parametrize("dtype", ["auto", "fp16"])
@pytest.mark.parametrize("more", [[], ["--force"]])
def test_a_head_that_is_not_finite_is_never_merged(more, dtype, value, bases, tmp_path, capsys):
    model = finetuned(bases["bert"], tmp_path / "edits")
    with torch.no_grad():
        next(iter(head_parameters(model).values())).view(-1)[3] = value
    save_trained(model, tmp_path / "edits")
    words = ["--model", str(bases["bert"]), "--edits", str(tmp_path / "edits"), "--output", str(tmp_path / "merged")]
    fits = value == 1e6 and dtype == "auto"
    assert main(["merge", *words, "--dtype", dtype, *more]) == (0 if fits else 2)
    name = next(iter(head_parameters(model)))
    wanted = "would overflow torch.float16" if value == 1e6 else r"is not finite \(1 "
    if not fits:
        assert re.search(rf"red_head\.safetensors: {re.escape(name)} {wanted}", capsys.readouterr().err)
    assert (tmp_path / "merged").exists() == fits


@pytest.mark.parametrize(
    "name", ["Trainer", "AutoModel", "BertConfig", "Cache", "pipeline", "utils", "__dict__", "", "GPT2Model", "\ud800"]
)
def test_the_class_of_a_head_is_no_class_of_the_base(name, bases, tmp_path, monkeypatch, capsys):
    """What the file says of the class is a hint: where it is of no use, a class is found by the head itself."""
    monkeypatch.setattr(checkpoint, "architecture", lambda model: name)
    finetuned(bases["bert"], tmp_path / "edits")
    words = ["--model", str(bases["bert"]), "--edits", str(tmp_path / "edits"), "--output", str(tmp_path / "merged")]
    assert main(["merge", *words]) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_base_that_lacks_more_than_the_head(bases, tmp_path, capsys):
    """Weights that are in neither file would be drawn at random."""
    finetuned(bases["bert"], tmp_path / "edits")
    as_earlier(tmp_path / "edits")
    head = safetensors.torch.load_file(tmp_path / "edits" / HEAD_NAME)
    safetensors.torch.save_file({"classifier.weight": head["classifier.weight"]}, tmp_path / "edits" / HEAD_NAME)
    assert merge(bases["bert"], tmp_path) == 2
    error = capsys.readouterr().err
    assert "lack the weights classifier.bias" in error
    assert "the trained head does not hold them" in error


def test_a_converted_head_of_the_authors(tmp_path):
    """Their files say neither the class nor the labels."""
    model: Any = trained("roberta")
    with torch.no_grad():
        for own in every_vector(model):
            own.mul_(0.02)
    head = authors_forms.classifier()
    rk.export_authors(model, tmp_path / "authors")
    torch.save(head, tmp_path / "authors" / "classifier.pth")
    base = zoo.tiny("roberta")
    base.save_pretrained(tmp_path / "base")
    convert(tmp_path / "authors", tmp_path / "edits", str(tmp_path / "base"))
    assert merge(tmp_path / "base", tmp_path) == 0
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    fresh: Any = zoo.tiny("roberta").eval()
    rk.patch(fresh)
    rk.load_edits(fresh, tmp_path / "authors")
    torch.testing.assert_close(logits(plain), logits(fresh), atol=1e-5, rtol=1e-5)


def test_edits_of_the_authors_form_are_to_be_converted(tmp_path, capsys):
    rk.export_authors(trained(), tmp_path / "edits")
    zoo.tiny("llama").save_pretrained(tmp_path / "base")
    assert merge(tmp_path / "base", tmp_path) == 2
    assert "red-kernels convert" in capsys.readouterr().err


# ---- the base model


@pytest.mark.parametrize(
    ("saved", "here", "warned"),
    [
        ("owner/base-7b", "/models/base-7b/", False),
        ("owner/base-7b", "C:\\models\\Base-7B", False),
        ("owner/base-7b", "/cache/models--owner--base-7b/snapshots/0123abc", False),
        ("owner/base-7b", "", False),
        ("", "owner/other", False),
        ("owner/base-7b", "owner/base-8b", True),
        ("base", "/models/base/checkpoint-4", True),
    ],
)
def test_edits_of_another_base(saved, here, warned, tmp_path, recwarn):
    source, model = trained(), patched()
    source.config._name_or_path, model.config._name_or_path = saved, here
    change_base(model)
    rk.save_edits(source, tmp_path)
    report = rk.load_edits(model, tmp_path)
    assert same(values(source), values(model))
    given = [str(warning.message) for warning in recwarn if issubclass(warning.category, UserWarning)]
    assert list(report.warnings) == given
    assert bool(given) == warned
    if warned:
        assert repr(saved) in given[0]
        assert repr(here) in given[0]
        assert f"warning: {given[0]}" in str(report)


def test_another_base_is_said_by_the_command_and_when_a_run_resumes(bases, tmp_path, capsys):
    model = finetuned(bases["bert"], tmp_path / "edits")
    model.config._name_or_path = "other-model"
    change_base(model)
    with pytest.warns(UserWarning, match=r"trained on the base model '.*bert'.*'other-model'"):
        load_trained(model, tmp_path / "edits")
    save_trained(model, tmp_path / "edits")
    assert merge(bases["bert"], tmp_path) == 0
    assert "were trained on the base model 'other-model'" in capsys.readouterr().out


def test_models_of_the_same_name_are_named_by_their_class(bases):
    assert isinstance(classifier(bases["llama"])[0], LlamaForSequenceClassification)
    assert json.loads((bases["llama"] / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
