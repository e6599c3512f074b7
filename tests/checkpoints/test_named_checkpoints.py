"""Saving and loading one of several named edits, all parts of kind `ln`, and loading into a compiled model."""

from __future__ import annotations

from pathlib import Path

import model_zoo as zoo
import pytest
import safetensors.torch
import torch
from checkpoint_helpers import authors_state, patched, trained
from torch import Tensor, nn

import red_kernels as rk
from red_kernels.checkpoints.authors import VECTORS_NAME
from red_kernels.checkpoints.checkpoint import TENSORS_NAME


def values(model: nn.Module, name: str) -> list[Tensor]:
    return [own.detach().clone() for parts in rk.edit_parameters(model, name).values() for own in parts.values()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def with_two(kind: str = "all") -> nn.Module:
    """A trained model with another trained edit, `"second"`, which is not active."""
    model = trained(kind=kind)
    rk.add_edit(model, "second")
    with torch.no_grad():
        for parts in rk.edit_parameters(model, "second").values():
            for own in parts.values():
                own.copy_(torch.randn(own.shape))
    return model


@pytest.mark.parametrize("kind", ["all", "ln"])
def test_each_edit_has_a_folder(kind: str, tmp_path: Path) -> None:
    model = with_two(kind)
    rk.save_edits(model, tmp_path / "first", "default")
    rk.save_edits(model, tmp_path / "second", name="second")
    rk.save_edits(model, tmp_path / "active")
    assert (tmp_path / "active" / TENSORS_NAME).read_bytes() == (tmp_path / "first" / TENSORS_NAME).read_bytes()
    target = zoo.tiny("llama")
    rk.patch(target, rk.saved_config(tmp_path / "second"))
    rk.load_edits(target, tmp_path / "second")  # into the one it has, whatever it was called
    assert equal(values(target, "default"), values(model, "second"))
    report = rk.load_edits(target, tmp_path / "first", name="first")
    assert rk.edit_names(target) == ("default", "first")
    assert rk.active_edit(target) == "default"
    assert equal(values(target, "first"), values(model, "default"))
    assert equal(values(target, "default"), values(model, "second"))
    assert set(report.loaded) == set(rk.edit_parameters(model))
    rk.load_edits(target, tmp_path / "active")
    assert equal(values(target, "default"), values(model, "default"))


def test_the_active_edit_is_saved_and_loaded(tmp_path: Path) -> None:
    model = with_two()
    first = values(model, "default")
    rk.switch_edit(model, "second")
    rk.save_edits(model, tmp_path)
    target = patched()
    rk.add_edit(target, "mine")
    rk.switch_edit(target, "mine")
    before = values(target, "default")
    rk.load_edits(target, tmp_path)
    assert equal(values(target, "mine"), values(model, "second"))
    assert equal(values(target, "default"), before)
    rk.load_edits(model, tmp_path, "default")
    assert not equal(first, values(model, "default"))


def test_an_edit_that_exists_keeps_its_parameters(tmp_path: Path) -> None:
    model = with_two()
    rk.save_edits(model, tmp_path, "default")
    before = [own for parts in rk.edit_parameters(model, "second").values() for own in parts.values()]
    rk.load_edits(model, tmp_path, "second")
    after = [own for parts in rk.edit_parameters(model, "second").values() for own in parts.values()]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert equal(values(model, "second"), values(model, "default"))


def test_a_refused_file_adds_no_edit(tmp_path: Path) -> None:
    rk.save_edits(trained(layers=[0]), tmp_path)
    model = patched()
    with pytest.raises(ValueError, match="model only"):
        rk.load_edits(model, tmp_path, "new")
    assert rk.edit_names(model) == ("default",)
    report = rk.load_edits(model, tmp_path, "new", strict=False)
    assert len(report.model_only) == 4
    assert report.model_only[0] == "model.layers.1.mlp.down_proj.scale"
    assert len(values(model, "new")) == 6
    assert torch.equal(values(model, "new")[2], torch.ones(zoo.HIDDEN))


def test_names_that_cannot_be(tmp_path: Path) -> None:
    model = patched()
    rk.save_edits(trained(), tmp_path)
    before = values(model, "default")
    for name, error in (("a.b", ValueError), ("scale", ValueError), ("", ValueError), (3, TypeError)):
        with pytest.raises(error, match="name: got"):
            rk.load_edits(model, tmp_path, name)  # type: ignore[arg-type]
    assert rk.edit_names(model) == ("default",)
    assert equal(values(model, "default"), before)
    with pytest.raises(ValueError, match="name: got 'other', expected one of the model's edits: 'default'"):
        rk.save_edits(model, tmp_path / "new", "other")
    with pytest.raises(ValueError, match="name: got 'other', expected one of the model's edits: 'default'"):
        rk.export_authors(model, tmp_path / "new", "other")
    assert not (tmp_path / "new").exists()


def test_an_edit_of_a_name_in_the_authors_form(tmp_path: Path) -> None:
    model = with_two()
    rk.export_authors(model, tmp_path, name="second")
    written = torch.load(tmp_path / VECTORS_NAME, weights_only=True)
    default = authors_state(model)
    assert written.keys() == default.keys()
    assert not any(torch.equal(written[key], default[key]) for key in default)
    target = patched()
    rk.load_edits(target, tmp_path, "theirs")
    assert equal(values(target, "theirs"), values(model, "second"))


def test_kind_ln_in_a_file(tmp_path: Path) -> None:
    model = trained(kind="ln")
    rk.save_edits(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS_NAME)
    assert set(tensors) == {name for name in model.state_dict() if ".red_edit." in name}
    assert "model.layers.0.mlp.down_proj.red_edit.norm_weight" in tensors
    assert rk.saved_config(tmp_path) == rk.RedConfig(kind="ln")
    with pytest.raises(ValueError, match=r"checkpoint only: model\.layers\.0\.mlp\.down_proj\.norm_weight"):
        rk.load_edits(patched(), tmp_path)
    rk.save_edits(trained(), tmp_path / "all")
    with pytest.raises(ValueError, match=r"model only: model\.layers\.0\.mlp\.down_proj\.norm_weight"):
        rk.load_edits(patched(kind="ln"), tmp_path / "all")


def test_loading_into_a_compiled_model_compiles_nothing(tmp_path: Path) -> None:
    """Other values in the same Parameters: a hot swap."""
    source = trained()
    rk.save_edits(source, tmp_path)
    model = patched()
    compiled = torch.compile(model, backend="eager")
    batch = {"input_ids": zoo.inputs("llama")["input_ids"]}
    with torch.no_grad():
        before = compiled(**batch).logits
        torch._dynamo.utils.counters.clear()
        rk.load_edits(model, tmp_path)
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = compiled(**batch).logits
        assert not torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
        assert not torch.equal(after, before)
        # The graph computes what a graph of the source does
        torch._dynamo.reset()
        assert torch.equal(after, torch.compile(source, backend="eager")(**batch).logits)
