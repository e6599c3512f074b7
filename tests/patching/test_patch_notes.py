"""When the normed input is handed on across a layer's boundary, and when that has to be refused."""

from __future__ import annotations

import gc
import weakref
from types import MethodType

import model_zoo as zoo
import pytest
import torch
from patch_helpers import (
    compare,
    in_inference_mode,
    layers_of,
    learn,
    leave_note,
    loss_and_backward,
    patched_and_peer,
    stack_running,
    watch_quick_sums,
    watching,
    without_gradients,
)
from torch import nn

from red_kernels.fusion import sums
from red_kernels.fusion.scopes import running
from red_kernels.fusion.sums import NOTE, take_note
from red_kernels.patching import classes as patched

FEW = ("llama", "gemma2", "gpt2", "t5")  # one of each way in which a note travels


@pytest.fixture(params=["first forward", "later forward"])
def learnt(request):
    """Whether the norms behind the sites are known: in the first forward they are computed when they are called."""
    return request.param == "later forward"


@pytest.fixture
def watch(monkeypatch):
    return watching(monkeypatch)


@pytest.fixture
def held(learnt, watch):
    """`compare`, of a fresh model or of one that has run before."""

    def compare_both(name, run, **arguments):
        def prepare(model):
            if learnt:
                learn(model, name)
                watch.clear()

        return compare(name, run, prepare=prepare, **arguments)

    return compare_both


@pytest.mark.parametrize("run", [without_gradients, in_inference_mode])
@pytest.mark.parametrize("name", FEW)
def test_without_gradients(name, run, watch, held):
    held(name, run, gradients=False)
    assert watch.across
    assert watch.taken == watch.left


@pytest.mark.parametrize("name", FEW)
def test_hidden_states(name, watch, held):
    def run(model, batch):
        output = model(**batch, output_hidden_states=True)
        states = output.get("hidden_states") or output.decoder_hidden_states
        loss = output.loss + sum(state.float().square().mean() for state in states)
        loss.backward()
        return {f"hidden {i}": state.detach() for i, state in enumerate(states)}

    held(name, run)
    assert not watch.across
    assert watch.taken == watch.left


@pytest.mark.parametrize("name", FEW)
def test_hidden_states_without_gradients(name, watch, held):
    def run(model, batch):
        with torch.no_grad():
            output = model(**batch, output_hidden_states=True)
        states = output.get("hidden_states") or output.decoder_hidden_states
        return {f"hidden {i}": state for i, state in enumerate(states)}

    model = held(name, run, gradients=False)
    assert watch.across
    assert watch.taken == watch.left
    # transformers leaves its hooks on the layers: they must not stop the fusion from then on.
    watch.clear()
    model(**zoo.inputs(name)).loss.backward()
    assert len(watch.across) == len(zoo.sites(name))
    assert watch.taken == watch.left


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _replaced(output, value):
    return (value, *output[1:]) if isinstance(output, tuple) else value


@pytest.mark.parametrize("name", FEW)
def test_retain_grad_in_a_hook(name, watch, held):
    def run(model, batch):
        kept = []

        def hook(module, args, output):
            _first(output).retain_grad()
            kept.append(_first(output))

        handle = layers_of(model)[0].register_forward_hook(hook)
        model(**batch).loss.backward()
        handle.remove()
        return {"gradient": kept[0].grad}

    held(name, run)
    assert len(watch.across) == len(zoo.sites(name)) - 1


@pytest.mark.parametrize("mode", ["replace", "in place", "in place, inference mode"])
@pytest.mark.parametrize("name", FEW)
def test_a_hook_that_changes_the_output(name, mode, watch, held):
    def run(model, batch):
        def hook(module, args, output):
            z = _first(output)
            if mode == "replace":
                return _replaced(output, z * 1.5)
            z.mul_(1.5)
            return None

        layers_of(model)[0].register_forward_hook(hook)
        return in_inference_mode(model, batch) if "inference" in mode else loss_and_backward(model, batch)

    held(name, run, gradients="inference" not in mode)
    assert watch.taken == watch.left


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_a_pre_hook_on_the_next_layer(name, change, watch, held):
    def run(model, batch):
        seen = []

        def hook(module, args, kwargs):
            seen.append(args[0] if args else kwargs["hidden_states"])
            if seen[0].requires_grad:
                seen[0].retain_grad()
            return ((args[0] * 1.5, *args[1:]), kwargs) if change else None

        layers_of(model)[1].register_forward_pre_hook(hook, with_kwargs=True)
        result = loss_and_backward(model, batch)
        return {**result, "gradient": seen[0].grad}

    held(name, run)
    assert watch.taken == watch.left
    assert len(watch.across) == len(zoo.sites(name)) - 1


