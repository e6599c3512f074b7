"""What users do to a model before or after it is patched: layers of their own, wrappers, two patches, an interrupt."""

from __future__ import annotations

import gc
import importlib.util
import pickle
import weakref

import model_zoo as zoo
import pytest
import torch
import transformers
from patch_helpers import (
    batch_for,
    in_inference_mode,
    layers_of,
    loss_and_backward,
    patched_and_peer,
    watching,
    without_gradients,
)
from torch import nn

from red_kernels.checkpoints.checkpoint import save_edits
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.fusion.scopes import running
from red_kernels.patching.patch import edit_config, patch, unpatch


@pytest.fixture
def watch(monkeypatch):
    return watching(monkeypatch)


class Wrapped(nn.Module):
    """A wrapper around a layer, which may change what comes out in place, or keep it."""

    def __init__(self, layer: nn.Module, shift: float = 0.0) -> None:
        super().__init__()
        self.layer, self.shift = layer, shift

    def forward(self, *args, **kwargs):
        z = self.layer(*args, **kwargs)
        if self.shift:
            z += self.shift
        self.seen = z
        return z


def held_models(model, sites, **options):
    """A model that is patched here, the unfused composition and that in float64, with the same vectors."""
    values = zoo.vectors(sites)
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    patch(model, RedConfig(**options))
    assert list(edit_parameters(model)) == sites
    zoo.fill(edit_parameters(model), values)
    return model, unfused, truth


def hold_all(models, name="llama"):
    """Outputs in each mode, in the first call and behind it, and the gradients of all vectors, of two calls."""
    model, unfused, truth = models
    plain = (model, unfused.model, truth.model)
    for run in (loss_and_backward, in_inference_mode, without_gradients, in_inference_mode, without_gradients):
        hold_logits(plain, run, name)
    hold_logits(plain, loss_and_backward, name)
    own, peer, wanted = zoo.gradients(edit_parameters(model)), unfused.gradients(), truth.gradients()
    assert own.keys() == wanted.keys()
    for key in wanted:
        zoo.assert_as_exact(key, own[key], peer[key], wanted[key])


def test_the_same_layer_twice():
    """It is edited once, by the name of its first place, and so wherever it runs."""
    model = zoo.tiny("llama")
    model.model.layers[1] = model.model.layers[0]
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"layers: \[1\] are not in this LlamaForCausalLM"):
        patch(model, RedConfig(layers=[1]))
    assert not any("red_edit" in name for name, _ in model.named_modules())
    sites = [zoo.sites("llama")[0], *zoo.sites("llama")[2:]]
    models = held_models(model, sites)
    hold_all(models)
    unpatch(model)
    assert [type(module) for module in model.modules()] == before


def test_sites_of_another_type():
    with pytest.raises(TypeError, match="sites: got 5, expected a glob"):
        RedConfig(sites=5)


def test_patching_inside_inference_mode():
    model = zoo.tiny("llama")
    with torch.inference_mode():
        patch(model, RedConfig())
    vectors = [vector for parts in edit_parameters(model).values() for vector in parts.values()]
    assert not any(vector.is_inference() for vector in vectors)
    model(**zoo.inputs("llama")).loss.backward()
    assert all(vector.grad is not None for vector in vectors)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_a_wrapped_layer_beside_known_ones(shift, watch):
    """It is edited like any other one."""
    model = zoo.tiny("llama", num_hidden_layers=4)
    for index in (1, 3):
        model.model.layers[index] = Wrapped(model.model.layers[index], shift)
    sites = [f"model.layers.{name}.mlp.down_proj" for name in ("0", "1.layer", "2", "3.layer")]
    models = held_models(model, sites)
    hold_all(models)
    assert watch.left
    assert watch.taken == watch.left
    unpatch(model)
    patch(model, RedConfig(layers=[0, 1]))
    assert list(edit_parameters(model)) == sites[:2]


def test_a_layer_taken_out_of_the_list():
    """What has no linear layers has nothing to edit."""
    model = zoo.tiny("llama")
    model.model.layers[1] = nn.Identity()
    assert len(patch(model, RedConfig()).sites) == zoo.LAYERS - 1


