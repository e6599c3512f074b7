"""Every family, patched, against the unfused composition: outputs, losses, all gradients, generation."""

from __future__ import annotations

import copy

import model_zoo as zoo
import pytest
import torch
from patch_helpers import batch_for, compare, is_edited, loss_and_backward, operations_run, watching

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.fusion.fingerprint import fingerprint
from red_kernels.patching.patch import patch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_outputs_and_gradients(name, dtype):
    compare(name, loss_and_backward, dtype)


@pytest.mark.parametrize("kind", ["scaling", "bias"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_kinds(name, kind):
    model = zoo.tiny(name)
    config = RedConfig(kind=kind)
    values = {
        site: {part: parts[part] for part in config.parts} for site, parts in zoo.vectors(zoo.sites(name)).items()
    }
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    patch(model, config)
    parameters = edit_parameters(model)
    assert all(tuple(parts) == config.parts for parts in parameters.values())
    zoo.fill(parameters, values)
    for one in (model, unfused.model, truth.model):
        loss_and_backward(one, batch_for(one, name))
    found, plain, exact = zoo.gradients(parameters), unfused.gradients(), truth.gradients()
    assert found.keys() == exact.keys()
    for key in exact:
        zoo.assert_as_exact(key, found[key], plain[key], exact[key])


@pytest.mark.parametrize("name", zoo.NAMES)
def test_report_says_what_is_run(name, monkeypatch):
    """It says before the first forward what each one does: each edit is in one operation with a norm, notes are taken.

    In the first forward a norm across layers is not known before it is called; the second one is like all that follow.
    """
    model = zoo.tiny(name)
    report = patch(model, RedConfig())
    expected = report.sites
    assert [site.site for site in expected] == zoo.sites(name)
    assert all(site.fused is not None and "Norm" in site.fused for site in expected)
    assert all(("whole block of experts" in site.reason) == (name in zoo.MIXTURES) for site in expected)
    assert name in zoo.MIXTURES or not any(site.reason for site in expected)
    calls = operations_run(monkeypatch)
    watch = watching(monkeypatch)
    for _ in range(2):
        calls.clear()
        watch.clear()
        assert model(**zoo.inputs(name)).loss.requires_grad
        assert watch.taken == watch.left
        assert report.sites == expected
    edits = [operation for operation, own in calls if is_edited(own)]
    others = [operation for operation, own in calls if not is_edited(own)]
    assert len(edits) == len(zoo.sites(name))
    assert all("norm" in operation for operation in (*edits, *others))
    # What is unedited takes one pass with its norm too: attention's residual add, with Gemma also both inner norms.
    # T5's decoder has two attentions.
    assert len(others) == {
        "gemma2": 3 * zoo.LAYERS,
        "gemma3": 3 * zoo.LAYERS,
        "t5": zoo.LAYERS + 2 * (zoo.LAYERS - 1),
        "t5_gated": zoo.LAYERS + 2 * (zoo.LAYERS - 1),
    }.get(name, 0 if name in zoo.PARALLEL else zoo.LAYERS)
    assert len(watch.across) == (len(zoo.sites(name)) if name in zoo.HANDING_ON else 0)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_layers_are_chosen_by_their_index_alone(name):
    """A T5 `layer.1` is no layer 1; in an encoder-decoder model the index counts in both stacks."""
    model = zoo.tiny(name)
    plain = copy.deepcopy(model)
    report = patch(model, RedConfig(layers=[1]))
    chosen = [site.site for site in report.sites]
    assert chosen == [
        site for site in zoo.sites(name) if next(part for part in site.split(".") if part.isdigit()) == "1"
    ]
    assert len(chosen) == (2 if name.startswith("t5") else 1)
    values = zoo.vectors(chosen)
    zoo.fill(edit_parameters(model), values)
    unfused, truth = zoo.Unfused(plain, values), zoo.exact(plain, values)
    with torch.no_grad():
        found, peer, exact = (one(**batch_for(one, name)).logits for one in (model, unfused.model, truth.model))
    zoo.assert_as_exact("logits", found, peer, exact)


@pytest.mark.parametrize("name", zoo.GENERATING)
def test_generate_with_a_cache(name, monkeypatch):
    model = zoo.tiny(name)
    values = zoo.vectors(zoo.sites(name))
    unfused = zoo.Unfused(model, values)
    patch(model, RedConfig())
    zoo.fill(edit_parameters(model), values)
    batch = {key: value for key, value in zoo.inputs(name).items() if key != "labels"}
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": True}
    watch = watching(monkeypatch)
    assert torch.equal(model.generate(**batch, **arguments), unfused.model.generate(**batch, **arguments))
    assert watch.taken == watch.left
    assert bool(watch.across) == (name in zoo.HANDING_ON)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_fresh_patch_is_the_identity(name):
    model = zoo.tiny(name)
    truth = copy.deepcopy(model).double()
    batch = zoo.inputs(name)
    with torch.no_grad():
        before = model(**batch).logits
        state = torch.get_rng_state()
        patch(model, RedConfig())
        assert torch.equal(state, torch.get_rng_state())
        zoo.assert_as_exact("logits", model(**batch).logits, before, truth(**batch_for(truth, name)).logits)


def test_fingerprint_sees_what_is_done_only():
    def first(x, y=1):
        """One text."""
        z: int = x + y
        return z

    spaced = first

    def first(x: int, y: int = 1) -> int:
        # Another remark.
        z = x + y
        return z

    assert fingerprint(first) == fingerprint(spaced)

    def first(x, y=2):
        z = x + y
        return z

    assert fingerprint(first) != fingerprint(spaced)
    assert fingerprint(eval("lambda x: x")) is None
