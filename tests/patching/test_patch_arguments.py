"""Fused blocks take what the library's own forward takes, by place and by name, and hand it on: the cache too."""

from __future__ import annotations

import copy
import inspect

import model_zoo as zoo
import pytest
import torch

from red_kernels.edits.config import RedConfig
from red_kernels.fusion.compose import CACHES
from red_kernels.fusion.fingerprint import unwrapped
from red_kernels.patching.classes import is_patched
from red_kernels.patching.patch import patch, unpatch


def blocks_of(model):
    """The modules that run a fused forward, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if is_patched(module) and getattr(type(module), "_red_kernels_key", "") not in ("", "stack", "dropout")
    }


def calls_of(model, name, blocks, batch):
    """Path to the module's arguments in one forward with a cache, by the names of the library's forward."""
    found = {}

    def note(path):
        def hook(module, args, kwargs):
            signature = signature_of(module)
            bound = signature.bind(module, *args, **kwargs)
            bound.apply_defaults()
            more = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
            given = {key: value for key, value in list(bound.arguments.items())[1:] if key not in more}
            rest = {key: value for one in more for key, value in bound.arguments.get(one, {}).items()}
            found.setdefault(path, copy.deepcopy((given, rest)))

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in blocks]
    with torch.no_grad():
        model(**batch, **({"use_cache": True} if name in zoo.GENERATING else {}))
    for handle in handles:
        handle.remove()
    return found


def run(module, given, rest, how):
    """A block's output for a copy of these arguments, and what its own layer of the cache holds then."""
    given, rest = copy.deepcopy((given, rest))
    first, *others = given
    defaults = {own.name: own.default for own in signature_of(module).parameters.values()}
    with torch.no_grad():
        if how == "by place":
            output = module(*given.values(), **rest)
        elif how == "by name":
            output = module(given[first], **{key: given[key] for key in others}, **rest)
        else:
            needed = {key: given[key] for key in others if given[key] is not defaults[key]}
            output = module(given[first], **needed, **rest)
    layer = next((part.layer_idx for part in module.modules() if hasattr(part, "layer_idx")), None)
    caches = [value for key, value in {**given, **rest}.items() if key in (*CACHES, "layer_past") and value is not None]
    caches += [part for cache in caches if (part := getattr(cache, "cross_attention_cache", None)) is not None]
    return (output[0] if isinstance(output, tuple) else output), [cache.get_seq_length(layer) for cache in caches]


def signature_of(module):
    return inspect.signature(unwrapped(type(module).forward))


def hold_to_the_librarys(model, name, batch):
    patch(model, RedConfig())
    blocks = list(blocks_of(model))
    assert blocks
    unpatch(model)
    calls = calls_of(model, name, blocks, batch)
    assert calls.keys() == set(blocks)
    wanted = {path: run(model.get_submodule(path), *calls[path], "by name") for path in blocks}
    patch(model, RedConfig())
    for path in blocks:
        for how in ("by place", "by name", "what is needed"):
            output, lengths = run(model.get_submodule(path), *calls[path], how)
            torch.testing.assert_close(output, wanted[path][0])
            assert lengths == wanted[path][1], (path, how)
    return {path: lengths for path, (_, lengths) in wanted.items()}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_by_place_and_by_name(name):
    cached = hold_to_the_librarys(zoo.tiny(name).eval(), name, zoo.inputs(name))
    if name in zoo.GENERATING and not name.startswith("t5"):
        assert all(lengths and min(lengths) > 0 for lengths in cached.values())


def test_cross_attention_of_a_decoder():
    """It gets the cache, both masks and what it attends to, and nothing else."""
    model = zoo.tiny("gpt2", add_cross_attention=True).eval()
    batch = zoo.inputs("gpt2")
    batch["encoder_hidden_states"] = torch.randn(2, 5, zoo.HIDDEN)
    batch["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    cached = hold_to_the_librarys(model, "gpt2", batch)
    assert all(lengths[0] == batch["input_ids"].shape[1] and 5 in lengths for lengths in cached.values())


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "phi", "t5"])
def test_arguments_that_do_not_fit_are_refused_as_by_the_library(name):
    model = zoo.tiny(name).eval()
    patch(model, RedConfig())
    hidden = torch.zeros(1, 3, zoo.HIDDEN)
    for block in blocks_of(model).values():
        names = list(signature_of(block).parameters)[2:]
        if not names:
            continue  # a T5 block's FFN takes one argument
        with pytest.raises(TypeError, match="positional arguments"):
            block(hidden, *[None] * 12)
        with pytest.raises(TypeError, match="multiple values"):
            block(hidden, None, **{names[0]: None})
        if signature_of(block).parameters[names[0]].default is inspect.Parameter.empty:
            with pytest.raises(TypeError, match=f"missing the argument '{names[0]}'"):
                block(hidden)
