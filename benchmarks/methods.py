"""The fine-tuning methods of the suite, each applied to one model: RED fused, naive and compiled, and its peers.

Every method begins as the frozen model: the same logits before the first step. The vectors of RED are fp32; PEFT keeps
its adapters in fp32 too where the base model is in half precision, as it does by default; biases and whole weights that
are trained keep the model's dtype.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import red_kernels as rk
from red_kernels.edits.find import edit_modules
from red_kernels.finetune.measure import pass_gradients
from red_kernels.patching.naive import naive_edit
from red_kernels.patching.plan import make_plan
from red_kernels.support.require import require

RANK, ALPHA = 8, 16
_QUERIES = ("q_proj", "query", "q", "query_proj", "q_lin")
_KEYS = ("k_proj", "key", "k", "key_proj", "k_lin")
_VALUES = ("v_proj", "value", "v", "value_proj", "v_lin")
_JOINED = ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "in_proj")  # queries, keys and values in one


@dataclass
class Prepared:
    """A model that a method has made ready: call `model(**batch).loss.backward()` inside of `active()`.

    Attributes:
        model: what is called; it may be a wrapper of the model that came.
        trained: what the optimizer steps, the head included; empty for the frozen models without one.
        active: gives a context manager that each step has to run in, forward and backward.
        held: what has to live as long as the model is used this way.
    """

    model: Any
    trained: list[nn.Parameter]
    active: Callable[[], AbstractContextManager[object]] = field(default=contextlib.nullcontext)
    held: object = None

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(own.numel() for own in self.trained)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in the results.
        label: a few words for a table.
        apply: makes a model ready, in place.
        needs: the package that it comes from, if it is an optional one.
    """

    name: str
    label: str
    apply: Callable[[nn.Module], Prepared]
    needs: str | None = None

    def missing(self) -> str | None:
        """Why the method cannot be used here, or None."""
        if self.needs is not None:
            try:
                require(self.needs, self.name)
            except ImportError as error:
                return str(error)
        return None


def prepare(name: str, model: nn.Module, *, head: Iterable[str] = ()) -> Prepared:
    """Make a model ready for a method, in place.

    Args:
        name: one of `METHODS`.
        model: a transformers model that is not patched; a `sister` where the original is needed again.
        head: names of parameters that are trained besides the method's own, such as a fresh classification head. In
            half precision their modules are turned to fp32 and take their inputs in fp32: small updates would be lost.

    Raises:
        ValueError: an unknown method or parameter, or a model that the method does not fit.
        ModuleNotFoundError: a package is missing; the message holds the pip command.
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
                    module.register_forward_pre_hook(_inputs_in_fp32)
                    for each in module.parameters(recurse=False):
                        each.data = each.data.float()
    there = {id(own) for own in prepared.trained}
    for own in head:
        own.requires_grad_(True)
        if id(own) not in there:
            prepared.trained.append(own)


def _inputs_in_fp32(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in arguments
    )


def sister(model: nn.Module) -> nn.Module:
    """A copy of a model whose Parameters are new objects over the same memory; its buffers are copies.

    So many methods can hold one base model at once. Only one that leaves the shared weights as they are may be trained:
    of those here that is all but `full` and `bitfit`, and these too at a learning rate of 0.
    """
    memo: dict[int, Any] = {}
    for own in model.parameters():
        memo[id(own)] = nn.Parameter(own.detach(), requires_grad=own.requires_grad)
    return copy.deepcopy(model, memo)


def edited_sites(model: nn.Module) -> dict[str, int]:
    """Name and width of every site that `rk.patch` edits by default, in the model's order; changes nothing.

    Raises ValueError where it would refuse the model.
    """
    return {site.report.site: site.width for site in make_plan(model, rk.RedConfig()).sites}


def _frozen(model: nn.Module) -> Prepared:
    first = next(iter(edited_sites(model)))
    model.requires_grad_(False)
    pass_gradients(model, [first])
    return Prepared(model, [])


def _frozen_fused(model: nn.Module) -> Prepared:
    """The floor: the fused residual additions and norms without an edit; the backward is the edited model's.

    `rk.disable_edits` would run the library's own layers, so no edit is made the active one.
    """
    rk.patch(model)
    _pass_gradients_unhooked(model.get_submodule(next(iter(rk.edit_parameters(model)))))
    for own in model.parameters():  # the vectors, which nothing reads
        own.requires_grad_(False)
    for edits in edit_modules(model).values():
        edits.selection.chosen = None
    return Prepared(model, [])


def _pass_gradients_unhooked(site: Any) -> None:
    """As `pass_gradients`, without a hook: with another hook than ours a site's output is not handed on to be fused."""
    forward = site.forward

    def passing(*arguments: Any, **options: Any) -> Any:
        output = forward(*arguments, **options)
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        return output

    site.forward = passing


def _red(model: nn.Module) -> Prepared:
    rk.patch(model)
    return Prepared(model, [own for parts in rk.edit_parameters(model).values() for own in parts.values()])


def _naive(model: nn.Module) -> Prepared:
    sites = edited_sites(model)
    return Prepared(model, naive_edit(model, sites, widths=sites).vectors())


