"""Training a classification head with the edits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..patching.heads import make_trainable


def train_head(model: Any, new_parameters: Iterable[str]) -> list[nn.Parameter]:
    """Make the head of a transformers model trainable, in fp32.

    The head is all parameters outside the model's `base_model`, and all that the checkpoint lacked (a randomly
    initialised pooler must be trained too). In half precision small updates would be lost in it, as in the edits. So
    its modules are converted to fp32 and take their inputs in fp32.

    Args:
        model: a transformers model with a head, patched or edited already, so all else is frozen.
        new_parameters: names of the parameters that were initialised during loading.

    Returns:
        The head's parameters.

    Raises:
        ValueError: the model has no head.
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
