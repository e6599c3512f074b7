"""The linear layers of a model's blocks: their names, their queries, keys and values, their sizes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

QUERIES = ("q_proj", "query", "q", "query_proj", "q_lin")
KEYS = ("k_proj", "key", "k", "key_proj", "k_lin")
VALUES = ("v_proj", "value", "v", "value_proj", "v_lin")
JOINED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj")  # queries, keys and values in one


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model's blocks by name: those with a layer number in it, so no head and no pooler."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and in_block(name)
    }


def in_block(name: str) -> bool:
    """Whether a module's name contains a layer number."""
    return re.search(r"(?<![^.])\d+(?![^.])", name) is not None


def named(linears: Mapping[str, nn.Module], *groups: tuple[str, ...]) -> list[str]:
    """The layers whose last name is in one of the groups, or else joint layers of queries, keys and values."""
    last = {name: name.rpartition(".")[2] for name in linears}
    if all(any(own in group for own in last.values()) for group in groups):
        return [name for name, own in last.items() if any(own in group for group in groups)]
    found = [name for name, own in last.items() if own in JOINED]
    if not found:
        raise ValueError(f"model: none of its linear layers is named like queries, keys or values: {list(last)[:8]}")
    return found


def transposed(linears: Mapping[str, nn.Module], names: Iterable[str]) -> bool:
    """Whether these layers store their weight as (in, out), which PEFT needs to know."""
    return not any(isinstance(linears[name], nn.Linear) for name in names)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """The input and output features of a linear layer, `Conv1D` included."""
    own: Any = linear
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return own.weight.shape[0], own.weight.shape[1]


def as_linears(model: nn.Module, names: Iterable[str]) -> None:
    """Replace those of these layers that are `Conv1D` by `nn.Linear` over the same memory, in place.

    PEFT has HRA, RoAd and SHiRA only for `nn.Linear`. The weight is a transposed view, the bias the same Parameter.
    """
    for name in names:
        own: Any = model.get_submodule(name)
        if isinstance(own, nn.Linear):
            continue
        made = nn.Linear(*sizes(own), device="meta")
        made.weight = nn.Parameter(own.weight.detach().t(), requires_grad=own.weight.requires_grad)
        made.bias = own.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made.train(own.training))
