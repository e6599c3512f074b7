"""A site that is replaced, has lost its hook or is passed by says so by name; what is only elsewhere goes on."""

from __future__ import annotations

import copy
import pickle
import types
import warnings

import model_zoo as zoo
import pytest
import torch
from patch_helpers import layers_of
from torch import nn

import red_kernels as rk
from red_kernels.fusion import scopes
from red_kernels.fusion.site import take_reached
from red_kernels.patching.watch import stop_watching, watch

SITES = {
    "llama": ("model.layers.1", "mlp", "down_proj"),
    "gpt2": ("transformer.h.1", "mlp", "c_proj"),
    "bert": ("bert.encoder.layer.1", "output", "dense"),
    "t5": ("encoder.block.1", "layer.1.DenseReluDense", "wo"),
    "opt": ("model.decoder.layers.1", "", "fc2"),
}


def made(name, position="ffn", **options):
    model = zoo.tiny(name)
    rk.patch(model, rk.RedConfig(position=position, **options))
    with torch.no_grad():
        for parts in rk.edit_parameters(model).values():
            for vector in parts.values():
                vector.add_(torch.randn_like(vector))
    return model


def run(model, name):
    with torch.no_grad():
        return model(**zoo.inputs(name)).logits


def parent_of(model, name):
    layer, inner, _ = SITES[name]
    return model.get_submodule(f"{layer}.{inner}" if inner else layer)


def site_name(name):
    return ".".join(filter(None, SITES[name]))


def replace(model, name):
    parent, leaf = parent_of(model, name), SITES[name][2]
    weight = getattr(parent, leaf).weight
    shape = weight.shape if name == "gpt2" else weight.shape[::-1]
    fresh = type(getattr(parent, leaf)) if name == "gpt2" else nn.Linear
    setattr(parent, leaf, fresh(*(shape[::-1] if name == "gpt2" else shape)))


def replace_by_a_copy(model, name):
    """As a library does that swaps modules and takes over weights."""
    parent, leaf = parent_of(model, name), SITES[name][2]
    other = copy.deepcopy(getattr(parent, leaf))
    del other._modules["red_edit"]
    setattr(parent, leaf, other)


def take_the_hook(model, name):
    getattr(parent_of(model, name), SITES[name][2])._forward_hooks.clear()


def take_the_edit(model, name):
    del getattr(parent_of(model, name), SITES[name][2])._modules["red_edit"]


BREAKS = [replace, replace_by_a_copy, take_the_hook, take_the_edit]


@pytest.mark.parametrize("damage", BREAKS)
@pytest.mark.parametrize("name", SITES)
def test_a_site_that_is_no_longer_there(name, damage, tmp_path):
    model = made(name)
    run(model, name)
    damage(model, name)
    site = site_name(name).replace(".", r"\.")
    with pytest.raises(RuntimeError, match=rf"the edit at {site} was not applied"):
        run(model, name)
    for call in (lambda: rk.save_edits(model, tmp_path / "saved"), lambda: rk.merge(model, loadable=False)):
        with pytest.raises(ValueError, match=rf"are gone: {site} "):
            call()
    assert not (tmp_path / "saved").exists()
    rk.unpatch(model)  # the way out
    run(model, name)
    rk.patch(model)
    run(model, name)


@pytest.mark.parametrize("damage", BREAKS)
@pytest.mark.parametrize("position", ["attn", "ffn_attn", "more"])
def test_other_positions(position, damage):
    model = made("llama", position)
    run(model, "llama")
    if position == "attn":
        damage_of = model.model.layers[1].self_attn
        damage_of.o_proj = nn.Linear(*reversed(damage_of.o_proj.weight.shape), bias=False)
        expected = "layers.1.self_attn.o_proj"
    else:
        damage(model, "llama")
        expected = "layers.1.mlp.down_proj"
    with pytest.raises(RuntimeError, match=rf"{expected} was not applied"):
        run(model, "llama")


@pytest.mark.parametrize("damage", BREAKS)
def test_named_sites(damage):
    model = made("llama", sites="*.down_proj")
    run(model, "llama")
    damage(model, "llama")
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down_proj was not applied"):
        run(model, "llama")


def passing_by(self, x):
    """An MLP's forward of another library: it takes the weights, and calls no module of them."""
    gate = nn.functional.linear(x, self.gate_proj.weight)
    up = nn.functional.linear(x, self.up_proj.weight)
    return nn.functional.linear(self.act_fn(gate) * up, self.down_proj.weight)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_forward_that_passes_the_site_by(where, when, monkeypatch):
    model = zoo.tiny("llama")

    def change():
        mlp = model.model.layers[1].mlp
        if where == "instance":
            mlp.forward = types.MethodType(passing_by, mlp)
        else:
            monkeypatch.setattr(type(mlp), "forward", passing_by)

    if when == "before":
        change()
    rk.patch(model)
    if when == "after":
        run(model, "llama")
        change()
    at = 1 if where == "instance" else 0
    message = rf"layers\.{at}\.mlp\.down_proj was not applied: the forward of its LlamaDecoderLayer did not call"
    with pytest.raises(RuntimeError, match=message):
        run(model, "llama")


