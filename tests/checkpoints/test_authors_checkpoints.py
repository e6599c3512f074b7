"""Checkpoints in the form of RED's authors, reading and writing, and the matching of site names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import authors_forms
import model_zoo as zoo
import pytest
import torch
import transformers
from checkpoint_helpers import WIDTH, assert_refused, authors_state, every_vector, patched, same, trained, values
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import red_kernels as rk
from red_kernels.checkpoints.authors import CLASSIFIER_NAME, VECTORS_NAME, export_authors, inner_prefix
from red_kernels.checkpoints.checkpoint import load_edits
from red_kernels.checkpoints.site_names import match_sites
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch, unpatch

CASES = [(name, position) for name, positions in authors_forms.SITES.items() for position in positions]

# ---- reading


@pytest.mark.parametrize(
    ("name", "prefix"), [("llama", ""), ("gpt2", ""), ("roberta", "roberta."), ("t5", ""), ("bert", "bert.")]
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_authors_form(name: str, prefix: str, as_folder: bool, tmp_path: Path) -> None:
    source, target = trained(name), patched(name)
    state = authors_state(source, prefix)
    assert not prefix or not any(key.startswith(prefix) for key in state)
    torch.save(state, tmp_path / VECTORS_NAME)
    before = every_vector(target)
    report = load_edits(target, tmp_path if as_folder else tmp_path / VECTORS_NAME)
    assert same(values(source), values(target))
    assert all(old is new for old, new in zip(before, every_vector(target), strict=True))
    assert set(report.loaded.values()) == set(edit_parameters(target))


def _logits(model: nn.Module, name: str) -> Tensor:
    batch = zoo.inputs(name, batch=16)  # a classifier gives two values a row: of a few, errors are left to chance
    if name == "roberta":
        del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", list(authors_forms.PARTS))
@pytest.mark.parametrize(("name", "position"), CASES)
def test_outputs_are_those_of_the_formulas(name: str, position: str, kind: str, tmp_path: Path) -> None:
    """Against forward hooks that are driven by the file's names alone, and in float64."""
    model, exact = zoo.tiny(name), zoo.exact(zoo.tiny(name), {}).model
    raw = authors_forms.state(model, name, position, kind)
    head = authors_forms.classifier() if name == "roberta" else None
    authors_forms.write(tmp_path, raw, head)

    def plainly(one: nn.Module) -> Tensor:
        if head is not None:
            one.load_state_dict({f"classifier.{key}": value for key, value in head.items()}, strict=False)
        with authors_forms.composed(one, name, raw):
            return _logits(one, name)

    truth, unfused = plainly(exact), plainly(zoo.tiny(name))
    patch(model, RedConfig(position=position, kind=kind))
    report = load_edits(model, tmp_path)
    assert {key.partition(".delta_vector.")[0] for key in raw} == set(report.loaded)
    assert len(report.head) == (4 if head else 0)
    zoo.assert_as_exact("logits", _logits(model, name), unfused, truth)
    # Written again, all of it is the same.
    export_authors(model, tmp_path / "again")
    for file, wanted in ((VECTORS_NAME, raw), (CLASSIFIER_NAME, head)):
        if wanted is not None:
            written = torch.load(tmp_path / "again" / file, weights_only=True)
            assert written.keys() == wanted.keys()
            assert all(torch.equal(written[key], wanted[key]) for key in wanted)
            assert all(written[key].dtype == torch.float32 for key in wanted)
    assert (tmp_path / "again" / CLASSIFIER_NAME).exists() == (head is not None)


def test_authors_half_precision_stays_exact_in_fp32(tmp_path: Path) -> None:
    source, target = trained(), patched()
    torch.save(authors_state(source, dtype=torch.bfloat16), tmp_path / VECTORS_NAME)
    load_edits(target, tmp_path)
    assert same([value.bfloat16().float() for value in values(source)], values(target))


