"""The peers that everybody knows: LoRA, IA3, BitFit, full fine-tuning and a linear probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .frame import Method, Prepared, inputs_in_fp32, with_peft
from .linears import KEYS, QUERIES, VALUES, block_linears, named, transposed
from .red import edited_sites

RANK, ALPHA = 8, 16


def _lora(every: bool) -> Callable[[nn.Module], Prepared]:
    def apply(model: nn.Module) -> Prepared:
        import peft

        linears = block_linears(model)
        names = list(linears) if every else named(linears, QUERIES, VALUES)
        if not names:
            raise ValueError("model: has no linear layers with a layer's number in their name")
        config = peft.LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules=names,
            fan_in_fan_out=transposed(linears, names),
        )
        return with_peft(model, config)

    return apply


def _ia3(model: nn.Module) -> Prepared:
    """PEFT's own choice of layers where it has one; else keys, values, and what leads out of each FFN."""
    import peft
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as known

    linears = block_linears(model)
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in known:
        return with_peft(model, peft.IA3Config(fan_in_fan_out=transposed(linears, linears)))
    outputs = [name for name in edited_sites(model) if name in linears]
    names = list(dict.fromkeys([*named(linears, KEYS, VALUES), *outputs]))
    config = peft.IA3Config(
        target_modules=names, feedforward_modules=outputs, fan_in_fan_out=transposed(linears, names)
    )
    return with_peft(model, config)


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
    output.register_forward_pre_hook(inputs_in_fp32)
    return Prepared(model, [output.weight])


ADAPTERS = (
    Method("lora-qv", f"LoRA r={RANK}, queries and values", _lora(False), "peft"),
    Method("lora-all", f"LoRA r={RANK}, all linear layers", _lora(True), "peft"),
    Method("ia3", "IA3", _ia3, "peft"),
    Method("bitfit", "BitFit (biases)", _bitfit),
)
WHOLE = (
    Method("full", "full fine-tuning", _full),
    Method("linear-probe", "linear probe", _linear_probe),
)
