"""A patched model under torch.compile: the plain composition is left to the compiler, without graph breaks."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from old_releases import skip_untraced
from patch_helpers import batch_for, layers_of, patched_and_peer, watching

from red_kernels.edits.find import edit_parameters

LAYOUTS = ["llama", "phi3", "gemma2", "gpt2", "opt", "opt_post_norm", "bert", "t5", "vit"]  # one model of each


def run(model, batch):
    """As in the other tests, but for transformers' own loss, which is not compiled without a break for all models."""
    labels = batch.pop("labels")
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = labels
    logits = model(**batch).logits
    logits.square().mean().backward()
    return {"logits": logits.detach()}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def hold(name, found, model, unfused, truth):
    plain = run(unfused.model, batch_for(unfused.model, name))
    exact = run(truth.model, batch_for(truth.model, name))
    zoo.assert_as_exact("logits", found["logits"], plain["logits"], exact["logits"])
    own, peer, wanted = zoo.gradients(edit_parameters(model)), unfused.gradients(), truth.gradients()
    assert own.keys() == wanted.keys()
    for key in wanted:
        zoo.assert_as_exact(key, own[key], peer[key], wanted[key])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_whole_model(name, monkeypatch):
    skip_untraced(name)
    model, unfused, truth = patched_and_peer(name)
    watch = watching(monkeypatch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    hold(name, run(compiled, zoo.inputs(name)), model, unfused, truth)
    assert not watch.left
    # The same model run eagerly goes on handing over.
    with torch.no_grad():
        model(**zoo.inputs(name))
    assert bool(watch.left) == (name in zoo.HANDING_ON)
    assert watch.taken == watch.left


@pytest.mark.sampled(1)
@pytest.mark.parametrize("which", [(0, 1, 2), (1,), (0,)])
@pytest.mark.parametrize("how", ["in place", "replaced"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layer_by_layer(name, how, which, monkeypatch):
    model, unfused, truth = patched_and_peer(name)
    layers = layers_of(model)
    kept = {index: layers[index] for index in which}
    for index, layer in kept.items():
        if how == "in place":
            layer.compile(backend="aot_eager")
        else:
            layers[index] = torch.compile(layer, backend="aot_eager")
    watch = watching(monkeypatch)
    found = run(model, zoo.inputs(name))
    for index, layer in kept.items():
        layers[index] = layer
    hold(name, found, model, unfused, truth)
    assert watch.taken == watch.left


@pytest.mark.parametrize("part", ["mlp", "down_proj", "input_layernorm", "post_attention_layernorm"])
def test_a_compiled_part(part):
    """What is compiled carries its own edit: the layer must not apply it again."""
    model, unfused, truth = patched_and_peer("llama")
    for layer in layers_of(model):
        module = layer.mlp.down_proj if part == "down_proj" else getattr(layer, part)
        module.compile(backend="aot_eager")
    hold("llama", run(model, zoo.inputs("llama")), model, unfused, truth)


def test_with_checkpointing():
    model, unfused, truth = patched_and_peer("llama")
    for one in (model, unfused.model, truth.model):
        one.train()
        one.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    hold("llama", run(compiled, zoo.inputs("llama")), model, unfused, truth)


def test_inductor():
    """The compiler that people use, once and on one layer, as it takes its time."""
    name = "llama"
    model, unfused, truth = patched_and_peer(name)
    layers_of(model)[1].compile(fullgraph=True)
    hold(name, run(model, zoo.inputs(name)), model, unfused, truth)
