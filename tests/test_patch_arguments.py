"""Fused blocks take what the library's own forward takes, by place and by name, and hand it on: the cache too."""

from __future__ import annotations

import copy
import inspect

import model_zoo as zoo
import pytest
import torch

from red_kernels.config import RedConfig
from red_kernels.models.compose import CACHES
from red_kernels.models.fingerprint import unwrapped
from red_kernels.patch import patch, unpatch
from red_kernels.patched import is_patched


def blocks_of(model):
    """The modules that run a fused forward, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if is_patched(module) and getattr(type(module), "_red_kernels_key", "") not in ("", "stack", "dropout")
    }


def calls_of(model, name, blocks):
    """Path to the module's arguments in one forward with a cache, by the names of the library's forward."""
    found = {}

    def note(path):
        def hook(module, args, kwargs):
            signature = inspect.signature(unwrapped(type(module).forward))
            bound = signature.bind(module, *args, **kwargs)
            bound.apply_defaults()
            more = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
            given = {key: value for key, value in list(bound.arguments.items())[1:] if key not in more}
            rest = {key: value for one in more for key, value in bound.arguments.get(one, {}).items()}
            found.setdefault(path, copy.deepcopy((given, rest)))

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True) for path in blocks]
    batch = zoo.inputs(name)
    with torch.no_grad():
        model(**batch, **({"use_cache": True} if name in zoo.GENERATING else {}))
    for handle in handles:
        handle.remove()
    return found


def run(module, given, rest, by_place):
    given, rest = copy.deepcopy((given, rest))
    with torch.no_grad():
        if by_place:
            output = module(*given.values(), **rest)
        else:
            first, *others = given
            output = module(given[first], **{key: given[key] for key in others}, **rest)
    seen = [value for key, value in {**given, **rest}.items() if key in (*CACHES, "layer_past")]
    lengths = [cache.get_seq_length() for cache in seen if hasattr(cache, "get_seq_length")]
    return (output[0] if isinstance(output, tuple) else output), lengths


@pytest.mark.parametrize("name", zoo.NAMES)
def test_by_place_and_by_name(name):
    model = zoo.tiny(name).eval()
    patch(model, RedConfig())
    blocks = list(blocks_of(model))
    assert blocks
    unpatch(model)
    calls = calls_of(model, name, blocks)
    assert calls.keys() == set(blocks)
    wanted = {path: run(model.get_submodule(path), *calls[path], False) for path in blocks}
    if name in zoo.GENERATING and any(lengths for _, lengths in wanted.values()):
        assert all(length > 0 for _, lengths in wanted.values() for length in lengths)
    patch(model, RedConfig())
    for path in blocks:
        block = model.get_submodule(path)
        for by_place in (False, True):
            output, lengths = run(block, *calls[path], by_place)
            torch.testing.assert_close(output, wanted[path][0])
            assert lengths == wanted[path][1], path


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi"])
def test_too_many_arguments_are_refused_as_the_library_does(name):
    model = zoo.tiny(name).eval()
    patch(model, RedConfig())
    block = next(iter(blocks_of(model).values()))
    hidden = torch.zeros(1, 3, zoo.HIDDEN)
    with pytest.raises(TypeError, match="too many positional arguments"):
        block(hidden, *[None] * 12)
    with pytest.raises(TypeError, match="multiple values"):
        block(hidden, None, **{list(inspect.signature(unwrapped(type(block).forward)).parameters)[2]: None})
