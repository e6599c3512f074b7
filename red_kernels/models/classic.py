"""GPT-2 and OPT layers, BERT-like layers with a norm behind each sublayer, and ViT."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..edit_module import RedEdit, call_unedited
from .compose import add_then_norm, edit_add_to_next, edit_then_norm
from .description import Family, Layout

__all__ = ["FAMILIES"]

_GPT2, _OPT, _VIT = "9bbe2073f8394bdd", "e713efe33a94e16f", "04639e1c57979b6e"


def _gpt2(
    layer: Any,
    own: RedEdit,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states = layer.ln_1(hidden_states)
    hidden_states, _ = layer.attn(
        hidden_states,
        past_key_values=past_key_values,
        attention_mask=attention_mask,
        use_cache=use_cache,
        **kwargs,
    )
    if encoder_hidden_states is not None:
        if not hasattr(layer, "crossattention"):
            raise ValueError(
                "encoder_hidden_states was given to a layer without cross-attention (config.add_cross_attention)"
            )
        hidden_states, residual = add_then_norm(hidden_states, residual, layer.ln_cross_attn)
        hidden_states, _ = layer.crossattention(
            hidden_states,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
    hidden_states, residual = add_then_norm(hidden_states, residual, layer.ln_2)
    # The FFN drops out its own output, behind the site: that belongs behind the edit.
    mlp = layer.mlp
    hidden_states = call_unedited(mlp.c_proj, own, mlp.act(mlp.c_fc(hidden_states)))
    return edit_add_to_next(layer, hidden_states, residual, own, mlp.dropout.p, mlp.dropout.training)


def _opt_pre_norm(
    layer: Any,
    own: RedEdit,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states, _ = layer.self_attn(
        hidden_states=layer.self_attn_layer_norm(hidden_states),
        past_key_values=past_key_values,
        position_ids=position_ids,
        attention_mask=attention_mask,
        **kwargs,
    )
    p, training = layer.dropout, layer.training
    hidden_states, residual = add_then_norm(hidden_states, residual, layer.final_layer_norm, p, training)
    hidden_states = _opt_feed_forward(layer, own, hidden_states)
    return edit_add_to_next(layer, hidden_states, residual, own, p, training)


def _opt_post_norm(
    layer: Any,
    own: RedEdit,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states, _ = layer.self_attn(
        hidden_states=hidden_states,
        past_key_values=past_key_values,
        position_ids=position_ids,
        attention_mask=attention_mask,
        **kwargs,
    )
    p, training = layer.dropout, layer.training
    residual = edit_then_norm(hidden_states, residual, None, layer.self_attn_layer_norm, p, training)
    hidden_states = _opt_feed_forward(layer, own, residual)
    return edit_then_norm(hidden_states, residual, own, layer.final_layer_norm, p, training)


def _opt_feed_forward(layer: Any, own: RedEdit, hidden_states: Tensor) -> Tensor:
    # The library runs its FFN on rows; so do hooks on these modules find them.
    rows = layer.activation_fn(layer.fc1(hidden_states.reshape(-1, hidden_states.size(-1))))
    return call_unedited(layer.fc2, own, rows).view(hidden_states.shape)


def _post_norm_output(module: Any, own: RedEdit, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    hidden_states = call_unedited(module.dense, own, hidden_states)
    drop = module.dropout
    return edit_then_norm(hidden_states, input_tensor, own, module.LayerNorm, drop.p, drop.training)


def _vit(
    layer: Any, own: RedEdit, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    residual = hidden_states
    hidden_states = layer.layernorm_before(hidden_states)
    hidden_states, _ = layer.attention(hidden_states, attention_mask, **kwargs)
    p, training = layer.dropout.p, layer.dropout.training
    hidden_states, residual = add_then_norm(hidden_states, residual, layer.layernorm_after, p, training)
    hidden_states = call_unedited(layer.mlp, own, hidden_states)
    return edit_add_to_next(layer, hidden_states, residual, own, p, training)


FAMILIES = (
    Family(
        name="GPT-2",
        layers=("GPT2Block",),
        site="mlp.c_proj",
        layouts=(
            Layout(
                key="gpt2",
                forward=_gpt2,
                known={"": (_GPT2,), "mlp": ("793bcfd566f7f8b4",)},
                site="mlp.c_proj",
                outer="mlp",
                dropouts=("mlp.dropout",),
                fuses="dropout + residual add + {next}",
                alone="dropout + residual add",
            ),
        ),
        first_norm=("", "ln_1"),
        known={"": (_GPT2,)},
        final_norm="ln_f",
    ),
    Family(
        name="OPT",
        layers=("OPTDecoderLayer",),
        site="fc2",
        layouts=(
            Layout(
                key="opt_pre_norm",
                forward=_opt_pre_norm,
                known={"": (_OPT,)},
                site="fc2",
                outer="fc2",
                fuses="dropout + residual add + {next}",
                alone="dropout + residual add",
                when=("do_layer_norm_before", True),
            ),
            Layout(
                key="opt_post_norm",
                forward=_opt_post_norm,
                known={"": (_OPT,)},
                site="fc2",
                outer="fc2",
                fuses="dropout + residual add + LayerNorm",
                bare="dropout + residual add",
                norm="final_layer_norm",
                when=("do_layer_norm_before", False),
            ),
        ),
        first_norm=("", "self_attn_layer_norm"),
        known={"": (_OPT,)},
        final_norm="final_layer_norm",
    ),
    Family(
        name="BERT, RoBERTa",
        layers=("BertLayer", "RobertaLayer"),
        site="output.dense",
        layouts=(
            Layout(
                key="post_norm_output",
                block="output",
                forward=_post_norm_output,
                known={"": ("dc2f966459a0afc8",)},
                site="dense",
                outer="dense",
                dropouts=("dropout",),
                fuses="dropout + residual add + LayerNorm",
                bare="dropout + residual add",
                norm="LayerNorm",
            ),
        ),
    ),
    Family(
        name="ViT",
        layers=("ViTLayer",),
        site="mlp.fc2",
        layouts=(
            Layout(
                key="vit",
                forward=_vit,
                known={"": (_VIT,), "mlp": ("06f472a6a2c912ad",)},
                site="mlp.fc2",
                outer="mlp",
                dropouts=("dropout",),
                fuses="dropout + residual add + {next}",
                alone="dropout + residual add",
            ),
        ),
        first_norm=("", "layernorm_before"),
        known={"": (_VIT,)},
        final_norm="layernorm",
    ),
)
