"""Vectors that are no plain Parameters or on the meta device, and edits that become visible when they are whole."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from checkpoint_helpers import every_vector, patched, same, trained, values
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import red_kernels as rk
from red_kernels.checkpoints import checkpoint
from red_kernels.checkpoints.authors import VECTORS_NAME
from red_kernels.edits.module import RedEdit
from red_kernels.edits.vectors import EditVectors


class Doubled(nn.Module):
    def forward(self, vector: Tensor) -> Tensor:
        return 2.0 * vector


def parametrized(own: nn.Module, part: str) -> None:
    parametrize.register_parametrization(own, part, Doubled())


def weight_norm(own: nn.Module, part: str) -> None:
    parametrizations.weight_norm(own, part, dim=0)
    with torch.no_grad():
        own.parametrizations[part].original0.mul_(3.0)  # type: ignore[index,operator,union-attr]


def old_weight_norm(own: nn.Module, part: str) -> None:
    nn.utils.weight_norm(own, part)
    with torch.no_grad():
        getattr(own, f"{part}_g").mul_(3.0)  # as an optimizer's step: the attribute is stale now


def pruned(own: nn.Module, part: str) -> None:
    prune.l1_unstructured(own, part, 0.5)
    with torch.no_grad():
        getattr(own, f"{part}_orig").mul_(3.0)


WAYS = {"parametrized": parametrized, "weight norm": weight_norm, "old weight norm": old_weight_norm, "pruned": pruned}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("part", ["scale", "bias"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_in_force_is_saved(way: str, part: str, tmp_path: Path) -> None:
    model = trained()
    sites = list(rk.edit_parameters(model))
    plain = values(model)
    WAYS[way](model.get_submodule(sites[1]).red_edit, part)  # type: ignore[arg-type]
    batch = zoo.inputs("llama")
    rk.save_edits(model, tmp_path / "own")  # before a forward has computed it anew
    rk.export_authors(model, tmp_path / "authors")
    with torch.no_grad():
        expected = model(**batch).logits
    for folder in ("own", "authors"):
        fresh = patched()
        rk.load_edits(fresh, tmp_path / folder)
        with torch.no_grad():
            found = fresh(**batch).logits
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        assert not same(values(fresh), plain)
    assert (tmp_path / "authors" / VECTORS_NAME).exists()


@pytest.mark.parametrize("way", ["parametrized", "pruned"])
def test_what_cannot_be_loaded_into_is_named(way: str, tmp_path: Path) -> None:
    source, model = trained(), patched()
    rk.save_edits(source, tmp_path)
    site = list(rk.edit_parameters(model))[1]
    WAYS[way](model.get_submodule(site).red_edit, "scale")  # type: ignore[arg-type]
    before = {name: own.detach().clone() for name, own in model.named_parameters()}
    for strict in (True, False):
        with pytest.raises(ValueError, match=rf"model: {site}\.scale cannot be loaded into: computed from other"):
            rk.load_edits(model, tmp_path, strict=strict)
    assert all(torch.equal(own, before[name]) for name, own in model.named_parameters())


def test_a_vector_that_is_gone_or_in_parts_is_named(tmp_path: Path) -> None:
    model: Any = trained()
    own = model.model.layers[1].mlp.down_proj.red_edit
    whole = own._parameters["scale"]
    own._parameters["scale"] = nn.Parameter(whole.detach()[:3])
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.scale has shape \(3,\), expected \(32,\)"):
        rk.save_edits(model, tmp_path)
    own._parameters["scale"] = None
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.scale is missing"):
        rk.save_edits(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the meta device


def on_meta() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model patched on the meta device, and the weights of its base."""
    base = zoo.tiny("llama")
    state = base.state_dict()
    with torch.device("meta"):
        model: Any = type(base)(base.config).eval()
        rk.patch(model)
    return model, state


@pytest.mark.parametrize("name", [None, "other"])
def test_patched_on_meta_and_the_base_assigned(name: str | None, tmp_path: Path) -> None:
    source = trained()
    rk.save_edits(source, tmp_path)
    model, state = on_meta()
    with pytest.raises(ValueError, match=r"the weights of model\.layers\.0.* are on the meta device; load the base"):
        rk.load_edits(model, tmp_path, name)
    model.load_state_dict(state, strict=False, assign=True)
    rk.load_edits(model, tmp_path, name)
    if name is not None:
        rk.switch_edit(model, name)
    assert all(not own.is_meta for own in every_vector(model))
    assert all(own.requires_grad for own in every_vector(model))
    assert same(values(model), values(source))
    model.model.rotary_emb = zoo.tiny("llama").model.rotary_emb  # type: ignore[assignment] # buffers are not in a state
    with torch.no_grad():
        assert torch.equal(model(**zoo.inputs("llama")).logits, source(**zoo.inputs("llama")).logits)


