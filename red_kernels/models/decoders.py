"""Decoder layers with a norm before each sublayer and an FFN that ends in `down_proj`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..edit_module import RedEdit, call_unedited
from .compose import add_then_norm, edit_add_to_next, edit_then_norm
from .description import Family, Layout

__all__ = ["FAMILIES"]

_GATED_MLP = "10d6ac161076c54c"
_PRE_NORM, _WITH_DROPOUT, _NORMS_AROUND = "77b982daba84680c", "0d441bd29df6766c", "420e1c6a99e20e50"


def _pre_norm(
    layer: Any,
    own: RedEdit,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states = layer.input_layernorm(hidden_states)
    hidden_states, _ = layer.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states, residual = add_then_norm(hidden_states, residual, layer.post_attention_layernorm)
    hidden_states = call_unedited(layer.mlp, own, hidden_states)
    return edit_add_to_next(layer, hidden_states, residual, own)


def _pre_norm_with_dropout(
    layer: Any,
    own: RedEdit,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states = layer.input_layernorm(hidden_states)
    hidden_states, _ = layer.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    drop: nn.Dropout = layer.resid_attn_dropout
    hidden_states, residual = add_then_norm(
        hidden_states, residual, layer.post_attention_layernorm, drop.p, drop.training
    )
    hidden_states = call_unedited(layer.mlp, own, hidden_states)
    drop = layer.resid_mlp_dropout
    return edit_add_to_next(layer, hidden_states, residual, own, drop.p, drop.training)


def _norms_around(
    layer: Any,
    own: RedEdit,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states = layer.input_layernorm(hidden_states)
    hidden_states, _ = layer.self_attn(
        hidden_states=hidden_states,
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        **kwargs,
    )
    hidden_states = layer.post_attention_layernorm(hidden_states)
    hidden_states, residual = add_then_norm(hidden_states, residual, layer.pre_feedforward_layernorm)
    hidden_states = call_unedited(layer.mlp, own, hidden_states)
    hidden_states = edit_then_norm(hidden_states, None, own, layer.post_feedforward_layernorm)
    return edit_add_to_next(layer, hidden_states, residual, None)


FAMILIES = (
    Family(
        name="Llama, Mistral, Qwen2, Qwen3",
        layers=("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
        site="mlp.down_proj",
        layouts=(
            Layout(
                key="pre_norm",
                forward=_pre_norm,
                known={"": (_PRE_NORM,), "mlp": (_GATED_MLP,)},
                site="mlp.down_proj",
                outer="mlp",
                fuses="residual add + {next}",
                alone="residual add",
            ),
        ),
        first_norm=("", "input_layernorm"),
        known={"": (_PRE_NORM,)},
        final_norm="norm",
    ),
    Family(
        name="Phi-3",
        layers=("Phi3DecoderLayer",),
        site="mlp.down_proj",
        layouts=(
            Layout(
                key="pre_norm_with_dropout",
                forward=_pre_norm_with_dropout,
                known={"": (_WITH_DROPOUT,), "mlp": ("8fd1184e036c31a8",)},
                site="mlp.down_proj",
                outer="mlp",
                dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
                fuses="dropout + residual add + {next}",
                alone="dropout + residual add",
            ),
        ),
        first_norm=("", "input_layernorm"),
        known={"": (_WITH_DROPOUT,)},
        final_norm="norm",
    ),
    Family(
        name="Gemma 2, Gemma 3",
        layers=("Gemma2DecoderLayer", "Gemma3DecoderLayer"),
        site="mlp.down_proj",
        layouts=(
            Layout(
                key="norms_around",
                forward=_norms_around,
                known={"": (_NORMS_AROUND,), "mlp": (_GATED_MLP,)},
                site="mlp.down_proj",
                outer="mlp",
                fuses="its own RMSNorm; then residual add + {next}",
                alone="its own RMSNorm",
                norm="post_feedforward_layernorm",
            ),
        ),
        first_norm=("", "input_layernorm"),
        known={"": (_NORMS_AROUND,)},
        final_norm="norm",
    ),
)
