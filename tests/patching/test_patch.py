"""Patching, unpatching, the report, and what is refused before anything is changed."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import pickle
import warnings

import model_zoo as zoo
import pytest
import torch
import transformers
from patch_helpers import batch_for, loss_and_backward, patched_and_peer, refused, snapshot, watching
from torch import nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.edits.module import RedEdit
from red_kernels.patching.patch import edit_config, patch, unpatch


@pytest.mark.parametrize("name", zoo.NAMES)
def test_unpatch_gives_back_the_identical_model(name):
    model = zoo.tiny(name)
    first = next(model.parameters())
    first.requires_grad_(False)
    before = snapshot(model)
    patch(model, RedConfig())
    assert snapshot(model) != before
    model(**zoo.inputs(name)).loss.backward()
    unpatch(model)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="not patched"):
        unpatch(model)
    patch(model, RedConfig(layers=[0]))
    unpatch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", zoo.NAMES)
def test_only_this_instance_is_patched(name):
    model, other = zoo.tiny(name), zoo.tiny(name)
    before = snapshot(other)
    patch(model, RedConfig())
    assert snapshot(other) == before
    assert snapshot(zoo.tiny(name))[0].keys() == before[0].keys()


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_model_stays_what_it_was(name, tmp_path):
    model = zoo.tiny(name)
    before = dict(model.named_modules())
    classes = {module_name: type(module) for module_name, module in before.items()}
    keys = list(model.state_dict())
    patch(model, RedConfig())
    for module_name, kind in classes.items():
        module = model.get_submodule(module_name)
        assert module is before[module_name]
        assert isinstance(module, kind)
        assert type(module).__name__ == kind.__name__
        assert type(module).__qualname__ == kind.__qualname__
        assert type(module).__module__ == kind.__module__
        assert inspect.signature(module.forward) == inspect.signature(kind.forward.__get__(module))
    added = {f"{site}.red_edit.{part}" for site in zoo.sites(name) for part in ("scale", "bias")}
    assert set(model.state_dict()) == set(keys) | added
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == added
    assert all(value.dtype == torch.float32 for parts in edit_parameters(model).values() for value in parts.values())

    zoo.fill(edit_parameters(model), zoo.vectors(zoo.sites(name)))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)  # by transformers alone
    base = model.state_dict()
    assert list(again.state_dict()) == keys
    assert all(torch.equal(value, base[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_copies(name, how, monkeypatch):
    model, unfused, truth = patched_and_peer(name)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert edit_config(other) == RedConfig()
    with torch.no_grad():
        for parts in edit_parameters(model).values():
            for parameter in parts.values():
                parameter.zero_()
    unpatch(model)
    watch = watching(monkeypatch)
    for one in (other, unfused.model, truth.model):
        one.logits = loss_and_backward(one, batch_for(one, name))["logits"]
    zoo.assert_as_exact("logits", other.logits, unfused.model.logits, truth.model.logits)
    found, plain, exact = zoo.gradients(edit_parameters(other)), unfused.gradients(), truth.gradients()
    for key in exact:
        zoo.assert_as_exact(key, found[key], plain[key], exact[key])
    assert watch.taken == watch.left
    assert len(watch.left) == (len(zoo.sites(name)) if name in zoo.HANDING_ON else 0)
    modules = set(other.modules())
    assert all(norm in modules for norm in watch.left)
    unpatch(other)
    assert not any(isinstance(module, RedEdit) for module in other.modules())


def test_a_layer_copied_alone():
    model, _, _ = patched_and_peer("llama")
    layer = copy.deepcopy(model.model.layers[0])
    again = pickle.loads(pickle.dumps(model.model.layers[0]))
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in model.model.layers[0].parameters())
    hidden = torch.randn(1, 4, zoo.HIDDEN)
    positions = model.model.rotary_emb(hidden, torch.arange(4)[None])
    with torch.no_grad():
        wanted = model.model.layers[0](hidden, position_embeddings=positions)
        assert torch.equal(layer(hidden, position_embeddings=positions), wanted)
        assert torch.equal(again(hidden, position_embeddings=positions), wanted)


def test_report():
    report = patch(zoo.tiny("llama"), RedConfig())
    assert report.model == "LlamaForCausalLM"
    assert report.trainable == zoo.LAYERS * 2 * zoo.HIDDEN
    assert report.total == sum(p.numel() for p in zoo.tiny("llama").parameters()) + report.trainable
    lines = str(report).splitlines()
    assert lines[2].split()[0] == "model.layers.{0-1}.mlp.down_proj"
    assert "next layer's RMSNorm" in lines[2]
    assert "final RMSNorm" in lines[3]
    assert "192 of" in lines[4]
    assert len(lines) == 5
    report = patch(zoo.tiny("llama", num_hidden_layers=6), RedConfig(layers=(0, 1, 2, 4)))
    assert str(report).splitlines()[2].split()[0] == "model.layers.{0-2,4}.mlp.down_proj"


def test_vectors_have_the_dtype_asked_for():
    model = zoo.tiny("llama")
    patch(model, RedConfig(dtype=torch.bfloat16))
    assert all(value.dtype == torch.bfloat16 for parts in edit_parameters(model).values() for value in parts.values())
    model(**zoo.inputs("llama")).loss.backward()


def test_meta_device():
    config = zoo.tiny("llama").config
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    report = patch(model, RedConfig())
    assert all(value.is_meta for parts in edit_parameters(model).values() for value in parts.values())
    assert report.trainable == zoo.LAYERS * 2 * zoo.HIDDEN
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, RedEdit):
            module.reset_parameters()
    assert all(bool((parts["scale"] == 1).all()) for parts in edit_parameters(model).values())
    unpatch(model)


# Errors: nothing is changed before any of them.


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.norm(x)


def test_named_sites():
    torch.manual_seed(0)
    model = Unknown()
    values = zoo.vectors(["blocks.0.down", "blocks.1.down"], width=8)
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    report = patch(model, RedConfig(sites="*.down"))
    for site in report.sites:
        assert (site.fused, site.remark) == (None, "named by sites=")
        assert site.reason == "its fusion is known after the first forward; named by sites="
    zoo.fill(edit_parameters(model), values)
    x = torch.randn(2, 5, 8)
    for one in (model, unfused.model, truth.model):
        one.output = one(x.to(next(one.parameters()).dtype))
        one.output.square().sum().backward()
    zoo.assert_as_exact("output", model.output, unfused.model.output, truth.model.output)
    found, plain, exact = zoo.gradients(edit_parameters(model)), unfused.gradients(), truth.gradients()
    for key in exact:
        zoo.assert_as_exact(key, found[key], plain[key], exact[key])
    # The blocks are never called themselves, so that nothing may wait in them.
    assert [(site.site, site.fused, site.reason) for site in report.sites] == [
        ("blocks.0.down", None, "it is applied by itself; named by sites="),
        ("blocks.1.down", None, "it is applied by itself; named by sites="),
    ]
    unpatch(model)
    refused(model, RedConfig(sites="*.mlp"), r"'\*.mlp' matches no module of this Unknown.*blocks.\*.up")
    refused(model, RedConfig(sites=["*.down", "blocks"]), "'blocks' is a ModuleList, whose output may not be")
    assert [site.site for site in patch(model, RedConfig(sites=["norm", "blocks.0.*"])).sites] == [
        "blocks.0.up",
        "blocks.0.down",
        "norm",
    ]


def changed_forward(kind, source_of):
    """A subclass whose forward does the same by other code, as a new release of a library might."""

    def forward(self, *args, **kwargs):
        changed = source_of(self, *args, **kwargs)
        return changed

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


@pytest.mark.parametrize("part", ["layer", "mlp", "norm"])
def test_a_forward_by_other_code(part, monkeypatch):
    """How a layer, an FFN or a norm does it is its own affair: the report and the notes are the same."""
    model = zoo.tiny("llama")
    expected = patch(copy.deepcopy(model), RedConfig()).sites
    for layer in model.model.layers:
        module = {"layer": layer, "mlp": layer.mlp, "norm": layer.input_layernorm}[part]
        module.__class__ = changed_forward(type(module), type(module).forward)
    values = zoo.vectors(zoo.sites("llama"))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    report = patch(model, RedConfig())
    assert report.sites == expected
    zoo.fill(edit_parameters(model), values)
    watch = watching(monkeypatch)
    for _ in range(2):
        watch.clear()
        results = [
            loss_and_backward(one, batch_for(one, "llama"))["logits"] for one in (model, unfused.model, truth.model)
        ]
        zoo.assert_as_exact("logits", *results)
        assert report.sites == expected
        assert len(watch.across) == zoo.LAYERS
        assert watch.taken == watch.left


def other_norm(kind):
    """A subclass that computes something else than a norm."""

    def forward(self, x):
        return kind.forward(self, x) * 1.5

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": __name__})


def test_a_norm_that_is_not_recognised(monkeypatch):
    model = zoo.tiny("llama")
    norm = model.model.layers[1].input_layernorm
    norm.__class__ = other_norm(type(norm))
    values = zoo.vectors(zoo.sites("llama"))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    exact_norm = truth.model.model.layers[1].input_layernorm
    formula = exact_norm.forward
    exact_norm.forward = lambda x: formula(x) * 1.5
    report = patch(model, RedConfig())
    assert report.sites[0].fused == "residual add"
    assert "RMSNorm" in report.sites[1].fused
    zoo.fill(edit_parameters(model), values)
    watch = watching(monkeypatch)
    for _ in range(3):
        watch.clear()
        results = [
            loss_and_backward(one, batch_for(one, "llama"))["logits"] for one in (model, unfused.model, truth.model)
        ]
        zoo.assert_as_exact("logits", *results)
        assert report.sites[0].fused == "residual add"
        assert len(watch.across) == 2
        assert norm not in watch.left
        assert watch.taken == watch.left


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 1.5


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "opt"])
def test_a_wrapped_site(name, when):
    """Wrapped before patching, the wrapper is the site; wrapped after, the edit stays with the module inside.

    Either way the site is called as without the wrapper, and so are the vectors in files.
    """
    model = zoo.tiny(name)
    sites = zoo.sites(name)
    values = zoo.vectors(sites)

    def wrap(one):
        for site in sites:
            parent, _, key = site.rpartition(".")
            setattr(one.get_submodule(parent), key, Wrapper(one.get_submodule(site)))

    if when == "before":
        wrap(model)
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    patch(model, RedConfig())
    assert list(edit_parameters(model)) == sites
    zoo.fill(edit_parameters(model), values)
    if when == "after":
        for one in (model, unfused.model, truth.model):
            wrap(one)
    results = [loss_and_backward(one, batch_for(one, name))["logits"] for one in (model, unfused.model, truth.model)]
    zoo.assert_as_exact("logits", *results)
    found = list(zoo.gradients(edit_parameters(model)).values())
    for own, plain, exact in zip(found, unfused.gradients().values(), truth.gradients().values(), strict=True):
        zoo.assert_as_exact("gradient", own, plain, exact)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_lora_on_the_site(name, when):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

    sites = zoo.sites(name)
    config = LoraConfig(r=2, target_modules=sites, init_lora_weights=False, fan_in_fan_out=name == "gpt2")

    def lora(model):
        torch.manual_seed(7)
        get_peft_model(model, config)  # in place

    model = zoo.tiny(name)
    values = zoo.vectors(sites)
    if when == "before":
        lora(model)
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    patch(model, RedConfig())
    zoo.fill(edit_parameters(model), values)
    if when == "after":
        for one in (model, unfused.model, truth.model):
            lora(one)
        truth.model.double()
    for one in (model, unfused.model, truth.model):
        for key, parameter in one.named_parameters():
            parameter.requires_grad_("lora" in key or "red_edit" in key)
        loss_and_backward(one, batch_for(one, name))
    adapters = [dict(one.named_parameters()) for one in (model, unfused.model, truth.model)]
    checked = 0
    for key in adapters[2]:
        if "lora" in key:
            own, plain, exact = (one[key].grad for one in adapters)
            zoo.assert_as_exact(key, own, plain, exact)
            checked += 1
    assert checked == 2 * len(sites)
    found = list(zoo.gradients(edit_parameters(model)).values())
    for own, plain, exact in zip(found, unfused.gradients().values(), truth.gradients().values(), strict=True):
        zoo.assert_as_exact("gradient", own, plain, exact)


def test_a_trainable_norm_gets_its_gradient():
    model, unfused, truth = patched_and_peer("llama")
    for one in (model, unfused.model, truth.model):
        for key, parameter in one.named_parameters():
            if "norm" in key:
                parameter.requires_grad_(True)
        loss_and_backward(one, batch_for(one, "llama"))
    checked = 0
    for key, parameter in truth.model.named_parameters():
        if "norm" in key:
            own, plain = model.get_parameter(key).grad, unfused.model.get_parameter(key).grad
            zoo.assert_as_exact(key, own, plain, parameter.grad)
            checked += 1
    assert checked == 2 * zoo.LAYERS + 1
