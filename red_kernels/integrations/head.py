"""Training a classification head beside the edits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def train_head(model: Any, new_parameters: Iterable[str]) -> list[nn.Parameter]:
    """Make the head of a transformers model trainable, in fp32.

    The head is whatever lies outside the model's `base_model`, and whatever the checkpoint did not have (a pooler that
    was drawn at random has to be trained too). In half precision small updates would be lost in it, as they would in
    the edits; its modules are turned to fp32 and take their inputs in fp32.

    Args:
        model: a transformers model with a head, patched or edited already, so that all else is frozen.
        new_parameters: names of the parameters that were initialised anew while loading.

    Returns:
        The head's parameters.

    Raises:
        ValueError: the model has nothing that could be called a head.
    """
    inner = {id(own) for own in model.base_model.parameters()} if model.base_model is not model else set()
    new = set(new_parameters)
    head = []
    for prefix, module in model.named_modules():
        names = {f"{prefix}.{name}" if prefix else name: own for name, own in module.named_parameters(recurse=False)}
        chosen = {name: own for name, own in names.items() if (inner and id(own) not in inner) or name in new}
        if not chosen or prefix.endswith(".red_edit"):
            continue
        for own in chosen.values():
            own.data = own.data.float()
            own.requires_grad_(True)
            head.append(own)
        module.register_forward_pre_hook(_inputs_in_fp32)
    if not head:
        raise ValueError(f"model: {type(model).__name__} has no head to train for classification")
    return head


def _inputs_in_fp32(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in arguments
    )
