"""Every position and kind in every family, against the formulas of the method as plain forward hooks."""

from __future__ import annotations

import copy

import model_zoo as zoo
import position_cases as cases
import pytest
import torch
from old_releases import skip_untraced
from patch_helpers import batch_for, layers_of, loss_and_backward, philox_dropout, watching

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.edits.module import RedEdit
from red_kernels.patching.patch import patch, unpatch

CASES = [
    (name, position)
    for name in zoo.NAMES
    for position in cases.POSITIONS
    if position != "ffn" and not (position == "res_with_attn" and name in zoo.PARALLEL)
]


def peers(model, name, position, values):
    """The plain composition, and that in float64."""
    inside = cases.sites(name, position).inside
    hooked = cases.sites(name, position).hooked
    renamed = {hooked.get(site, site): parts for site, parts in values.items()}
    unfused, truth = zoo.Unfused(model, renamed, inside), zoo.exact(model, renamed, inside)
    for peer in (unfused, truth):
        peer.vectors = {site: peer.vectors[hooked.get(site, site)] for site in values}
    return unfused, truth


def held_to_the_formulas(name, position, kind="all", dtype=torch.float32, dropout=0.0, run=loss_and_backward):
    model = zoo.tiny(name, dropout=dropout).to(dtype)
    plain = copy.deepcopy(model)
    report = patch(model, RedConfig(position=position, kind=kind))
    parameters = edit_parameters(model)
    assert set(parameters) == cases.sites(name, position).names
    values = cases.values(parameters)
    zoo.fill(parameters, values)
    unfused, truth = peers(plain, name, position, values)
    found, peer, exact = (run(one, batch_for(one, name)) for one in (model, unfused.model, truth.model))
    for key in exact:
        zoo.assert_as_exact(key, found[key], peer[key], exact[key], dtype)
    compare_gradients(zoo.gradients(parameters), unfused.gradients(), truth.gradients(), dtype)
    return model, report


def compare_gradients(own, unfused, truth, dtype=torch.float32):
    """All vectors together. By themselves, in one of a hundred sites roundings would fall well for the peer by chance,
    and a gradient that is nothing but rounding (a key's bias) says nothing; a site gone wrong is far above the sum."""
    assert own.keys() == truth.keys()
    zoo.assert_as_exact(
        "gradients", *(torch.cat([found[key].flatten() for key in truth]) for found in (own, unfused, truth)), dtype
    )


@pytest.mark.parametrize(("name", "position"), CASES)
def test_outputs_and_gradients(name, position, monkeypatch):
    watch = watching(monkeypatch)
    _, report = held_to_the_formulas(name, position)
    for site in report.sites:
        ends = site.site.rpartition(".")[2]
        one_of_qkv = position == "more" and ends not in ("o_proj", "down_proj", "dense", "c_proj", "wo", "o", "mlp")
        one_of_qkv = one_of_qkv and ends not in ("out_proj", "fc2", "out_lin", "lin2", "dense_4h_to_h", "Wo")
        assert one_of_qkv == (site.fused is None), site
    assert watch.taken == watch.left
    assert bool(watch.left) == (name in zoo.HANDING_ON)


