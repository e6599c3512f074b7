"""Every position where users hook, wrap or offload what is patched: held to the formulas as well."""

from __future__ import annotations

import copy

import model_zoo as zoo
import position_cases as cases
import pytest
import torch
from patch_helpers import layers_of, loss_and_backward, philox_dropout
from test_positions import held_to_the_formulas, peers
from torch import nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch


def logits(model, name):
    with torch.no_grad():
        return model(**zoo.inputs(name)).logits


def changed(output):
    return (changed(output[0]), *output[1:]) if isinstance(output, tuple) else output.clone()


def wrapped(layer):
    former = layer.forward
    layer.forward = lambda *args, **kwargs: changed(former(*args, **kwargs))


def subclassed(layer):
    class Layer(type(layer)):
        def forward(self, *args, **kwargs):
            return changed(super().forward(*args, **kwargs))

    layer.__class__ = Layer


@pytest.mark.parametrize("wrap", [wrapped, subclassed])
@pytest.mark.parametrize("name", ["llama", "gpt2", "distilbert", "falcon", "opt_post_norm"])
def test_an_output_that_is_replaced_on_its_way_is_edited_once(name, wrap):
    model = zoo.tiny(name)
    plain = copy.deepcopy(model)
    patch(model, RedConfig(position="res"))
    values = cases.values(edit_parameters(model))
    zoo.fill(edit_parameters(model), values)
    for layer in layers_of(model):
        wrap(layer)
    unfused, truth = peers(plain, name, "res", values)
    zoo.assert_as_exact("logits", *(one(**zoo.inputs(name)).logits for one in (model, unfused.model, truth.model)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("position", "kind"), [("res", "all"), ("res_with_attn", "all"), ("res_with_attn", "ln")])
@pytest.mark.parametrize("name", ["llama", "bert", "gemma2", "opt_post_norm"])
def test_offloaded(name, position, kind, when):
    """The vectors of an edit that no hook applies are brought to the device as well."""
    accelerate = pytest.importorskip("accelerate")
    model = zoo.tiny(name)
    plain = copy.deepcopy(model)
    if when == "before":
        accelerate.cpu_offload(model, execution_device="cpu")
    patch(model, RedConfig(position=position, kind=kind))
    values = cases.values(edit_parameters(model))
    zoo.fill(edit_parameters(model), values)
    if when == "after":
        accelerate.cpu_offload(model, execution_device="cpu")
    unfused, truth = peers(plain, name, position, values)
    zoo.assert_as_exact("logits", *(logits(one, name) for one in (model, unfused.model, truth.model)))


@pytest.mark.parametrize(("name", "position"), [("gpt2", "ffn_attn"), ("distilbert", "ffn")])
def test_a_dropout_that_was_replaced_after_patching(name, position, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "dropout", philox_dropout)

    def run(model, batch):
        for layer in layers_of(model):
            owners = [layer.attn, layer.mlp] if name == "gpt2" else [layer.ffn]
            for owner, key in zip(owners, ["resid_dropout", "dropout"] if name == "gpt2" else ["dropout"], strict=True):
                setattr(owner, key, nn.Dropout(0.5))
        model.train()
        torch.manual_seed(11)
        output = model(**batch)
        output.loss.backward()
        return {"logits": output.logits.detach()}

    held_to_the_formulas(name, position, run=run)


@pytest.mark.parametrize("position", ["res", "res_with_attn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "distilbert", "opt_post_norm", "t5"])
def test_hooks_that_were_there_before_patching_see_the_edited_output(name, position):
    """transformers' own, which collect hidden states, stay on the layers once they were needed."""
    model = zoo.tiny(name)
    plain = copy.deepcopy(model)
    collected(model, name)
    patch(model, RedConfig(position=position))
    values = cases.values(edit_parameters(model))
    zoo.fill(edit_parameters(model), values)
    unfused, truth = peers(plain, name, position, values)
    for at, states in enumerate(
        zip(*(collected(one, name) for one in (model, unfused.model, truth.model)), strict=True)
    ):
        zoo.assert_as_exact(f"hidden states {at}", *states)


def collected(model, name):
    with torch.no_grad():
        output = model(**zoo.inputs(name), output_hidden_states=True)
    return output.encoder_hidden_states + output.decoder_hidden_states if name == "t5" else output.hidden_states


def test_a_hook_inside_of_a_layer_that_runs_another_model():
    """The edit of the layer around it is still left out at its site, and applied once."""

    def run(model, batch):
        other = zoo.tiny("gpt2")
        patch(other, RedConfig(position="ffn_attn"))

        def run_other(module, args):
            logits(other, "gpt2")

        for layer in layers_of(model):
            layer.mlp.gate_proj.register_forward_pre_hook(run_other)
        output = model(**batch)
        output.loss.backward()
        return {"logits": output.logits.detach()}

    held_to_the_formulas("llama", "ffn", run=run)


@pytest.mark.parametrize("name", ["vit", "neox_sequential", "phi3", "gpt2", "modernbert"])
def test_hooks_on_dropouts_beside_an_edit_that_no_hook_applies(name):
    def run(model, batch):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda module, args, output: output * 1.01)
        return loss_and_backward(model, batch)

    held_to_the_formulas(name, "res_with_attn", run=run)


@pytest.mark.parametrize("name", ["vit", "phi3"])
def test_dropouts_of_another_class_beside_an_edit_that_no_hook_applies(name):
    class Halves(nn.Module):
        def forward(self, x):
            return 0.5 * x

    def run(model, batch):
        for layer in layers_of(model):
            for key, module in list(layer.named_children()):
                if isinstance(module, nn.Dropout):
                    setattr(layer, key, Halves())
        return loss_and_backward(model, batch)

    held_to_the_formulas(name, "res_with_attn", run=run)
