"""Training a classification head beside the edits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..patching.heads import make_trainable


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
    head = {
        name: own
        for name, own in model.named_parameters()
        if ".red_edit." not in name and ((inner and id(own) not in inner) or name in new)
    }
    if not head:
        raise ValueError(f"model: {type(model).__name__} has no head to train for classification")
    make_trainable(model, head)
    return list(head.values())