def test_authors_names_with_more_than_the_model_has(tmp_path: Path) -> None:
    """A file named from a model with a head, loaded into the bare inner model."""
    source = trained("gpt2")
    torch.save(authors_state(source), tmp_path / VECTORS_NAME)
    inner: Any = zoo.tiny("gpt2").transformer
    patch(inner, RedConfig())
    report = load_edits(inner, tmp_path)
    assert report.loaded["transformer.h.0.mlp.c_proj"] == "h.0.mlp.c_proj"
    assert same(values(source), values(inner))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda value: value[0], r"shape \(32,\), expected \[1, width\]"),
        (lambda value: value.expand(2, -1), r"shape \(2, 32\)"),
        (lambda value: value.int(), "torch.int32"),
        (lambda value: value.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda value: value.bool(), "torch.bool"),
        (lambda value: value.to_sparse(), "torch.sparse_coo"),
        (lambda value: 3, "int, expected a floating-point tensor"),
        (lambda value: value[:, :-1], "width"),
    ],
)
def test_authors_form_gone_wrong(change: Any, match: str, tmp_path: Path) -> None:
    state: dict[str, Any] = authors_state(trained())
    last = list(state)[-1]
    state[last] = change(state[last])
    torch.save(state, tmp_path / VECTORS_NAME)
    assert_refused(tmp_path, match)


def test_another_kind_is_refused(tmp_path: Path) -> None:
    state = authors_state(trained())
    state["model.layers.0.mlp.down_proj.delta_vector.activation_ln.weight"] = torch.ones(WIDTH)
    torch.save(state, tmp_path / VECTORS_NAME)
    assert_refused(
        tmp_path, r"checkpoint only: model\.layers\.0\.mlp\.down_proj\.norm_weight; in the model only: nothing"
    )
    state["model.layers.0.mlp.down_proj.delta_vector.activation_ln.mean"] = torch.ones(WIDTH)
    torch.save(state, tmp_path / VECTORS_NAME)
    assert_refused(tmp_path, "not a file of edits: has model.layers.0.mlp.down_proj.delta_vector.activation_ln.mean")


# ---- the classifier head


def _head_file(folder: Path, head: dict[str, Any], name: str = "roberta") -> Path:
    return authors_forms.write(folder, authors_forms.state(zoo.tiny(name), name, "ffn"), head)


def test_the_head_is_loaded_in_place(tmp_path: Path) -> None:
    head = authors_forms.classifier()
    model: Any = patched("roberta")
    before = dict(model.classifier.named_parameters())
    model.classifier.requires_grad_(True)
    report = load_edits(model, _head_file(tmp_path, head))
    assert report.head == tuple(f"classifier.{key}" for key in head)
    assert "the classifier head: classifier.dense.weight" in str(report)
    for key, parameter in model.classifier.named_parameters():
        assert parameter is before[key]
        assert parameter.requires_grad
        assert torch.equal(parameter, head[key])


