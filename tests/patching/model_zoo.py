"""Tiny random models of every family the patch knows, what they eat, and the plain composition they are held to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 32, 48, 3, 4, 61

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "word_embed_proj_dim": HIDDEN,
    "ffn_dim": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_ff": INNER,
    "d_kv": HIDDEN // HEADS,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS - 1,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_inner": INNER,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA = {"head_dim": HIDDEN // HEADS, "sliding_window": 4, "attention_dropout": 0.0}
_VIT = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

_MIXTURE = {**_DECODER, "num_experts_per_tok": 2}
_DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": HIDDEN,
    "hidden_dim": INNER,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
_NEOX = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FALCON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MODERNBERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "local_attention": 4,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
    "attention_dropout": 0.0,
}
_DEBERTA = {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16}

# name -> (configuration class, model class, arguments, the argument of the dropout behind the site)
_RECIPES: dict[str, tuple[str, str, dict[str, Any], str | None]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER, None),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_DECODER, "sliding_window": 4}, None),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER, None),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": HIDDEN // HEADS}, None),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_DECODER, **_GEMMA}, None),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_DECODER, **_GEMMA}, None),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _DECODER, "resid_pdrop"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2, "resid_pdrop"),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT, "dropout"),
    "opt_post_norm": ("OPTConfig", "OPTForCausalLM", {**_OPT, "do_layer_norm_before": False}, "dropout"),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER, "hidden_dropout_prob"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _ENCODER, "hidden_dropout_prob"),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5, "dropout_rate"),
    "t5_gated": ("T5Config", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu"}, "dropout_rate"),
    "vit": ("ViTConfig", "ViTForImageClassification", _VIT, "hidden_dropout_prob"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_MIXTURE, "num_local_experts": 4}, None),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_MIXTURE, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
        None,
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_MIXTURE, "num_experts": 4, "moe_intermediate_size": 16, "head_dim": HIDDEN // HEADS},
        None,
    ),
    "deberta": ("DebertaConfig", "DebertaForSequenceClassification", _DEBERTA, "hidden_dropout_prob"),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {**_DEBERTA, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
        "hidden_dropout_prob",
    ),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", _DISTILBERT, "dropout"),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX, "hidden_dropout"),
    "neox_sequential": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_NEOX, "use_parallel_residual": False},
        "hidden_dropout",
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", _FALCON, "hidden_dropout"),
    "falcon_new": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "hidden_dropout",
    ),
    "falcon_sequential": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "parallel_attn": False, "alibi": True, "bias": True, "multi_query": False},
        "hidden_dropout",
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_NEOX, "partial_rotary_factor": 0.5}, "resid_pdrop"),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", _MODERNBERT, None),
}
NAMES = tuple(_RECIPES)
POST_NORM = ("bert", "roberta", "opt_post_norm", "deberta", "deberta_v2", "distilbert")
GENERATING = tuple(
    name
    for name in NAMES
    if name not in ("bert", "roberta", "vit", "deberta", "deberta_v2", "distilbert", "modernbert")
)
DROPPING = tuple(name for name, recipe in _RECIPES.items() if recipe[3] is not None)
HANDING_ON = tuple(name for name in NAMES if name not in POST_NORM)
PARALLEL = ("neox", "falcon", "falcon_new", "phi")  # attention and FFN side by side
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
CLASSIFIERS = ("roberta", "deberta", "deberta_v2")
SITES = {
    "mixtral": "model.layers.{}.mlp",
    "qwen2_moe": "model.layers.{}.mlp",
    "qwen3_moe": "model.layers.{}.mlp",
    "deberta": "deberta.encoder.layer.{}.output.dense",
    "deberta_v2": "deberta.encoder.layer.{}.output.dense",
    "distilbert": "distilbert.transformer.layer.{}.ffn.lin2",
    "neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "neox_sequential": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "falcon": "transformer.h.{}.mlp.dense_4h_to_h",
    "falcon_new": "transformer.h.{}.mlp.dense_4h_to_h",
    "falcon_sequential": "transformer.h.{}.mlp.dense_4h_to_h",
    "phi": "model.layers.{}.mlp.fc2",
    "modernbert": "model.layers.{}.mlp.Wo",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "opt": "model.decoder.layers.{}.fc2",
    "opt_post_norm": "model.decoder.layers.{}.fc2",
    "bert": "bert.encoder.layer.{}.output.dense",
    "roberta": "roberta.encoder.layer.{}.output.dense",
    "vit": "vit.layers.{}.mlp.fc2",
}


def tiny(name: str, *, seed: int = 0, dropout: float = 0.0, **changes: Any) -> nn.Module:
    """A tiny model in eval mode, all of its vectors random: a norm's weight of ones would hide a missing one."""
    config_name, model_name, arguments, dropout_name = _RECIPES[name]
    arguments = {**arguments, **changes}
    if dropout:
        assert dropout_name is not None
        arguments[dropout_name] = dropout
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**arguments))
    if name in MIXTURES:
        model.set_experts_implementation("eager")  # the others have no float64
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def sites(name: str) -> list[str]:
    """The names of the model's FFN sites, written down by hand."""
    if name.startswith("t5"):
        encoder = [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(LAYERS)]
        return encoder + [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(LAYERS - 1)]
    return [SITES.get(name, "model.layers.{}.mlp.down_proj").format(i) for i in range(LAYERS)]