def _first_norm(model):
    return next(m for m in layers_of(model)[1].modules() if "norm" in type(m).__name__.lower())


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("name", FEW)
def test_a_hook_on_the_norm(name, side, watch, held):
    def run(model, batch):
        seen = []
        norm = _first_norm(model)

        def before(module, args):
            args[0].retain_grad()
            seen.append(args[0])

        def after(module, args, output):
            seen.append(output)
            output.retain_grad()
            return output * 1.25

        norm.register_forward_pre_hook(before) if side == "before" else norm.register_forward_hook(after)
        result = loss_and_backward(model, batch)
        return {**result, "gradient": seen[0].grad}

    held(name, run)
    # No note comes to the norm; and as its hook may look at what it is given, nothing waits in its layer either.
    assert len(watch.across) == len(zoo.sites(name)) - 2
    assert watch.taken == watch.left


@pytest.mark.parametrize("where", ["layer", "norm", "next layer"])
@pytest.mark.parametrize("name", FEW)
def test_full_backward_hooks(name, where, watch, held):
    def run(model, batch):
        seen = []
        module = {"layer": layers_of(model)[0], "next layer": layers_of(model)[1], "norm": _first_norm(model)}[where]
        module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].clone()))
        if not (name == "t5" or where != "layer"):
            model.enable_input_require_grads()
        result = loss_and_backward(model, batch)
        return {**result, "gradient": seen[0]}

    held(name, run)
    assert watch.taken == watch.left


@pytest.mark.parametrize("where", ["forward", "pre"])
def test_global_hooks(where, watch, held):
    def run(model, batch):
        kept = []

        def hook(module, args, *output):
            if module is layers_of(model)[0] and where == "forward":
                _first(output[0]).retain_grad()
                kept.append(_first(output[0]))
            elif module is layers_of(model)[1] and where == "pre":
                args[0].retain_grad()
                kept.append(args[0])

        register = {
            "forward": nn.modules.module.register_module_forward_hook,
            "pre": nn.modules.module.register_module_forward_pre_hook,
        }[where]
        handle = register(hook)
        try:
            result = loss_and_backward(model, batch)
        finally:
            handle.remove()
        return {**result, "gradient": kept[0].grad}

    held("llama", run)
    assert not watch.left


def test_a_gradient_hook_on_the_output_itself():
    """Whoever gets hold of the output in some other way finds the whole gradient: the note is refused by the norm."""
    model, _, _ = patched_and_peer("llama")
    stack = model.model
    norm = layers_of(model)[1].input_layernorm
    original = type(norm).__mro__[1].forward
    z = torch.randn(2, 3, zoo.HIDDEN, requires_grad=True) * 1.0
    with stack_running(stack):
        leave_note(z, torch.zeros_like(z), norm)
        z.retain_grad()
        assert take_note(norm, z) is None
        assert torch.equal(norm(z), original(norm, z))
        leave_note(z, torch.zeros_like(z), stack.norm)
        assert take_note(norm, z) is None
    assert NOTE not in z.__dict__


def test_a_note_made_without_gradients_is_not_taken_with_them():
    model, _, _ = patched_and_peer("llama")
    norm = model.model.norm
    with stack_running(model.model):
        for made, taken in ((False, True), (True, False)):
            z = torch.randn(2, 3, zoo.HIDDEN)
            with torch.set_grad_enabled(made):
                leave_note(z, torch.zeros_like(z), norm)
            with torch.set_grad_enabled(taken):
                assert take_note(norm, z) is None
        with torch.no_grad():
            z = torch.randn(2, 3, zoo.HIDDEN)
            leave_note(z, torch.zeros_like(z), norm)
            assert take_note(norm, z) is not None
            leave_note(z, torch.zeros_like(z), norm)
            z.add_(1.0)
            assert take_note(norm, z) is None
            leave_note(z, torch.zeros_like(z), norm)
            with torch.autograd.graph.save_on_cpu():
                assert take_note(norm, z) is None


@pytest.mark.parametrize("name", FEW)
def test_saved_tensor_hooks(name, watch, held):
    def run(model, batch):
        with torch.autograd.graph.save_on_cpu():
            return loss_and_backward(model, batch)

    held(name, run)
    assert not watch.left


