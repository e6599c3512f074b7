"""Whatever goes wrong in the middle of a patch, and whatever is raised: the model is what it was."""

from __future__ import annotations

import importlib

import model_zoo as zoo
import pytest
import torch
from torch import nn

import red_kernels as rk
from red_kernels.edits.module import RedEdit

patch_module = importlib.import_module("red_kernels.patching.patch")  # the package has a function of that name


def snapshot(model):
    return {
        name: (
            type(module),
            {key: value for key, value in vars(module).items() if not key.startswith("_")},
            tuple(module._modules),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            {key for key in vars(module) if key.startswith("_red")},
            {key: value.requires_grad for key, value in module._parameters.items() if value is not None},
        )
        for name, module in model.named_modules()
    }


class Stop(BaseException):
    pass


def of_class(kind, **methods):
    """A subclass of a layer's class that runs like it and gets in the way of a patch."""
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})


def raising(*_args, **_kwargs):
    raise Stop("mine")


class Refusing(type):
    """A metaclass that takes no further subclass."""

    def __new__(cls, name, bases, namespace):
        if "_red_kernels_key" in namespace:
            raise Stop("no subclass")
        return super().__new__(cls, name, bases, namespace)


def init_subclass(cls, **_kwargs):
    if "_red_kernels_key" in cls.__dict__:
        raise Stop("no subclass")


def set_class(module, kind):
    module.__class__ = kind


def spoil(model, way):
    """Make the second layer or its parts raise somewhere in a patch."""
    layer = model.model.layers[1]
    site = layer.mlp.down_proj
    if way == "init_subclass":
        set_class(layer, of_class(type(layer), __init_subclass__=classmethod(init_subclass)))
    if way == "metaclass":
        kind = type(layer)
        set_class(layer, Refusing(kind.__name__, (kind,), {"__module__": kind.__module__}))
    if way == "norm's init_subclass":
        norm = model.model.layers[2].input_layernorm
        set_class(norm, of_class(type(norm), __init_subclass__=classmethod(init_subclass)))
    if way == "add_module":
        set_class(site, of_class(type(site), add_module=raising, register_module=raising))
    if way == "register_forward_hook":
        set_class(site, of_class(type(site), register_forward_hook=raising))
    if way == "layer's register_forward_hook":
        set_class(layer, of_class(type(layer), register_forward_hook=raising))
    if way == "setattr":
        set_class(site, of_class(type(site), __setattr__=raising))
    if way == "parameter":
        site.weight = Stubborn(site.weight.detach().clone())
    if way == "class assignment":

        def refuse(self, name, value):
            if name == "__class__":
                raise Stop("this class stays")
            nn.Module.__setattr__(self, name, value)

        set_class(layer, of_class(type(layer), __setattr__=refuse))


class Stubborn(nn.Parameter):
    """A Parameter that cannot be frozen."""

    def requires_grad_(self, requires_grad=True):
        raise Stop("trainable for ever")


WAYS = [
    "init_subclass",
    "metaclass",
    "norm's init_subclass",
    "add_module",
    "register_forward_hook",
    "layer's register_forward_hook",
    "setattr",
    "parameter",
    "class assignment",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_patch_happens_or_does_not(way):
    model = zoo.tiny("llama")
    spoil(model, way)
    before = snapshot(model)
    batch = zoo.inputs("llama")
    logits = model(**batch).logits
    try:
        rk.patch(model)
    except Stop:
        assert snapshot(model) == before
        assert torch.equal(model(**batch).logits, logits)
        with pytest.raises(ValueError, match="is not patched"):
            rk.unpatch(model)
    else:
        model(**batch).loss.backward()
        rk.unpatch(model)
        assert snapshot(model) == before
        assert torch.equal(model(**batch).logits, logits)


STEPS = [
    "attach",
    "fuse",
    "watch",
    "patch_scope",
    "patch_norm",
    "carry",
    "wrap_saving",
    "_check_free",
    "RedEdit",
    "prepare_classes",
    "expected",
]
ONCE = ("fuse", "watch", "wrap_saving", "prepare_classes", "expected")


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, MemoryError, ValueError])
@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_taken_back(step, error, monkeypatch):
    """Each of the patch's own steps fails at its second call, or its only one, after it was done."""
    model = zoo.tiny("llama")
    before = snapshot(model)
    real = getattr(patch_module, step)
    calls = []

    def failing(*args, **kwargs):
        result = real(*args, **kwargs)
        calls.append(step)
        if len(calls) == 2 or step in ONCE:
            raise error("in the middle")
        return result

    monkeypatch.setattr(patch_module, step, failing)
    with pytest.raises(error):
        rk.patch(model)
    assert calls
    assert snapshot(model) == before
    monkeypatch.undo()
    rk.patch(model)
    model(**zoo.inputs("llama")).loss.backward()
    rk.unpatch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("what", ["child", "attribute", "parameter", "buffer", "property"])
def test_a_name_that_is_taken(what):
    model = zoo.tiny("llama")
    site = model.model.layers[1].mlp.down_proj
    if what == "child":
        site.red_edit = nn.Linear(2, 2)
    if what == "attribute":
        site.red_edit = "mine"
    if what == "parameter":
        site.red_edit = nn.Parameter(torch.ones(2))
    if what == "buffer":
        site.register_buffer("red_edit", torch.ones(2))
    if what == "property":
        set_class(site, of_class(type(site), red_edit=property(lambda self: 1)))
    held = site.red_edit
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.down_proj, a Linear, has an attribute 'red_edit' of its own"
    ):
        rk.patch(model)
    assert snapshot(model) == before
    assert site.red_edit is held or what == "property"
    rk.patch(model, rk.RedConfig(layers=[0, 2]))
    rk.unpatch(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("where", ["made", "patched", "unpatched"])
def test_a_model_made_in_inference_mode(where):
    with torch.inference_mode():
        model = zoo.tiny("llama")
    before = snapshot(model)
    with torch.inference_mode(where == "patched"):
        rk.patch(model)
    with torch.inference_mode(where == "unpatched"):
        rk.unpatch(model)
    assert snapshot(model) == before
    assert not any(isinstance(module, RedEdit) for module in model.modules())
    rk.patch(model)
    with torch.inference_mode():
        model(**zoo.inputs("llama"))