def inputs(name: str, *, seed: int = 2, batch: int = 2, length: int = 7) -> dict[str, Tensor]:
    """A batch with labels, so that the model gives its own loss."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(batch, 3, 12, 12, generator=generator)
        return {"pixel_values": pixels, "labels": torch.randint(0, 3, (batch,), generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    labels = ids.clone() if name not in CLASSIFIERS else torch.randint(0, 2, (batch,), generator=generator)
    mask = torch.ones_like(ids)
    if name == "bert":
        mask[0, length - 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def vectors(names: Iterable[str], width: int = HIDDEN, *, seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """Trained-looking edits: scales away from 1 and some below 0, biases away from 0."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: {
            "scale": 1.0 + 0.5 * torch.randn(width, generator=generator),
            "bias": 0.3 * torch.randn(width, generator=generator),
        }
        for site in names
    }


def fill(parameters: dict[str, dict[str, nn.Parameter]], values: dict[str, dict[str, Tensor]]) -> None:
    """Copy values into a patched model's vectors."""
    with torch.no_grad():
        for site, parts in parameters.items():
            for part, parameter in parts.items():
                parameter.copy_(values[site][part])


class Unfused:
    """A copy of a model with the edits as plain forward hooks: the composition that every fused one is held to.

    `inside` has the sites that are no module's output but the residual stream behind an attention: to the names of the
    layer and of the norm that reads that stream.
    """

    def __init__(
        self,
        model: nn.Module,
        values: dict[str, dict[str, Tensor]],
        inside: dict[str, tuple[str, str]] | None = None,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.model.requires_grad_(False)
        dtype = torch.float64 if next(self.model.parameters()).dtype == torch.float64 else torch.float32
        self.vectors = {
            site: {part: nn.Parameter(value.to(dtype, copy=True)) for part, value in parts.items()}
            for site, parts in values.items()
        }
        for site, parts in self.vectors.items():
            if inside and site in inside:
                layer, norm = (self.model.get_submodule(name) for name in inside[site])
                _edit_stream(layer, norm, parts)
            else:
                self.model.get_submodule(site).register_forward_hook(_plain_edit(parts))

    def gradients(self) -> dict[str, Tensor]:
        return {
            f"{site}.{part}": vector.grad.clone()
            for site, parts in self.vectors.items()
            for part, vector in parts.items()
            if vector.grad is not None
        }


def _plain_edit(parts: dict[str, nn.Parameter]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return edited(output[0], parts), *output[1:]
        return edited(output, parts)

    return hook


def _edit_stream(layer: nn.Module, norm: nn.Module, parts: dict[str, nn.Parameter]) -> None:
    """Edit the residual stream where `norm` reads it: the norm gets the edit, the layer's output what it changed."""
    changes: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stream = edited(args[0], parts)
        changes.append(stream - args[0])
        return (stream,)

    def add_change(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return output[0] + changes.pop().view_as(output[0]), *output[1:]
        return output + changes.pop().view_as(output)  # some run their FFN on rows

    norm.register_forward_pre_hook(read)
    layer.register_forward_hook(add_change, prepend=True)


def edited(output: Tensor, parts: dict[str, nn.Parameter]) -> Tensor:
    """The formulas of the method, in at least fp32."""
    value = output.to(torch.promote_types(output.dtype, torch.float32))
    if "scale" in parts:
        value = value * parts["scale"]
    if "bias" in parts:
        value = value + parts["bias"]
    if "norm_weight" in parts:
        value = nn.functional.layer_norm(value, value.shape[-1:], parts["norm_weight"], parts["norm_bias"], 1e-5)
    return value.to(output.dtype)


def exact(
    model: nn.Module, values: dict[str, dict[str, Tensor]], inside: dict[str, tuple[str, str]] | None = None
) -> Unfused:
    """The unfused composition in float64, its norms too, which transformers computes in float32 at most."""
    truth = Unfused(copy.deepcopy(model).double(), values, inside)
    for module in truth.model.modules():
        kind = type(module).__name__
        if kind == "DebertaLayerNorm":
            module.forward = _exact_layer_norm(module)
        elif kind.endswith("RMSNorm") or kind == "T5LayerNorm":
            offset = 1.0 if kind.startswith("Gemma") else 0.0
            module.forward = _exact_rms_norm(module, offset)
    return truth


def _exact_rms_norm(module: Any, offset: float) -> Callable[[Tensor], Tensor]:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon

    def forward(hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps) * (module.weight + offset)

    return forward


def _exact_layer_norm(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(hidden: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden, hidden.shape[-1:], module.weight, module.bias, module.variance_epsilon)

    return forward


def gradients(parameters: dict[str, dict[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The gradients of a patched model's vectors, by `<site>.<part>`."""
    return {
        f"{site}.{part}": vector.grad.clone()
        for site, parts in parameters.items()
        for part, vector in parts.items()
        if vector.grad is not None
    }


def assert_as_exact(what: str, fused: Tensor, unfused: Tensor, truth: Tensor, dtype: torch.dtype | None = None) -> None:
    """Hold `fused` to `truth` (float64): its error is at most that of `unfused` and a rounding step.

    Errors are norms of the whole difference, as the largest single one of a handful of values is left to chance. Both
    are sums over many roundings that fall differently, so "at most" is taken with a factor of 2. The step is that of
    `dtype`, in which the model computes; by default, of what came out.
    """
    truth = truth.detach()
    step = torch.finfo(dtype or unfused.dtype).eps * truth.norm().item()
    bound = 2.0 * (unfused.detach().double() - truth).norm().item() + step
    error = (fused.detach().double() - truth).norm().item()
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e}"
