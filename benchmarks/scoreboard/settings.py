"""The settings of a run of the scoreboard; names and defaults are the scoreboard's own."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
WARM_UP = 0.1  # of the steps
_COUNTS = ("max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps")


@dataclass(frozen=True)
class Settings:
    """The training and evaluation of a method, as in PEFT's `MetaMathQA` comparison.

    Attributes:
        model_id: a hub id or a folder.
        dtype: of the base model, one of `DTYPES`.
        max_seq_length: tokens of a question with its answer; the rest is cut.
        batch_size, batch_size_eval: items in a training step, and in a call of `generate`.
        max_steps, eval_steps: optimizer steps, and those between evaluations on the validation part.
        learning_rate: the highest one: it rises over a tenth of the steps, then falls along a cosine.
        weight_decay: of AdamW. The scoreboard's default is 0.1; it would pull a scale toward 0 instead of 1.
        grad_norm_clip: the largest norm of the gradient; 0 for no limit.
        max_length, max_new_tokens: tokens of a question with its generated answer, and of that answer.
        query_template: the prompt of a question, with `{query}` in it.
        seed: of a method's random values.
    """

    model_id: str
    dtype: str = "bfloat16"
    max_seq_length: int = 768
    batch_size: int = 4
    batch_size_eval: int = 50
    max_steps: int = 5000
    eval_steps: int = 250
    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    grad_norm_clip: float = 1.0
    max_length: int = 800
    max_new_tokens: int = 300
    query_template: str = field(default=TEMPLATE)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value out of range."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(map(repr, DTYPES))}")
        for name in (*_COUNTS, "max_length", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.eval_steps > self.max_steps:
            raise ValueError(f"eval_steps: got {self.eval_steps}, expected at most max_steps, {self.max_steps}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: got {self.learning_rate}, expected a number above 0")
        for name in ("weight_decay", "grad_norm_clip"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if "{query}" not in self.query_template:
            raise ValueError(f"query_template: got {self.query_template!r}, expected text with {{query}} in it")

    def said(self) -> dict[str, Any]:
        """The entry `train_config` of a result."""
        own = asdict(self)
        optimizer = {"lr": own.pop("learning_rate"), "weight_decay": own.pop("weight_decay")}
        generation = {name: own.pop(name) for name in ("max_length", "max_new_tokens")}
        return {
            **own,
            "compile": False,
            "use_gc": False,
            "optimizer_type": "AdamW",
            "optimizer_kwargs": optimizer,
            "lr_scheduler": "cosine",
            "use_amp": False,
            "autocast_adapter_dtype": True,
            "generation_kwargs": generation,
            "attn_implementation": None,
            "init_kv_cache_prefix": None,
        }