def test_a_single_file_leaves_the_head_alone(tmp_path: Path) -> None:
    model: Any = patched("roberta")
    before = {key: value.clone() for key, value in model.classifier.state_dict().items()}
    report = load_edits(model, _head_file(tmp_path, authors_forms.classifier()) / VECTORS_NAME)
    assert report.head == ()
    assert all(torch.equal(value, before[key]) for key, value in model.classifier.state_dict().items())


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (authors_forms.classifier(labels=3), r"out_proj.weight has shape \(3, 32\), the model's .* \(2, 32\)"),
        ({"weight": torch.ones(2, 32), "bias": torch.ones(2)}, "holds bias, weight, the model's .* has dense.bias"),
        ({**authors_forms.classifier(), "dense.bias": torch.ones(32).int()}, "dense.bias is torch.int32"),
        ({}, "empty"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_head_that_does_not_fit_changes_nothing(head: Any, match: str, strict: bool, tmp_path: Path) -> None:
    model = patched("roberta")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        load_edits(model, _head_file(tmp_path, head), strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_head_without_a_place(tmp_path: Path) -> None:
    bare = transformers.RobertaModel(zoo.tiny("roberta").config)
    patch(bare, RedConfig())
    folder = _head_file(tmp_path, authors_forms.classifier())
    with pytest.raises(ValueError, match=r"checkpoint only: classifier\.dense\.weight.*name delta_vector\.pth itself"):
        load_edits(bare, folder)
    report = load_edits(bare, folder, strict=False)
    assert report.checkpoint_only == tuple(f"classifier.{key}" for key in authors_forms.classifier())
    assert report.head == ()
    assert len(report.loaded) == zoo.LAYERS


# ---- writing


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("roberta", "roberta"), ("bert", "bert"), ("vit", "vit"), ("gpt2", ""), ("llama", ""), ("opt", "")],
)
def test_names_are_those_of_the_inner_model(name: str, prefix: str, tmp_path: Path) -> None:
    model = trained(name)
    assert inner_prefix(model, edit_parameters(model)) == prefix
    written = torch.load(export_authors(model, tmp_path) / VECTORS_NAME, weights_only=True)
    wanted = authors_state(model, f"{prefix}." if prefix else "")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], wanted[key]) and written[key].shape == (1, WIDTH) for key in wanted)
    target = patched(name)
    load_edits(target, tmp_path)
    assert same(values(model), values(target))


def test_names_inside_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = zoo.tiny("roberta")

    model = Wrapper()
    patch(model, RedConfig())
    assert inner_prefix(model, edit_parameters(model)) == "wrapped.roberta"
    assert inner_prefix(model, ["wrapped.roberta.encoder.layer.0", "other.dense"]) == ""
    assert inner_prefix(nn.Sequential(nn.Linear(2, 2)), ["0"]) == ""
    bare = zoo.tiny("roberta").roberta
    assert inner_prefix(bare, ["encoder.layer.0.output.dense"]) == ""


def test_a_head_of_another_make_is_written_and_read_too(tmp_path: Path) -> None:
    source, target = trained("vit"), patched("vit")
    with torch.no_grad():
        source.classifier.weight.fill_(0.5)
    export_authors(source, tmp_path)
    assert set(torch.load(tmp_path / CLASSIFIER_NAME, weights_only=True)) == {"weight", "bias"}
    assert load_edits(target, tmp_path).head == ("classifier.weight", "classifier.bias")
    assert torch.equal(target.classifier.weight, source.classifier.weight)


def test_files_hold_no_more_than_the_tensors(tmp_path: Path) -> None:
    """A vector that is a view of something large is written by itself."""
    model = trained("roberta")
    large = torch.zeros(1_000_000)
    site = model.get_submodule("roberta.encoder.layer.0.output.dense.red_edit")
    site.scale.data = large[:WIDTH]
    export_authors(model, tmp_path)
    assert (tmp_path / VECTORS_NAME).stat().st_size < 100_000


def test_a_former_head_does_not_stay_beside_new_vectors(tmp_path: Path) -> None:
    export_authors(trained("roberta"), tmp_path)
    before = (tmp_path / VECTORS_NAME).read_bytes()
    with pytest.raises(ValueError, match=r"classifier\.pth of another model"):
        export_authors(trained("llama"), tmp_path)
    assert (tmp_path / VECTORS_NAME).read_bytes() == before


def test_what_else_is_trained_is_named(tmp_path: Path) -> None:
    model = trained("bert")
    model.cls.predictions.bias.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"not saved, .*: cls\.predictions\.bias"):
        export_authors(model, tmp_path)


