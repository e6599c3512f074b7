"""A patched model in all the ways in which models are run, against the unfused composition."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref

import model_zoo as zoo
import pytest
import torch
from patch_helpers import (
    batch_for,
    compare,
    layers_of,
    learn,
    loss_and_backward,
    patched_and_peer,
    philox_dropout,
    watching,
    without_gradients,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.fusion import sums
from red_kernels.fusion.scopes import running
from red_kernels.patching.patch import patch

FEW = ("llama", "gemma2", "gpt2", "t5")  # one of each way in which a note travels


@pytest.fixture
def watch(monkeypatch):
    return watching(monkeypatch)


@pytest.mark.parametrize("name", zoo.DROPPING)
def test_dropout(name, monkeypatch):
    """The fused operation drops what plain dropout behind the edit would, and so does the rest of the layer."""
    monkeypatch.setattr(nn.functional, "dropout", philox_dropout)

    def run(model, batch):
        model.train()
        torch.manual_seed(11)
        return loss_and_backward(model, batch)

    compare(name, run, dropout=0.3)


@pytest.mark.parametrize("name", zoo.DROPPING)
def test_eval_after_train(name):
    def run(model, batch):
        model.train()
        torch.manual_seed(11)
        model(**batch).loss.backward()
        model.zero_grad()
        model.eval()
        return without_gradients(model, batch)

    compare(name, run, dropout=0.3, gradients=False)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*FEW, "bert", "opt"])
def test_checkpointing(name, reentrant, watch):
    """Nothing is handed on to the next layer: around a checkpoint its output and its note would live and die apart."""

    def run(model, batch):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        calls = []
        layers_of(model)[1].register_forward_hook(lambda *_: calls.append(1))
        inner = next(
            module
            for module in layers_of(model)[1].modules()
            if isinstance(module, nn.LayerNorm) or hasattr(module, "weight")
        )
        inner.register_forward_pre_hook(lambda *_: calls.append(2))
        result = loss_and_backward(model, batch)
        assert calls.count(2) == 2, "the layer was not recomputed"
        return result

    compare(name, run)
    assert not watch.across
    assert watch.taken == watch.left
    watch.clear()
    compare(name, run, prepare=lambda model: learn(model, name) or watch.clear())
    assert not watch.across
    assert watch.taken == watch.left


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "phi3"])
def test_checkpointing_recomputes_the_same_dropout(name):
    results = []
    for enabled in (False, True):
        model = zoo.tiny(name, dropout=0.3)
        patch(model, RedConfig())
        zoo.fill(edit_parameters(model), zoo.vectors(zoo.sites(name)))
        model.train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        output = model(**zoo.inputs(name))
        output.loss.backward()
        results.append((output.logits.detach(), zoo.gradients(edit_parameters(model))))
    (logits, gradients), (logits_again, gradients_again) = results
    truth = 64 * torch.finfo(torch.float32).eps
    assert (logits - logits_again).norm() <= truth * logits.norm()
    for key in gradients:
        assert (gradients[key] - gradients_again[key]).norm() <= truth * gradients[key].norm(), key


class Checkpointed(nn.Module):
    """A user's own wrapper around a layer."""

    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, hidden, *args, **kwargs):
        # The reentrant form takes positional arguments only.
        return checkpoint(lambda x: self.layer(x, *args, **kwargs), hidden, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("wrapped", [(0, 1, 2), (1,)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_users_own_checkpointing(name, wrapped, reentrant, watch):
    def run(model, batch):
        layers = layers_of(model)
        for index in wrapped:
            layers[index] = Checkpointed(layers[index], reentrant)
        model.train()
        model.enable_input_require_grads()
        result = loss_and_backward(model, batch)
        for index in wrapped:
            layers[index] = layers[index].layer
        return result

    compare(name, run)
    assert watch.taken == watch.left


def test_threads():
    model, unfused, truth = patched_and_peer("llama")
    batches = [zoo.inputs("llama", seed=seed, length=5 + seed) for seed in range(4)]
    found = {}

    def work(index):
        with torch.no_grad():
            for _ in range(3):
                found[index] = model(**batches[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for index, batch in enumerate(batches):
            exact = truth.model(**batch).logits
            zoo.assert_as_exact(f"thread {index}", found[index], unfused.model(**batch).logits, exact)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", FEW)
def test_an_exception_and_a_direct_call_after_it(name, watch):
    def run(model, batch):
        layer = layers_of(model)[1]

        def fail(*_):
            raise Interrupted

        inside = next(m for m in layer.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
        handle = inside.register_forward_hook(fail)
        with contextlib.suppress(Interrupted):
            model(**batch)
        handle.remove()
        assert not running()
        # The FFN called by itself is edited: nothing is deferred any more.
        site = model.get_submodule(zoo.sites(name)[0])
        weight = site.weight
        width = weight.shape[0] if type(site).__name__ == "Conv1D" else weight.shape[1]
        direct = site(torch.ones(1, width, dtype=weight.dtype))
        return {**loss_and_backward(model, batch), "direct": direct.detach()}

    compare(name, run)
    assert watch.taken == watch.left[-len(watch.taken) :]


@pytest.mark.parametrize("name", FEW)
def test_an_exception_in_the_edited_ffn(name):
    """The request to leave an output unedited must not outlive the call it was made for."""

    def run(model, batch):
        site = model.get_submodule(zoo.sites(name)[0])

        def fail(*_):
            raise Interrupted

        handle = site.register_forward_pre_hook(fail)
        with contextlib.suppress(Interrupted):
            model(**batch)
        handle.remove()
        weight = site.weight
        width = weight.shape[0] if type(site).__name__ == "Conv1D" else weight.shape[1]
        return {"direct": site(torch.ones(1, width, dtype=weight.dtype)).detach()}

    compare(name, run, gradients=False)


@pytest.mark.parametrize("name", FEW)
def test_two_forwards_before_a_backward(name, watch):
    def run(model, batch):
        first = model(**batch)
        second = model(**{**batch, "input_ids": batch["input_ids"].flip(0)})
        (first.loss + 2.0 * second.loss).backward()
        return {"first": first.logits.detach(), "second": second.logits.detach()}

    compare(name, run)
    assert watch.taken == watch.left


def test_functional_call(watch):
    def run(model, batch):
        doubled = {name: value * 1.5 for name, value in model.named_parameters() if "norm" in name}
        output = torch.func.functional_call(model, doubled, (), batch)
        output.loss.backward()
        return {"logits": output.logits.detach()}

    compare("llama", run)
    assert watch.left
    assert watch.taken == watch.left


def test_torch_func_grad():
    """Under torch.func's transforms the plain composition runs."""
    model, unfused, truth = patched_and_peer("llama")
    batch = zoo.inputs("llama")
    key = f"{zoo.sites('llama')[1]}.red_edit.scale"
    vector = dict(model.named_parameters())[key]

    def loss(scale):
        return torch.func.functional_call(model, {key: scale}, (), batch).loss

    found = torch.func.grad(loss)(vector.detach())
    for peer in (unfused, truth):
        peer.model(**batch).loss.backward()
    name = f"{zoo.sites('llama')[1]}.scale"
    zoo.assert_as_exact("gradient", found, unfused.gradients()[name], truth.gradients()[name])


@pytest.mark.parametrize("name", [*FEW, "bert", "vit"])
def test_autocast(name, watch):
    def run(model, batch):
        if next(model.parameters()).dtype == torch.float64:
            return loss_and_backward(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch)
        output.loss.backward()
        return {"logits": output.logits.detach()}

    model, unfused, truth = patched_and_peer(name)
    found, plain, exact = (run(one, batch_for(one, name)) for one in (model, unfused.model, truth.model))
    assert found["logits"].dtype == plain["logits"].dtype
    zoo.assert_as_exact("logits", found["logits"], plain["logits"], exact["logits"], torch.bfloat16)
    own, peer, wanted = zoo.gradients(edit_parameters(model)), unfused.gradients(), truth.gradients()
    for key in wanted:
        zoo.assert_as_exact(key, own[key], peer[key], wanted[key], torch.bfloat16)
    assert watch.taken == watch.left


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_autocast_of_a_half_precision_model(name):
    """There autocast runs the norms in fp32: the fused operation would round their output."""
    model, unfused, _ = patched_and_peer(name, torch.bfloat16)
    seen = []
    for one in (model, unfused.model):
        norm = next(m for m in reversed(list(one.modules())) if type(m).__name__ == "LayerNorm")
        norm.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            seen.append(one(**zoo.inputs(name)).logits.dtype)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


def test_a_deleted_model_is_freed_at_once():
    model, _, _ = patched_and_peer("llama")
    for _ in range(2):
        model(**zoo.inputs("llama")).loss.backward()
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model.model.layers[0].mlp.down_proj.weight)
        del model
        assert gone() is None
    finally:
        gc.enable()


def _saved_bytes(output, smallest):
    """The bytes of activations that the graph keeps for its backward, each storage once."""
    seen, storages, waiting = set(), {}, [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        tensors = list(getattr(node, "saved_tensors", ()))
        tensors += [getattr(node, key) for key in dir(node) if key.startswith("_saved_")]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= smallest and not isinstance(tensor, nn.Parameter):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        waiting += [edge[0] for edge in node.next_functions]
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "t5", "bert"])
def test_less_is_saved_for_backward(name, dtype):
    """In half precision at least an activation a layer: nothing is kept in fp32. In fp32 there is nothing to save.

    The first forward, in which the norms are not known before they are called, keeps more.
    """
    model, unfused, _ = patched_and_peer(name, dtype)
    batch = zoo.inputs(name, batch=4, length=32)
    model(**batch).loss.backward()
    activation = 4 * 32 * zoo.HIDDEN * dtype.itemsize if dtype != torch.float32 else 0
    fused, plain = (_saved_bytes(one(**batch).logits, 4 * 32 * zoo.HIDDEN) for one in (model, unfused.model))
    assert fused <= plain - len(zoo.sites(name)) * activation


def test_a_copy_hands_on_by_itself(watch):
    model, _, _ = patched_and_peer("t5")
    model(**zoo.inputs("t5")).loss.backward()
    other = copy.deepcopy(model)
    for _ in range(2):
        watch.clear()
        other(**zoo.inputs("t5")).loss.backward()
        assert watch.taken == watch.left
        assert len(watch.across) == len(zoo.sites("t5"))
        assert all(any(norm is module for module in other.modules()) for norm in watch.left)
    alone = copy.deepcopy(model.encoder.block[0])
    with torch.no_grad():
        alone(torch.randn(1, 4, zoo.HIDDEN))


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_an_exception_keeps_nothing(name, learnt, monkeypatch):
    """Notes, sums and norms of them are gone with the exception: who runs out of memory tries again with less."""
    model, _, _ = patched_and_peer(name)
    batch = zoo.inputs(name)
    if learnt:
        learn(model, name)
    alive = []

    class Note(sums.Note):
        def __init__(self, total, *args, **kwargs):
            super().__init__(total, *args, **kwargs)
            alive.extend(weakref.ref(one) for one in (self, total, self.normed) if one is not None)

    def fail(*_):
        raise Interrupted

    monkeypatch.setattr(sums, "Note", Note)
    gc.collect()
    gc.disable()
    try:
        handle = model.get_submodule(zoo.sites(name)[2]).register_forward_hook(fail)
        with contextlib.suppress(Interrupted):
            model(**batch)
        handle.remove()
        assert alive
        assert all(reference() is None for reference in alive)
        assert not running()
    finally:
        gc.enable()
