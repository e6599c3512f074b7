"""Below some thousand elements on a CPU, no value waits in a model whose norms are one kernel each."""

from __future__ import annotations

import copy

import model_zoo as zoo
import pytest
import torch
from hooked import paired

from red_kernels.fusion import site
from red_kernels.patching.patch import patch


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_edit_is_applied_by_itself_and_the_report_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_LEAST", 1 << 12)
    plain = zoo.tiny(name)
    model = copy.deepcopy(plain)
    report, own, others = paired(model, plain)
    for _ in range(3):
        found, wanted = (
            torch.autograd.grad(one(**zoo.inputs(name))[0].sum(), vectors)
            for one, vectors in ((model, own), (plain, others))
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
        assert {(at.fused, at.reason.partition(":")[0]) for at in report.sites} == {(None, "it is applied by itself")}
    assert "below 4,096 elements" in report.sites[0].reason


def test_more_elements_wait_in_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.tiny("bert")
    inputs = zoo.inputs("bert")
    width = model.config.hidden_size
    rows = inputs["input_ids"].numel()
    monkeypatch.setattr(site, "_LEAST", 2 * rows * width)
    report = patch(model)
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    for given, fused in ((inputs, False), (twice, True), (inputs, False)):
        model(**given)
        assert {at.fused is not None for at in report.sites} == {fused}


def test_what_is_expected_of_an_example_goes_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = zoo.inputs("bert")
    model = zoo.tiny("bert")
    monkeypatch.setattr(site, "_LEAST", 2 * inputs["input_ids"].numel() * model.config.hidden_size)
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    for example, fused in ((None, True), (inputs, False), (twice, True)):
        report = patch(copy.deepcopy(model), example=example)
        assert {at.fused is not None for at in report.sites} == {fused}


def test_a_small_value_waits_where_the_norms_are_not_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "_LEAST", 1 << 12)
    model = zoo.tiny("llama")
    report = patch(model)
    model(**zoo.inputs("llama"))
    assert all(at.fused for at in report.sites)