def test_what_the_file_lacks_begins_as_the_identity(tmp_path: Path) -> None:
    rk.save_edits(trained(layers=[0]), tmp_path)
    model, state = on_meta()
    model.load_state_dict(state, strict=False, assign=True)
    report = rk.load_edits(model, tmp_path, strict=False)
    assert len(report.model_only) == 4
    for site, part in (name.rsplit(".", 1) for name in report.model_only):
        vector = rk.edit_parameters(model)[site][part]
        assert torch.equal(vector, torch.full_like(vector, float(part == "scale")))


def test_no_advice_destroys_the_base() -> None:
    """`to_empty` of a model clears its weights: no message may advise it for the whole."""
    for path in (Path(rk.__file__).parent).rglob("*.py"):
        for line in path.read_text().splitlines():
            if "to_empty" in line and path.name != "vectors.py":
                assert "clears all of its values" in line, f"{path}: {line}"


# ---- becoming visible


@pytest.fixture
def server(tmp_path: Path) -> nn.Module:
    rk.save_edits(trained(), tmp_path)
    return patched()


def test_a_new_edit_is_seen_when_it_is_whole(
    server: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a request would see in the middle of loading."""
    steps = []
    real = RedEdit.publish

    def publish(self: RedEdit, name: str, holder: EditVectors) -> None:
        real(self, name, holder)
        assert rk.edit_names(server) == ("default",)
        for request in (
            lambda: rk.use_edits(server, ["new"]).__enter__(),
            lambda: rk.switch_edit(server, "new"),
            lambda: rk.edit_parameters(server, "new"),
        ):
            with pytest.raises(ValueError, match="got 'new', expected one of"):
                request()
        steps.append(holder)

    monkeypatch.setattr(RedEdit, "publish", publish)
    rk.load_edits(server, tmp_path, "new")
    assert len(steps) == zoo.LAYERS
    assert rk.edit_names(server) == ("default", "new")
    assert same(
        [own for parts in rk.edit_parameters(server, "new").values() for own in parts.values()], values(trained())
    )


def test_added_and_combined_edits_as_well(server: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = trained()
    real = RedEdit.publish

    def publish(self: RedEdit, name: str, holder: EditVectors) -> None:
        assert holder.scale is not None
        assert not torch.equal(holder.scale, torch.ones(zoo.HIDDEN)), "visible before its values are there"
        real(self, name, holder)

    monkeypatch.setattr(RedEdit, "publish", publish)
    rk.add_edit(filled, "copy", copy_of="default")
    rk.combine_edits(filled, {"default": 0.5, "copy": 0.25}, "mixed")
    assert rk.edit_names(filled) == ("default", "copy", "mixed")


def test_two_loaders_of_one_name(server: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.publish_edit

    def other_first(added: Any, name: str) -> None:
        monkeypatch.setattr(checkpoint, "publish_edit", real)
        rk.add_edit(server, name)
        real(added, name)

    monkeypatch.setattr(checkpoint, "publish_edit", other_first)
    with pytest.raises(ValueError, match="the model has an edit 'new' already"):
        rk.load_edits(server, tmp_path, "new")
    assert torch.equal(next(iter(rk.edit_parameters(server, "new").values()))["scale"], torch.ones(zoo.HIDDEN))


@pytest.mark.parametrize("walk", ["named_modules", "named_parameters", "modules"])
def test_others_may_walk_through_the_model(walk: str, server: nn.Module, tmp_path: Path) -> None:
    """Edits come and go while another thread is in the middle of the model's modules."""
    rk.add_edit(server, "first")
    for number, _ in enumerate(getattr(server, walk)()):
        rk.load_edits(server, tmp_path, f"n{number}")
        if number:
            rk.delete_edit(server, f"n{number - 1}")
    assert rk.edit_names(server)[:2] == ("default", "first")
    assert len(rk.edit_names(server)) == 3


def test_two_loaders_and_a_server(server: nn.Module, tmp_path: Path) -> None:
    batch = zoo.inputs("llama")
    source = trained()
    with torch.no_grad():
        expected = source(**batch).logits
        base = server(**batch).logits
    errors: list[BaseException] = []

    def guarded(action: Any) -> threading.Thread:
        def run() -> None:
            try:
                action()
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    def load(start: str) -> None:
        for number in range(12):
            rk.load_edits(server, tmp_path, f"{start}{number}")
            if number:
                rk.delete_edit(server, f"{start}{number - 1}")

    def serve() -> None:
        for _ in range(12):
            for name in rk.edit_names(server):
                with rk.use_edits(server, [name] * len(batch["input_ids"])), torch.no_grad():
                    found = server(**batch).logits
                torch.testing.assert_close(found, base if name == "default" else expected, atol=1e-4, rtol=1e-4)

    # A deleted edit is gone for requests too, so nothing deletes while the server is in the middle of one.
    threads = [guarded(lambda: [rk.load_edits(server, tmp_path, f"a{n}") for n in range(12)]), guarded(serve)]
    threads += [guarded(lambda: [rk.load_edits(server, tmp_path, f"b{n}") for n in range(12)])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    both = [guarded(lambda: load("c")), guarded(lambda: load("d"))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not errors, errors
    assert len(rk.edit_names(server)) == 1 + 24 + 2