def test_two_patches_in_one_model(tmp_path):
    model = zoo.tiny("t5")
    before = [type(module) for module in model.modules()]
    patch(model.encoder, RedConfig(kind="scaling"))
    patch(model.decoder, RedConfig(kind="bias"))
    assert len(edit_parameters(model)) == len(zoo.sites("t5"))
    for function in (edit_config, lambda model: save_edits(model, tmp_path / "edits")):
        with pytest.raises(ValueError, match=r"different configs: encoder, decoder; pass each part by itself"):
            function(model)
    assert not list(tmp_path.iterdir())
    assert edit_config(model.decoder).kind == "bias"
    unpatch(model)
    assert [type(module) for module in model.modules()] == before
    assert not any("red_edit" in name for name, _ in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    patch(model.encoder, RedConfig())
    patch(model.decoder, RedConfig())
    assert edit_config(model) == RedConfig()
    unpatch(model.encoder)
    assert list(edit_parameters(model)) == zoo.sites("t5")[zoo.LAYERS :]


def test_an_inner_model_patched_through_another_head():
    """The patch is remembered by the model that was patched; what holds a part of that says so."""
    first = zoo.tiny("llama")
    second = transformers.LlamaForSequenceClassification(first.config)
    second.model = first.model
    patch(first, RedConfig())
    with pytest.raises(ValueError, match=r"already patched \(at model.layers.0.*through another model.*unpatch that"):
        patch(second, RedConfig())
    for model in (second, first.model):
        for function in (edit_config, unpatch):
            with pytest.raises(ValueError, match=r"patched through another model.*that model"):
                function(model)
    unpatch(first)
    patch(second, RedConfig())
    unpatch(second)


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt(name, error, watch):
    """Nothing goes on as if the stack were still running, and nothing keeps the model."""

    def interrupt(*_):
        raise error

    model = zoo.tiny(name)
    patch(model, RedConfig())
    handle = layers_of(model)[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        model(**zoo.inputs(name))
    handle.remove()
    assert not running()
    watch.clear()
    hidden = torch.randn(1, 4, zoo.HIDDEN)
    arguments = {} if name == "t5" else {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(4)[None])}
    layer = layers_of(model)[0]
    layer(hidden, **arguments)
    inside = list(layer.modules())
    assert all(any(norm is one for one in inside) for norm in watch.left), "nothing is left for the next layer"
    gone = weakref.ref(model)
    del model, handle, arguments, layer, inside
    watch.clear()
    gc.collect()
    assert gone() is None


def test_a_stack_that_somebody_goes_on_from(watch):
    """A subclass made after patching, whose forward is its own."""
    models = patched_and_peer("llama")

    for one in (models[0], models[1].model, models[2].model):
        stack = one.model

        class Other(type(stack)):
            def forward(self, input_ids=None, **kwargs):
                hidden = self.embed_tokens(input_ids)
                positions = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
                for layer in self.layers:
                    hidden = layer(hidden, position_embeddings=positions)
                return transformers.modeling_outputs.BaseModelOutputWithPast(self.norm(hidden))

        stack.__class__ = Other
    hold_all(models)
    assert watch.left
    assert watch.taken == watch.left


def hold_logits(models, run=in_inference_mode, name="llama"):
    """The patched model, the unfused composition and that in float64, all prepared alike."""
    results = [run(one, batch_for(one, name))["logits"] for one in models]
    zoo.assert_as_exact("logits", *results)


def hold_seen(models, layer_of):
    """The gradient of an output that a module has kept."""
    found = []
    for one in models:
        loss = one(**batch_for(one, "llama")).loss
        found.append(torch.autograd.grad(loss, layer_of(one).seen)[0])
    zoo.assert_as_exact("gradient", *found)


def test_a_layer_wrapped_since(watch):
    patched, unfused, truth = patched_and_peer("llama")
    models = (patched, unfused.model, truth.model)
    for one in models:
        one.model.layers[0] = Wrapped(one.model.layers[0], 1.5)
    hold_logits(models)
    hold_logits(models, without_gradients)
    for one in models:
        one.model.layers[0].shift = 0.0
    hold_seen(models, lambda one: one.model.layers[0])
    assert watch.left
    assert watch.taken == watch.left


def test_a_layer_pickled_alone_leaves_the_stack_behind(watch):
    model = zoo.tiny("llama")
    layer = model.model.layers[0]
    before = len(pickle.dumps(layer))
    patch(model, RedConfig())
    data = pickle.dumps(layer)
    assert len(data) - before < 0.1 * before
    model.model.layers[0] = pickle.loads(data)
    model(**zoo.inputs("llama")).loss.backward()
    assert len(watch.left) == zoo.LAYERS
    assert watch.taken == watch.left


def shifted(kind, keep=False):
    """A subclass of a layer that changes what it gets in place, as steering does, or keeps it."""

    def forward(self, hidden_states, *args, **kwargs):
        if keep:
            self.seen = hidden_states
        else:
            hidden_states += 1.5
        return kind.forward(self, hidden_states, *args, **kwargs)

    return type("Users" + kind.__name__, (kind,), {"forward": forward})


def next_in(model, name, part):
    layer = layers_of(model)[1]
    return layer.layer[0] if name == "t5" and part == "sublayer" else layer


@pytest.mark.parametrize(("name", "part"), [("llama", "layer"), ("gpt2", "layer"), ("t5", "layer"), ("t5", "sublayer")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_next_layer_is_of_a_users_class(name, part, when, watch):
    """It may change what it gets in place, of which a note on a tensor made in inference mode does not know."""
    model = zoo.tiny(name)
    values = zoo.vectors(zoo.sites(name))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    models = (model, unfused.model, truth.model)

    def change():
        for one in models:
            module = next_in(one, name, part)
            module.__class__ = shifted(type(module))

    if when == "before":
        change()
    report = patch(model, RedConfig())
    if when == "before":
        assert "residual add" in report.sites[0].fused
        assert "Norm" not in report.sites[0].fused, "the sum is changed before its norm reads it"
    else:
        assert "Norm" in report.sites[0].fused
        change()
    zoo.fill(edit_parameters(model), values)
    hold_logits(models, name=name)
    hold_logits(models, without_gradients, name)
    assert watch.left
    assert watch.taken == watch.left


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_next_layer_keeps_what_it_gets(when):
    model = zoo.tiny("llama")
    values = zoo.vectors(zoo.sites("llama"))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    models = (model, unfused.model, truth.model)
    if when == "after":
        patch(model, RedConfig())
    for one in models:
        layer = one.model.layers[1]
        layer.__class__ = shifted(type(layer), keep=True)
    if when == "before":
        patch(model, RedConfig())
    zoo.fill(edit_parameters(model), values)
    hold_seen(models, lambda one: one.model.layers[1])


@pytest.mark.parametrize("where", ["layer", "block"])
def test_a_users_class_around_the_layer_itself(where, watch):
    """Made after patching, of the layer or of T5's block around it: it has the output before the norm does."""
    name = "llama" if where == "layer" else "t5"
    patched, unfused, truth = patched_and_peer(name)
    models = (patched, unfused.model, truth.model)
    for one in models:
        layer = layers_of(one)[0]
        kind = type(layer)

        def forward(self, *args, _kind=kind, **kwargs):
            output = _kind.forward(self, *args, **kwargs)
            z = output[0] if isinstance(output, tuple) else output
            z += 1.5
            return output

        layer.__class__ = type("Users", (kind,), {"forward": forward})
    hold_logits(models, name=name)
    assert watch.left
    assert watch.taken == watch.left


def test_a_users_t5_block_is_fused_as_any():
    model = zoo.tiny("t5")
    model.encoder.block[0].__class__ = shifted(type(model.encoder.block[0]))
    report = patch(model, RedConfig())
    assert report.sites == patch(zoo.tiny("t5"), RedConfig()).sites
    assert "Norm" in report.sites[0].fused


REPLACED = {
    "layer": lambda model: layers_of(model)[0],
    "norm": lambda model: model.model.norm,
    "sublayer": lambda model: layers_of(model)[0].layer[0],
    "ffn": lambda model: layers_of(model)[0].layer[-1],
    "stack": lambda model: getattr(model, "model", None) or model.encoder,
}


@pytest.mark.parametrize(
    ("name", "part"),
    [("llama", "layer"), ("llama", "norm"), ("llama", "stack"), ("t5", "layer"), ("t5", "sublayer"), ("t5", "ffn")],
)
def test_a_forward_replaced_in_the_class(name, part, monkeypatch, watch):
    """After patching, as patches for the whole process do it; of transformers' class, of which ours is a subclass."""
    patched, unfused, truth = patched_and_peer(name)
    models = (patched, unfused.model, truth.model)
    kind = type(REPLACED[part](unfused.model))
    original = kind.forward

    def forward(self, *args, **kwargs):
        if part in ("norm", "stack"):
            output = original(self, *args, **kwargs)
            return output * 1.5 if part == "norm" else output
        hidden, *rest = args
        hidden += 1.5
        return original(self, hidden, *rest, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    if part == "norm":  # the truth computes its norms by itself
        found, plain = (without_gradients(one, batch_for(one, name))["logits"] for one in models[:2])
        torch.testing.assert_close(found, plain)
    else:
        hold_logits(models, name=name)
        hold_logits(models, without_gradients, name)
    assert watch.taken == watch.left
    monkeypatch.undo()
    hold_logits(models, without_gradients, name)


def test_a_stack_whose_forward_is_replaced_in_the_class(monkeypatch, watch):
    models = patched_and_peer("llama")
    kind = type(models[0].model).__mro__[1]
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
    hold_all(models)
    assert watch.left
    assert watch.taken == watch.left


def vectors_of(model):
    return [vector for parts in edit_parameters(model).values() for vector in parts.values()]


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_the_order_of_lora_and_the_patch():
    """Whoever comes second freezes what is there. LoRA's merge is exact where the patch came second."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["down_proj"], init_lora_weights=False)
    model = zoo.tiny("llama")
    patch(model, RedConfig())
    model = get_peft_model(model, config)
    assert not any(vector.requires_grad for vector in vectors_of(model))
    for vector in vectors_of(model):
        vector.requires_grad_(True)
    model(**zoo.inputs("llama")).loss.backward()
    assert all(vector.grad is not None for vector in vectors_of(model))

    model = get_peft_model(zoo.tiny("llama"), config).eval()
    values = zoo.vectors([f"base_model.model.{site}" for site in zoo.sites("llama")])
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    patch(model, RedConfig())
    zoo.fill(edit_parameters(model), values)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"{site}.red_edit.{part}" for site in values for part in ("scale", "bias")
    }
    model.merge_adapter()
    hold_logits((model, unfused.model, truth.model), without_gradients)
