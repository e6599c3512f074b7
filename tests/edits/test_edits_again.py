"""A forward that runs again in the backward pass has the edit of its first run, whatever is active by then."""

from __future__ import annotations

import copy
from functools import partial

import model_zoo as zoo
import position_cases as cases
import pytest
import torch
from row_cases import NAMES, all_gradients, inputs, several, weighted
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import red_kernels as rk

ONE, TWO = "a", "b"


def library(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def own_layers(model, reentrant):
    """A person's own checkpoint around each layer."""
    for layer in layers(model):
        forward = layer.forward
        layer.forward = lambda x, _run=forward, **kwargs: checkpoint(
            partial(_run, **kwargs), x, use_reentrant=reentrant
        )


def own_ffn(model, reentrant):
    for layer in layers(model):
        forward = layer.mlp.forward
        layer.mlp.forward = lambda x, _run=forward: checkpoint(_run, x, use_reentrant=reentrant)


def nested(model, reentrant):
    own_ffn(model, reentrant)
    library(model, reentrant)


def nested_otherwise(model, reentrant):
    own_ffn(model, not reentrant)
    library(model, reentrant)


def offloaded(model, reentrant):
    """Hooks of another make inside of the checkpoint."""
    for layer in layers(model):
        forward = layer.mlp.forward

        def run(x, _run=forward):
            with torch.autograd.graph.save_on_cpu():
                return _run(x)

        layer.mlp.forward = run
    library(model, reentrant)


class Foreign(torch.autograd.Function):
    """Reentrant checkpointing as other libraries write it themselves."""

    @staticmethod
    def forward(context, run, x):
        context.run = run
        context.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = context.run(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


def foreign(model, reentrant):
    for layer in layers(model):
        forward = layer.forward
        layer.forward = lambda x, _run=forward, **kwargs: Foreign.apply(partial(_run, **kwargs), x)


WAYS = [library, own_layers, own_ffn, nested, nested_otherwise, offloaded, foreign]


def layers(model):
    return model.model.layers if hasattr(model.model, "layers") else model.model.decoder.layers


def twin_of(model, inputs_require_grad):
    """A copy of a model; where it is asked for, the layers' inputs have gradients in both, for reentrant ways."""
    twin = copy.deepcopy(model)
    if inputs_require_grad:
        for one in (model, twin):
            one.enable_input_require_grads()
    return twin


def trainable(model):
    return [
        name
        for name in NAMES
        if all(v.requires_grad for parts in rk.edit_parameters(model, name).values() for v in parts.values())
    ]


def prepared(name="llama", way=library, reentrant=False, **options):
    _, model, _ = several(name, **options)
    model.train()
    model.config.use_cache = False  # a second run would put its keys into the cache once more
    twin = twin_of(model, reentrant or way in (foreign, nested_otherwise))
    way(model, reentrant)
    return model, twin


def active(model, edit, batch):
    rk.switch_edit(model, edit)
    return weighted(model(**batch).logits)


def block(model, edit, batch):
    with rk.use_edits(model, [edit] * 2):
        return weighted(model(**batch).logits)


def rows(model, edit, batch):
    with rk.use_edits(model, [edit, "default"]):
        return weighted(model(**batch).logits)


def disabled(model, edit, batch):
    if edit == TWO:
        with rk.disable_edits(model):
            return weighted(model(**batch).logits)
    return active(model, edit, batch)


def assert_like_one_by_one(model, twin, how, match=True):
    """Both forwards, then both backwards; and each by itself in a model without checkpointing."""
    first, second = inputs("llama", 2), inputs("llama", 2, seed=7)
    one = how(model, ONE, first)
    two = how(model, TWO, second)
    (one + two).backward()
    found = all_gradients(model)
    how(twin, ONE, first).backward()
    loss = how(twin, TWO, second)
    if loss.requires_grad:
        loss.backward()
    wanted = all_gradients(twin)
    assert found.keys() == wanted.keys()
    assert any(wanted[key].any() for key in wanted if key.startswith(ONE))
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("how", [active, block, rows, disabled])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_two_forwards_with_different_edits(way, reentrant, how):
    model, twin = prepared(way=way, reentrant=reentrant)
    assert_like_one_by_one(model, twin, how)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "t5", "gemma2"])
def test_families(name, reentrant):
    _, model, _ = several(name)
    model.train()
    twin = twin_of(model, reentrant)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses = [(model, [])]
    for edit in (ONE, TWO):
        losses[0][1].append(active(model, edit, inputs(name, 2)))
        active(twin, edit, inputs(name, 2)).backward()
    sum(losses[0][1]).backward()
    found, wanted = all_gradients(model), all_gradients(twin)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])
    assert any(wanted[key].any() for key in wanted if key.startswith(ONE))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["scaling", "ln"])
@pytest.mark.parametrize("position", ["res_with_attn", "more"])
def test_positions_and_kinds(position, kind, reentrant):
    model, twin = prepared(reentrant=reentrant, position=position, kind=kind)
    assert_like_one_by_one(model, twin, rows)