def test_models_without_edits_or_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not patched"):
        export_authors(zoo.tiny("llama"), tmp_path / "none")
    with pytest.raises(ValueError, match="meta device and has no values"):
        export_authors(patched("llama").to("meta"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_patching_again_brings_the_same_outputs(tmp_path: Path) -> None:
    model = trained("roberta")
    with_edits = _logits(model, "roberta")
    rk.export_authors(model, tmp_path)
    unpatch(model)
    assert not torch.equal(_logits(model, "roberta"), with_edits)
    patch(model, RedConfig())
    load_edits(model, tmp_path)
    assert torch.equal(_logits(model, "roberta"), with_edits)


def test_a_sharded_model_is_gathered(tmp_path: Path) -> None:
    """FSDP2, in a group of one process: vectors and head are DTensors."""
    model, plain = trained("roberta"), patched("roberta")
    wanted = values(model)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert all(isinstance(vector, DTensor) for vector in every_vector(model))
        export_authors(model, tmp_path)
        load_edits(plain, tmp_path)
        assert same(wanted, values(plain))
        with torch.no_grad():
            for parameter in (*every_vector(model), *model.classifier.parameters()):
                parameter.zero_()
        assert len(load_edits(model, tmp_path).head) == 4
        assert same(wanted, [vector.full_tensor() for vector in every_vector(model)])
        assert torch.equal(model.classifier.dense.weight.full_tensor(), plain.classifier.dense.weight)
    finally:
        torch.distributed.destroy_process_group()


def test_a_head_that_peft_trains(tmp_path: Path) -> None:
    """PEFT keeps the original beside the copy it trains; the copy counts."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = peft.get_peft_model(trained("roberta"), config)
    assert inner_prefix(model, edit_parameters(model)) == "base_model.model.roberta"
    copy = model.base_model.model.classifier.modules_to_save["default"]
    with torch.no_grad():
        copy.dense.weight.fill_(0.25)
    with pytest.warns(UserWarning, match=r"not saved.*lora_A"):
        export_authors(model, tmp_path)
    state = torch.load(tmp_path / CLASSIFIER_NAME, weights_only=True)
    assert set(state) == set(authors_forms.classifier())
    assert torch.equal(state["dense.weight"], copy.dense.weight)
    with torch.no_grad():
        copy.dense.weight.zero_()
    load_edits(model, tmp_path)
    assert torch.equal(state["dense.weight"], copy.dense.weight)


# ---- names


def test_match_sites() -> None:
    layers = [f"encoder.layer.{n}.output.dense" for n in range(12)]
    with_head = [f"roberta.{name}" for name in layers]
    assert match_sites(layers, layers) == dict(zip(layers, layers, strict=True))
    assert match_sites(layers, with_head) == dict(zip(layers, with_head, strict=True))
    assert match_sites(with_head, layers) == dict(zip(with_head, layers, strict=True))
    nested = [f"model.language_model.{name}" for name in layers]
    flat = [f"model.{name}" for name in layers]
    assert match_sites(flat, nested) == dict(zip(flat, nested, strict=True))
    assert match_sites([], layers) == {}


def test_exact_names_win_over_a_second_tower() -> None:
    sites = ["encoder.layer.0.dense", "encoder.layer.1.dense"]
    towers = [*sites, *(f"vision.{name}" for name in sites)]
    assert match_sites(sites, towers) == {name: name for name in sites}


def test_two_towers_are_ambiguous() -> None:
    sites = ["encoder.layer.0.dense", "encoder.layer.1.dense"]
    with pytest.raises(ValueError, match="more than one way"):
        match_sites(sites, [f"{tower}.{name}" for tower in ("text", "vision") for name in sites])


def test_no_layer_and_no_stack_stands_in_for_another() -> None:
    assert match_sites(["encoder.layers.0.fc2"], ["decoder.layers.0.fc2"]) == {}
    assert match_sites(["model.layers.3.mlp.down_proj"], ["model.layers.5.mlp.down_proj"]) == {}
    assert match_sites(["h.1.mlp.c_proj"], ["transformer.h.11.mlp.c_proj"]) == {}