@pytest.mark.parametrize("position", ["attn", "res", "res_with_attn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "distilbert", "modernbert", "gemma2", "falcon_new"])
def test_in_bfloat16(name, position):
    if not (position == "res_with_attn" and name in zoo.PARALLEL):
        held_to_the_formulas(name, position, dtype=torch.bfloat16)


@pytest.mark.parametrize("position", ["ffn", "attn", "res", "res_with_attn"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bert", "t5", "distilbert", "gemma2", "neox", "vit", "opt_post_norm"]
)
def test_kind_ln(name, position):
    if position == "res_with_attn" and name in zoo.PARALLEL:
        return
    model, _ = held_to_the_formulas(name, position, kind="ln")
    assert all(tuple(parts) == RedConfig(kind="ln").parts for parts in edit_parameters(model).values())


@pytest.mark.parametrize("kind", ["scaling", "bias"])
@pytest.mark.parametrize("position", ["attn", "res_with_attn", "more"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_kinds(name, position, kind):
    held_to_the_formulas(name, position, kind=kind)


@pytest.mark.parametrize("name", zoo.PARALLEL)
def test_no_stream_behind_attention_where_it_runs_beside_the_ffn(name):
    model = zoo.tiny(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="attention"):
        patch(model, RedConfig(position="res_with_attn"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("position", ["res", "res_with_attn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "distilbert", "falcon_sequential"])
def test_unpatch(name, position):
    model = zoo.tiny(name)
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    patch(model, RedConfig(position=position))
    with torch.no_grad():
        model(**zoo.inputs(name))
    unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("position", ["attn", "res", "res_with_attn", "more"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "neox_sequential"])
def test_compiled(name, position):
    """The plain composition in one graph, the edit inside of the layer's forward too."""
    skip_untraced(name)

    def run(model, call):
        batch = batch_for(model, name)
        logits = call(**{key: value for key, value in batch.items() if key != "labels"}, **_decoder(name, batch)).logits
        logits.square().mean().backward()
        return {"logits": logits.detach()}

    model = zoo.tiny(name)
    plain = copy.deepcopy(model)
    patch(model, RedConfig(position=position))
    values = cases.values(edit_parameters(model))
    zoo.fill(edit_parameters(model), values)
    unfused, truth = peers(plain, name, position, values)
    found = run(model, torch.compile(model, fullgraph=True, backend="eager"))
    peer, exact = (run(one.model, one.model) for one in (unfused, truth))
    zoo.assert_as_exact("logits", found["logits"], peer["logits"], exact["logits"])
    compare_gradients(zoo.gradients(edit_parameters(model)), unfused.gradients(), truth.gradients())


def _decoder(name, batch):
    return {"decoder_input_ids": batch["input_ids"]} if name == "t5" else {}


@pytest.mark.parametrize("position", ["attn", "ffn_attn", "res_with_attn"])
@pytest.mark.parametrize("name", zoo.DROPPING)
def test_dropout(name, position, monkeypatch):
    """Dropout behind a site is applied once, behind the edit, where it is inside of attention too."""
    if position == "res_with_attn" and name in zoo.PARALLEL:
        return
    monkeypatch.setattr(torch.nn.functional, "dropout", philox_dropout)

    def run(model, batch):
        model.train()
        torch.manual_seed(11)
        return loss_and_backward(model, batch)

    held_to_the_formulas(name, position, dropout=0.3, run=run)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("position", ["attn", "res_with_attn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_checkpointed(name, position, reentrant):
    def run(model, batch):
        model.train()
        if any(isinstance(module, RedEdit) for module in model.modules()):
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        return loss_and_backward(model, batch)

    held_to_the_formulas(name, position, run=run)


@pytest.mark.parametrize("position", ["res", "res_with_attn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_somebody_watches_the_layers(name, position):
    """Hooks on layers see what the plain composition would give them: the edited output."""
    seen: dict[int, list[torch.Tensor]] = {}

    def run(model, batch):
        outputs = seen.setdefault(id(model), [])
        for layer in layers_of(model):
            layer.register_forward_hook(
                lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
            )
        return loss_and_backward(model, batch)

    held_to_the_formulas(name, position, run=run)
    found, peer, exact = seen.values()
    for at, (own, plain, truth) in enumerate(zip(found, peer, exact, strict=True)):
        zoo.assert_as_exact(f"layer {at}", own.detach(), plain.detach(), truth.detach())


def test_a_forward_that_leaves_the_inner_edit_out_is_found():
    model = zoo.tiny("llama")
    patch(model, RedConfig(position="res_with_attn"))
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    found = r"layers.1.self_attn was not applied: the forward of its LlamaDecoderLayer did not call"
    with pytest.raises(RuntimeError, match=found):
        model(**zoo.inputs("llama"))


def test_a_stream_that_nothing_is_added_to_is_an_error():
    """The stream behind an attention is edited by the addition; a layer without one would lose the edit."""
    model = zoo.tiny("llama")
    patch(model, RedConfig(position="res_with_attn"))
    layer = model.model.layers[1]
    layer.forward = lambda hidden_states, **kwargs: layer.mlp(
        layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0].exp()
    )
    with pytest.raises(RuntimeError, match=r"layers.1.self_attn cannot be applied.*was not added to the stream"):
        model(**zoo.inputs("llama"))