@pytest.mark.parametrize("reentrant", [False, True])
def test_sites_that_are_not_fused(reentrant):
    plain = zoo.tiny("llama").train()
    rk.patch(plain, rk.RedConfig(sites="*.gate_proj"))
    for edit in (ONE, TWO):
        rk.add_edit(plain, edit)
        zoo.fill(rk.edit_parameters(plain, edit), cases.values(rk.edit_parameters(plain, edit), seed=ord(edit)))
    twin = twin_of(plain, reentrant)
    library(plain, reentrant)
    assert_like_one_by_one(plain, twin, active)


def test_several_layers_in_one_checkpoint():
    """Layers by hand, all in one, in segments."""
    _, model, _ = several("llama")
    mlps = torch.nn.Sequential(*(layer.mlp for layer in model.model.layers))
    twin = copy.deepcopy(mlps)
    x = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
    losses = []
    for edit in (ONE, TWO):
        rk.switch_edit(model, edit)
        losses.append(checkpoint_sequential(mlps, 2, x, use_reentrant=False).square().sum())
    sum(losses).backward()
    for edit in (ONE, TWO):
        for mlp in twin:
            own = mlp.down_proj.red_edit
            own.selection.chosen = edit
            own.holder(edit).thaw()
        twin(x).square().sum().backward()
    for mlp, wanted in zip(mlps, twin, strict=True):
        for edit in (ONE, TWO):
            for part in ("scale", "bias"):
                torch.testing.assert_close(
                    getattr(mlp.down_proj.red_edit.holder(edit), part).grad,
                    getattr(wanted.down_proj.red_edit.holder(edit), part).grad,
                )


def test_one_layer_twice_in_one_checkpoint_with_different_edits():
    _, model, _ = several("llama")
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)

    def twice(x):
        with rk.use_edits(model, [ONE, ONE]):
            x = mlp(x)
        with rk.use_edits(model, [TWO, TWO]):
            return mlp(x)

    wanted = torch.autograd.grad(twice(x).square().sum(), x)[0]
    loss = checkpoint(twice, x, use_reentrant=False).square().sum()
    rk.switch_edit(model, "a")
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], wanted)  # the second run enters the blocks again

    def switching(x):
        rk.switch_edit(model, ONE)
        x = mlp(x)
        rk.switch_edit(model, TWO)
        return mlp(x)

    loss = checkpoint(switching, x, use_reentrant=False).square().sum()
    with pytest.raises(RuntimeError, match="a layer ran several times in one checkpoint, with different edits"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_edit_that_was_deleted_since(reentrant):
    model, _ = prepared(reentrant=reentrant)
    loss = active(model, ONE, inputs("llama", 2))
    rk.switch_edit(model, TWO)
    rk.delete_edit(model, ONE)
    with pytest.raises(RuntimeError, match="runs again with the edit 'a', which was deleted"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", [active, rows])
@pytest.mark.parametrize("change", ["step", "load", "another edit"])
def test_values_that_were_changed_since(change, how, reentrant, tmp_path):
    """Without checkpointing autograd says so."""
    model, _ = prepared(reentrant=reentrant)
    rk.save_edits(model, tmp_path, name=TWO)
    loss = how(model, ONE, inputs("llama", 2))
    if change == "step":
        vectors = [vector for parts in rk.edit_parameters(model, ONE).values() for vector in parts.values()]
        for vector in vectors:
            vector.grad = torch.ones_like(vector)
        torch.optim.SGD(vectors, lr=0.1).step()
    if change == "load":
        rk.load_edits(model, tmp_path, name=ONE)
    if change == "another edit":
        rk.load_edits(model, tmp_path, name=TWO)
        loss.backward()
        return
    with pytest.raises(RuntimeError, match="changed in place since"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("by", ["set_adapter", "disable_adapter", "names"])
def test_adapters_of_peft(by, reentrant):
    peft = pytest.importorskip("peft")
    from red_kernels.integrations.peft import RedPeftConfig

    model = peft.get_peft_model(zoo.tiny("llama"), RedPeftConfig(init_weights=False), adapter_name=ONE)
    model.add_adapter(TWO, RedPeftConfig(init_weights=False))
    model.train()
    twin = twin_of(model, True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})

    def run(one, edit):
        if by == "names":
            with rk.use_edits(one, [edit, ONE]):
                return weighted(one(**inputs("llama", 2)).logits)
        if by == "disable_adapter" and edit == TWO:
            with one.disable_adapter(), torch.no_grad():
                return weighted(one(**inputs("llama", 2)).logits)
        one.set_adapter(edit)
        return weighted(one(**inputs("llama", 2)).logits)

    def gradients(one):
        return {name: own.grad for name, own in one.named_parameters() if "red_edit" in name and own.grad is not None}

    (run(model, ONE) + run(model, TWO)).backward()
    for edit in (ONE, TWO):
        loss = run(twin, edit)
        if loss.requires_grad:
            loss.backward()
    found, wanted = gradients(model), gradients(twin)
    assert found.keys() == wanted.keys()
    assert any(f".{ONE}." in key for key in found)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])