def _compiled(inner: Callable[[nn.Module], Prepared]) -> Callable[[nn.Module], Prepared]:
    def apply(model: nn.Module) -> Prepared:
        prepared = inner(model)
        return Prepared(torch.compile(prepared.model, dynamic=False), prepared.trained, prepared.active, prepared.held)

    return apply


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model's blocks by name: those with a layer's number in it, so no head and no pooler."""
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and re.search(r"(?<![^.])\d+(?![^.])", name)
    }


def _named(linears: Mapping[str, nn.Module], *groups: tuple[str, ...]) -> list[str]:
    """The layers whose last name is in one of the groups, or else those that hold queries, keys and values in one."""
    last = {name: name.rpartition(".")[2] for name in linears}
    if all(any(own in group for own in last.values()) for group in groups):
        return [name for name, own in last.items() if any(own in group for group in groups)]
    found = [name for name, own in last.items() if own in _JOINED]
    if not found:
        raise ValueError(f"model: none of its linear layers is called as queries, keys or values are: {list(last)[:8]}")
    return found


def _with_peft(model: nn.Module, config: Any) -> Prepared:
    import peft

    model.requires_grad_(False)
    made: Any = peft.get_peft_model(model, config)
    return Prepared(made, [own for own in made.parameters() if own.requires_grad])


def _transposed(linears: Mapping[str, nn.Module], names: Iterable[str]) -> bool:
    """Whether these layers keep their weight as (in, out), which PEFT asks for."""
    return not any(isinstance(linears[name], nn.Linear) for name in names)


def _lora(every: bool) -> Callable[[nn.Module], Prepared]:
    def apply(model: nn.Module) -> Prepared:
        import peft

        linears = block_linears(model)
        names = list(linears) if every else _named(linears, _QUERIES, _VALUES)
        if not names:
            raise ValueError("model: has no linear layers with a layer's number in their name")
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules=names,
            fan_in_fan_out=_transposed(linears, names),
        )
        return _with_peft(model, config)

    return apply


def _ia3(model: nn.Module) -> Prepared:
    """PEFT's own choice of layers where it has one; else keys, values, and what leads out of each FFN."""
    import peft
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as known

    linears = block_linears(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in known:
        return _with_peft(model, peft.IA3Config(fan_in_fan_out=_transposed(linears, linears)))
    outputs = [name for name in edited_sites(model) if name in linears]
    names = list(dict.fromkeys([*_named(linears, _KEYS, _VALUES), *outputs]))
    config = peft.IA3Config(
        target_modules=names, feedforward_modules=outputs, fan_in_fan_out=_transposed(linears, names)
    )
    return _with_peft(model, config)


def _bitfit(model: nn.Module) -> Prepared:
    """All biases of the model, those of its norms too; a model without any gets one of zeros in each block's linears.

    These are the layers' own biases, added inside of the matrix product.
    """
    model.requires_grad_(False)
    found = [own for name, own in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not found:
        for module in block_linears(model).values():
            if isinstance(module, nn.Linear):
                weight = module.weight
                module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=weight.dtype, device=weight.device))
                found.append(module.bias)
    if not found:
        raise ValueError("model: has neither biases nor linear layers in its blocks that could get one")
    for own in found:
        own.requires_grad_(True)
    return Prepared(model, found)


def _full(model: nn.Module) -> Prepared:
    model.requires_grad_(True)
    return Prepared(model, list(model.parameters()))


def _linear_probe(model: nn.Module) -> Prepared:
    """Without a head that is named: the output projection of a language model, untied from the embeddings, in fp32."""
    own: Any = model
    output = own.get_output_embeddings() if hasattr(own, "get_output_embeddings") else None
    if output is None:
        raise ValueError("head: linear-probe trains nothing but the head, and this model needs it named")
    model.requires_grad_(False)
    dtype = torch.promote_types(output.weight.dtype, torch.float32)
    output.weight = nn.Parameter(output.weight.detach().to(dtype, copy=True))
    own.config.tie_word_embeddings = False
    output.register_forward_pre_hook(_inputs_in_fp32)
    return Prepared(model, [output.weight])


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("frozen-fused", "frozen, fused norms (floor)", _frozen_fused),
        Method("frozen", "frozen", _frozen),
        Method("red", "RED, fused (ours)", _red),
        Method("red-compile", "RED, ours under torch.compile", _compiled(_red)),
        Method("naive", "RED, eager hooks", _naive),
        Method("naive-compile", "RED, hooks under torch.compile", _compiled(_naive)),
        Method("lora-qv", f"LoRA r={RANK}, queries and values", _lora(False), "peft"),
        Method("lora-all", f"LoRA r={RANK}, all linear layers", _lora(True), "peft"),
        Method("ia3", "IA3", _ia3, "peft"),
        Method("bitfit", "BitFit (biases)", _bitfit),
        Method("full", "full fine-tuning", _full),
        Method("linear-probe", "linear probe", _linear_probe),
    )
}
STEP_METHODS = tuple(name for name in METHODS if name != "linear-probe")
QUALITY_METHODS = ("red", "naive", "lora-all", "ia3", "linear-probe", "full")