def test_what_ran_before_it_was_watched_does_not_count():
    """Edits are known by their addresses, and a new one may lie where another one ran and was freed."""
    model = zoo.tiny("llama")
    rk.patch(model)
    layers = list(model.model.layers)
    sites = [
        (site, layer, f"model.layers.{at}") for at, layer in enumerate(layers) for site in layer.__dict__[scopes.SITES]
    ]
    for layer in layers:
        layer.mlp(torch.randn(1, 2, zoo.HIDDEN))  # outside of its layer, which asks
    for module in (model, *layers):
        stop_watching(module)
    watch(model, sites)
    assert [take_reached(site.own) for site, _, _ in sites] == [False] * len(sites)
    run(model, "llama")


def test_lora_first_and_taken_off_after():
    peft = pytest.importorskip("peft")
    base = zoo.tiny("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["down_proj"]))
    rk.patch(model, rk.RedConfig(sites="*.down_proj"))
    run(model, "llama")
    merged = model.merge_and_unload()
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.down_proj was not applied: its module was replaced"):
        run(merged, "llama")
    rk.unpatch(model)
    run(merged, "llama")


def test_lora_first_and_inside_of_it():
    peft = pytest.importorskip("peft")
    base = zoo.tiny("llama")
    peft_model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["down_proj", "q_proj"]))
    rk.patch(base)
    run(peft_model, "llama")
    peft_model.merge_and_unload()
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.down_proj was not applied"):
        run(base, "llama")


def test_what_is_put_around_a_site_is_no_fault():
    peft = pytest.importorskip("peft")
    model = made("llama")
    before = run(model, "llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(wrapped, "llama"), before)
        torch.testing.assert_close(run(wrapped.unload(), "llama"), before)

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    model.model.layers[1].mlp = Around(model.model.layers[1].mlp)
    torch.testing.assert_close(run(model, "llama"), before)
    model.model.layers[0] = Around(model.model.layers[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(model, "llama"), before)


@pytest.mark.parametrize("how", ["replaced", "left out"])
def test_a_layer_that_is_not_in_the_model(how, tmp_path):
    """Whoever leaves layers out means to, as for an early exit: said once, and at each save without them."""
    model = made("llama")
    layers = model.model.layers
    if how == "replaced":
        other = zoo.tiny("llama").model.layers[2]
        layers[2] = other
    else:
        model.model.layers = layers[:2]
    with pytest.warns(
        UserWarning, match=r"layers of the edits at model\.layers\.2\.mlp\.down_proj are not in the running model"
    ):
        run(model, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, "llama")
    with pytest.warns(UserWarning, match=r"the edits at model\.layers\.2\.mlp\.down_proj are no longer in the model"):
        rk.save_edits(model, tmp_path)
    if how == "left out":
        model.model.layers = layers
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rk.save_edits(model, tmp_path)


def test_the_hooks_of_all_modules_removed():
    model = made("llama")
    for module in model.model.modules():
        module._forward_hooks.clear()
    with pytest.raises(RuntimeError, match=r"down_proj was not applied: its hook was removed; restore it"):
        run(model, "llama")


@pytest.mark.parametrize("position", ["res", "res_with_attn"])
def test_streams(position):
    model = made("llama", position)
    run(model, "llama")
    model.model.layers[1]._forward_hooks.clear()
    with pytest.raises(RuntimeError, match=r"are gone: .*layers\.1"):
        run(model, "llama")


class Routed(nn.Module):
    """Experts in a list, of which a forward calls one."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, expert=0):
        return self.experts[expert](x)


def test_sites_that_are_not_always_called():
    model = Routed()
    rk.patch(model, rk.RedConfig(sites="experts.*"))
    with pytest.warns(UserWarning, match=r"edits at experts\.1, experts\.2 were not applied"):
        model(torch.ones(1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 4), expert=1)
    model.experts[2] = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match=r"experts\.2 \(its module was replaced by a Linear\)"):
        model(torch.ones(1, 4))


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_no_false_alarm(name):
    """Copies, pickles, generation, an exception half way, threads, edits disabled, compiled parts."""
    model = made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        before = run(model, name)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run(other, name), before)
            other_layers = layers_of(other)
            assert next(other_layers[0].modules()) is not layers_of(model)[0]
        with rk.disable_edits(model):
            run(model, name)
        handle = layers_of(model)[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, name)
        handle.remove()
        assert torch.equal(run(model, name), before)
        ids = zoo.inputs(name)["input_ids"]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        rk.unpatch(model)
        rk.patch(model)
        run(model, name)


@pytest.mark.parametrize("part", ["mlp", "mlp.forward", "site", "layer"])
def test_compiled_parts_are_believed(part):
    torch.compiler.reset()
    model = made("llama")
    before = run(model, "llama")
    layer = model.model.layers[1]
    if part == "mlp":
        layer.mlp.compile(backend="eager")
    if part == "mlp.forward":
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")
    if part == "site":
        layer.mlp.down_proj = torch.compile(layer.mlp.down_proj, backend="eager")
    if part == "layer":
        layer.compile(backend="eager")
    torch.testing.assert_close(run(model, "llama"), before)
    torch.testing.assert_close(run(model, "llama"), before)
    torch.compiler.reset()
