"""T5 blocks: the FFN is a sublayer of its own, last in the block, in the encoder and in the decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..edit_module import RedEdit, call_unedited
from .compose import edit_add_to_next
from .description import Family, Layout

__all__ = ["FAMILIES"]


def _feed_forward(module: Any, own: RedEdit, hidden_states: Tensor) -> Tensor:
    forwarded = call_unedited(module.DenseReluDense, own, module.layer_norm(hidden_states))
    return edit_add_to_next(module, forwarded, hidden_states, own, module.dropout.p, module.dropout.training)


FAMILIES = (
    Family(
        name="T5",
        layers=("T5Block",),
        site="layer.-1.DenseReluDense.wo",
        layouts=(
            Layout(
                key="t5_feed_forward",
                block="layer.-1",
                forward=_feed_forward,
                known={"": ("e101fb6f37b8321d",), "DenseReluDense": ("b2d5a1266ac5ac9a", "5d673be012debc9b")},
                site="DenseReluDense.wo",
                outer="DenseReluDense",
                dropouts=("dropout",),
                fuses="dropout + residual add + {next}",
                alone="dropout + residual add",
                clamps_half=True,
            ),
        ),
        first_norm=("", "layer.0", "layer.0.layer_norm"),
        known={"": ("667788cd056b5d74",), "layer.0": ("281276e33d2b555b",)},
        final_norm="final_layer_norm",
    ),
)