def test_a_kernelised_norm(watch, held):
    """`kernelize` and the like replace the `forward` of the instance."""

    def run(model, batch):
        norm = layers_of(model)[1].input_layernorm
        original = norm.forward
        norm.forward = MethodType(lambda self, x: original(x) * 1.5, norm)
        return loss_and_backward(model, batch)

    held("llama", run)
    assert len(watch.across) == zoo.LAYERS - 1
    assert watch.taken == watch.left


def test_a_norm_replaced_since(watch, held):
    """In the first forward behind it a note may be left for the former norm, once."""

    def run(model, batch):
        norm = nn.LayerNorm(zoo.HIDDEN).to(batch_dtype(model))
        layers_of(model)[1].input_layernorm = norm
        first = loss_and_backward(model, batch)
        assert len(watch.left) - len(watch.taken) in (0, 1)
        watch.clear()
        return {**first, "again": loss_and_backward(model, batch)["logits"]}

    def batch_dtype(model):
        return next(model.parameters()).dtype

    held("llama", run)
    assert watch.taken == watch.left


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_early_exit_over_a_slice(name, watch, held):
    """Layers left out of the stack: where nobody takes a note, none is left from the second forward on."""

    def run(model, batch):
        stack = next(m for m in model.modules() if layers_of(model) in m.children())
        key = next(key for key, child in stack.named_children() if child is layers_of(model))
        full = layers_of(model)
        setattr(stack, key, full[:2])
        first = loss_and_backward(model, batch)
        assert len(watch.left) - len(watch.taken) in (0, 1)
        watch.clear()
        again = loss_and_backward(model, batch)
        setattr(stack, key, full)
        return {**first, "again": again["logits"]}

    held(name, run)
    assert watch.taken == watch.left


def test_layers_run_by_hand(watch, held):
    """Outside the stack's forward anybody may keep the outputs and ask for their gradients."""

    def run(model, batch):
        stack = model.model
        hidden = stack.embed_tokens(batch["input_ids"])
        positions = stack.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        states = []
        for layer in stack.layers[:2]:
            hidden = layer(hidden, position_embeddings=positions)
            states.append(hidden)
        output = stack.norm(hidden)
        loss = output.square().sum()
        gradients = torch.autograd.grad(loss, states, retain_graph=True)
        loss.backward()
        return {"output": output.detach(), "first": gradients[0], "second": gradients[1]}

    held("llama", run)
    assert not watch.across
    assert watch.taken == watch.left


def test_a_skipped_layer(watch, held):
    class Skip(nn.Module):
        def forward(self, hidden, *args, **kwargs):
            return hidden

    def run(model, batch):
        layers = layers_of(model)
        skipped = layers[1]
        layers[1] = Skip()
        first = loss_and_backward(model, batch)
        assert len(watch.left) - len(watch.taken) in (0, 1)
        watch.clear()
        again = loss_and_backward(model, batch)
        layers[1] = skipped
        return {**first, "again": again["logits"]}

    # The vectors of the layer that is left out get no gradient, in the peers neither.
    held("llama", run)
    assert watch.taken == watch.left


@pytest.mark.parametrize("name", FEW)
def test_the_handed_tensor_is_freed_once_taken(name, learnt, monkeypatch):
    """At no time is more than one note alive; after the forward none is, and no sum and no value of a norm."""
    model, _, _ = patched_and_peer(name)
    if learnt:
        learn(model, name)
    notes: list[weakref.ref] = []
    tensors: list[weakref.ref] = []

    def noted(total, note):
        assert all(reference() is None for reference in notes)
        notes.append(weakref.ref(note))
        tensors.extend(weakref.ref(tensor) for tensor in (total, note.normed) if tensor is not None)

    class Note(sums.Note):
        def __init__(self, total, *args, **kwargs):
            super().__init__(total, *args, **kwargs)
            noted(total, self)

    def taken(norm, z):
        normed = take_note(norm, z)
        assert NOTE not in z.__dict__
        if normed is not None:
            tensors.append(weakref.ref(normed))
        return normed

    monkeypatch.setattr(sums, "Note", Note)
    monkeypatch.setattr(patched, "take_note", taken)
    watch_quick_sums(monkeypatch, lambda total: noted(total, total.__dict__[NOTE]))
    gc.disable()
    try:
        with torch.no_grad():
            logits = model(**zoo.inputs(name)).logits
        assert len(notes) >= len(zoo.sites(name))
        assert all(reference() is None for reference in (*notes, *tensors))
        assert not running()
        del logits
    finally:
        gc.enable()
