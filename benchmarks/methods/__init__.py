"""The fine-tuning methods of the suite, each applied to one model: RED fused, naive and compiled, and its peers.

Every method starts as the frozen model, with the same logits before the first step, except edits of kinds with a random
start. The vectors of RED are fp32. PEFT keeps its adapters in fp32 too on a half-precision base model, by default, and
so do the neighbours written here. Trained biases and whole weights keep the model's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from red_kernels.support.require import require

from . import known, neighbours, red
from .frame import Batches, Method, Prepared, inputs_in_fp32
from .known import ALPHA, RANK
from .linears import block_linears
from .red import edited_sites

__all__ = [
    "ALPHA",
    "KIND_METHODS",
    "METHODS",
    "MORE_ADAPTERS",
    "POSITION_METHODS",
    "QUALITY_DEFAULT",
    "QUALITY_METHODS",
    "RANK",
    "STEP_KNOWN",
    "STEP_METHODS",
    "Batches",
    "Method",
    "Prepared",
    "block_linears",
    "edited_sites",
    "prepare",
    "sister",
]


def prepare(name: str, model: nn.Module, *, head: Iterable[str] = (), batches: Batches = ()) -> Prepared:
    """Prepare a model for a method, in place.

    Args:
        name: one of `METHODS`.
        model: a transformers model that is not patched; a `sister` if the original is needed again.
        head: names of parameters that are trained besides the method's own, for example a new classification head. In
            half precision their modules are converted to fp32 and take their inputs in fp32: small updates would be
            lost.
        batches: of the task, the model's inputs with labels; for a method that needs some before it trains (`spt`).

    Raises:
        ValueError: an unknown method or parameter, a model that the method does not fit, or missing batches.
        ModuleNotFoundError: a package is missing; the message contains the pip command.
    """
    if name not in METHODS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(map(repr, METHODS))}")
    method = METHODS[name]
    parameters = dict(model.named_parameters())
    chosen = list(dict.fromkeys(head))
    for wanted in chosen:
        if wanted not in parameters:
            raise ValueError(f"head: the model has no parameter {wanted!r}")
    if method.needs is not None:
        require(method.needs, f"the method {name}")
    if name == "linear-probe" and chosen:
        model.requires_grad_(False)
        prepared = Prepared(model, [])
    elif method.looks:
        seen = list(batches)
        if not seen:
            raise ValueError(f"batches: got none, but {name} chooses its parameters by the gradients on some")
        prepared = method.apply(model, seen)
    else:
        prepared = method.apply(model)
    _train_too(model, [parameters[wanted] for wanted in chosen], prepared)
    return prepared


def _train_too(model: nn.Module, head: list[nn.Parameter], prepared: Prepared) -> None:
    ids = {id(own) for own in head}
    if head:
        for module in model.modules():
            for own in module.parameters(recurse=False):
                if id(own) in ids and own.dtype.itemsize < 4:
                    module.register_forward_pre_hook(inputs_in_fp32)
                    for each in module.parameters(recurse=False):
                        each.data = each.data.float()
    there = {id(own) for own in prepared.trained}
    for own in head:
        own.requires_grad_(True)
        if id(own) not in there:
            prepared.trained.append(own)


def sister(model: nn.Module) -> nn.Module:
    """A copy of a model whose Parameters are new objects over the same memory; its buffers are copies.

    So many methods can share one base model. Only a method that does not change the shared weights may be trained: all
    but `full` and `bitfit`, and these too at a learning rate of 0.
    """
    memo: dict[int, Any] = {}
    for own in model.parameters():
        memo[id(own)] = nn.Parameter(own.detach(), requires_grad=own.requires_grad)
    return copy.deepcopy(model, memo)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *red.METHODS,
        *red.POSITION_METHODS,
        *red.KIND_METHODS,
        *known.ADAPTERS,
        *known.MORE_ADAPTERS,
        *neighbours.METHODS,
        *known.WHOLE,
    )
}
KIND_METHODS = tuple(method.name for method in red.KIND_METHODS)
POSITION_METHODS = tuple(method.name for method in red.POSITION_METHODS)
MORE_ADAPTERS = tuple(method.name for method in known.MORE_ADAPTERS)
# The default methods of a step's timing, and all possible ones.
_ASKED = ("linear-probe", *KIND_METHODS, *POSITION_METHODS, *MORE_ADAPTERS)
STEP_METHODS = tuple(name for name in METHODS if name not in _ASKED)
STEP_KNOWN = tuple(name for name in METHODS if name != "linear-probe")
# The default methods of quality, and all possible ones.
QUALITY_DEFAULT = ("red", "red-more", "lora-all", "ia3", "linear-probe", "full")
QUALITY_METHODS = (
    *("red", "naive", *POSITION_METHODS, "lora-all", "ia3", "road", *MORE_ADAPTERS, *KIND_METHODS),
    *(method.name for method in neighbours.METHODS if method.name not in QUALITY_DEFAULT),
    *("linear-probe", "full"),
)
