"""The common peers: LoRA, IA3, BitFit, BEFT, LN-tuning, full fine-tuning and a linear probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from red_kernels.fusion.norm_kinds import could_be_norm, norm_spec

from .frame import Method, Prepared, inputs_in_fp32, with_peft
from .linears import JOINED, KEYS, QUERIES, VALUES, block_linears, in_block, named, transposed
from .red import edited_sites

RANK, ALPHA = 8, 16


def _lora(every: bool, rank: int = RANK) -> Callable[[nn.Module], Prepared]:
    def apply(model: nn.Module) -> Prepared:
        import peft

        linears = block_linears(model)
        names = list(linears) if every else named(linears, QUERIES, VALUES)
        if not names:
            raise ValueError("model: has no linear layers with a layer number in their name")
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank * ALPHA // RANK,
            lora_dropout=0.0,
            target_modules=names,
            fan_in_fan_out=transposed(linears, names),
        )
        return with_peft(model, config)

    return apply


def _ia3(model: nn.Module) -> Prepared:
    """PEFT's own choice of layers if it has one; else keys, values, and the last projection of each FFN."""
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
    """All biases of the model, those of its norms too; without any, new zero biases in the blocks' linear layers."""
    found = [own for name, own in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    return _trained_alone(model, found or _zero_biases(block_linears(model).values()))


def _beft(model: nn.Module) -> Prepared:
    """Only the biases of the value layers (BEFT); without any, new zero biases."""
    linears = block_linears(model)
    names = named(linears, VALUES)
    if any(name.rpartition(".")[2] in JOINED for name in names):
        raise ValueError(
            "model: one layer gives its values with queries and keys, but beft trains only the values' bias"
        )
    values = [linears[name] for name in names]
    found = [own for layer in values if isinstance(own := getattr(layer, "bias", None), nn.Parameter)]
    return _trained_alone(model, found or _zero_biases(values))


def _zero_biases(linears: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Give linear layers zero biases. They are the layers' own, added inside the matrix product."""
    found = []
    for module in linears:
        if isinstance(module, nn.Linear):
            weight = module.weight
            module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=weight.dtype, device=weight.device))
            found.append(module.bias)
    if not found:
        raise ValueError("model: has neither biases nor linear layers in its blocks")
    return found


def _trained_alone(model: nn.Module, trained: list[nn.Parameter]) -> Prepared:
    model.requires_grad_(False)
    for own in trained:
        own.requires_grad_(True)
    return Prepared(model, trained)


def _ln_tuning(model: nn.Module) -> Prepared:
    """Weights and biases of the norms in the blocks, by PEFT, which trains copies of them."""
    import peft

    names = [
        name for name, module in model.named_modules() if in_block(name) and could_be_norm(module) and norm_spec(module)
    ]
    if not names:
        raise ValueError("model: its blocks have no norms")
    return with_peft(model, peft.LNTuningConfig(target_modules=names))


def _full(model: nn.Module) -> Prepared:
    model.requires_grad_(True)
    return Prepared(model, list(model.parameters()))


def _linear_probe(model: nn.Module) -> Prepared:
    """Without a named head: the output projection of a language model, untied from the embeddings, in fp32."""
    own: Any = model
    output = own.get_output_embeddings() if hasattr(own, "get_output_embeddings") else None
    if output is None:
        raise ValueError("head: linear-probe trains only the head, so this model needs its name")
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
# Measured on request.
MORE_ADAPTERS = (
    Method("lora-all-r1", "LoRA r=1, all linear layers", _lora(True, 1), "peft"),
    Method("beft", "BEFT (biases of values)", _beft),
    Method("ln-tuning", "LN-tuning (norms)", _ln_tuning, "peft"),
)
WHOLE = (
    Method("full", "full fine-tuning", _full),
    Method("linear-probe", "linear probe", _linear_probe),
)