def test_gradients_of_an_edit_that_is_frozen_by_then():
    """Without checkpointing: switching before the backward pass loses nothing, and freezes."""
    _, model, _ = several("llama")
    twin = copy.deepcopy(model)
    batch = inputs("llama", 2)
    loss = active(model, ONE, batch)
    rk.switch_edit(model, TWO)
    assert not any(v.requires_grad for parts in rk.edit_parameters(model, ONE).values() for v in parts.values())
    loss.backward()
    loss = active(model, ONE, batch)  # and what comes later adds up
    rk.switch_edit(model, "default")
    loss.backward()
    active(twin, ONE, batch).backward()
    found, wanted = all_gradients(model), all_gradients(twin)
    for key in wanted:
        torch.testing.assert_close(found[key], 2 * wanted[key])


@pytest.mark.parametrize("edit", NAMES)
def test_only_the_active_edit_is_trainable(edit):
    _, model, _ = several("llama")
    rk.switch_edit(model, edit)
    for name in NAMES:
        for parts in rk.edit_parameters(model, name).values():
            assert {vector.requires_grad for vector in parts.values()} == {name == edit}
    copied = copy.deepcopy(model)
    rk.switch_edit(copied, "a" if edit != "a" else "b")
    assert {name for name, own in copied.named_parameters() if own.requires_grad}.isdisjoint(
        name for name, own in model.named_parameters() if own.requires_grad
    )


def test_a_block_trains_its_edits_and_freezes_them_again():
    _, model, _ = several("llama")

    batch = inputs("llama", 2)
    with rk.use_edits(model, ["a", "b"]):
        assert trainable(model) == ["default", "a", "b"]
        with rk.use_edits(model, ["a", None]):
            pass
        loss = weighted(model(**batch).logits)
        rk.switch_edit(model, "a")
    assert trainable(model) == ["a"]
    loss.backward()
    assert all(value.any() for key, value in all_gradients(model).items() if not key.startswith("default"))
    with torch.no_grad(), rk.use_edits(model, ["b", "b"]):
        assert trainable(model) == ["a"]
        model(**batch)
        assert trainable(model) == ["a"]
        with torch.enable_grad():
            model(**batch)
        assert trainable(model) == ["a", "b"]
    assert trainable(model) == ["a"]
    for parts in rk.edit_parameters(model, "b").values():  # by hand it stays so
        for vector in parts.values():
            vector.requires_grad_(True)
    with rk.use_edits(model, ["b", "b"]):
        model(**batch)
    assert trainable(model) == ["a", "b"]


@pytest.mark.parametrize("part", ["mlp", "red_edit", "all"])
def test_parts_in_evaluation_mode(part):
    """Reentrant checkpointing runs without gradients first, whatever mode its layers are in."""
    model, twin = prepared(reentrant=True)
    for one in (model, twin):
        for layer in one.model.layers:
            if part == "mlp":
                layer.mlp.eval()
            if part == "red_edit":
                layer.mlp.down_proj.red_edit.eval()
    if part == "all":
        for one in (model, twin):
            one.eval()
        own_layers(model, True)
    assert_like_one_by_one(model, twin, rows)


def test_blocks_that_end_in_another_order_freeze_what_they_thawed():
    _, model, _ = several("llama")

    def stream(ids):
        with rk.use_edits(model, ids):
            while True:
                yield weighted(model(**inputs("llama", 2)).logits)

    first, second = stream(["a", "a"]), stream(["a", "b"])
    next(first)
    next(second)
    first.close()
    assert trainable(model) == ["default", "a", "b"]
    second.close()
    assert trainable(model) == ["default"]
    with rk.use_edits(model, ["a", "b"]):
        copied = copy.deepcopy(model)
        rk.switch_edit(model, "b")
        rk.switch_edit(model, "default")
    assert trainable(copied) == ["default"]
    assert trainable(model) == ["default"]


def test_hooks_that_only_store_leave_nothing_behind():
    _, model, _ = several("llama")
    for _ in range(4):
        with rk.use_edits(model, ["a", "b"]), torch.autograd.graph.save_on_cpu():
            weighted(model(**inputs("llama", 2)).logits).backward()
    own = model.model.layers[0].mlp.down_proj.red_edit
    assert len(own.selection.unclear) <= 2


def test_a_vector_frozen_by_hand_gets_no_late_gradient():
    _, model, _ = several("llama")
    rk.switch_edit(model, "a")
    rk.switch_edit(model, "default")
    rk.switch_edit(model, "a")
    loss = weighted(model(**inputs("llama", 2)).logits)
    vector = rk.edit_parameters(model, "a")["model.layers.0.mlp.down_proj"]["scale"]
    vector.requires_grad_(False)
    loss.backward()
    assert vector.grad is None
