"""A method, and its result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from red_kernels.support.require import require

Batches = Iterable[Mapping[str, Tensor]]


@dataclass
class Prepared:
    """A model prepared by a method: call `model(**batch).loss.backward()` inside `active()`.

    Attributes:
        model: the model to call; it may be a wrapper of the given one.
        trained: the optimizer's parameters, the head included; empty for the frozen models without one.
        active: returns a context manager around each step, forward and backward.
        held: objects that must live as long as the model is used this way.
        fixed: tensors that the method adds without training, for example random projections or lists of indices.
        as_frozen: whether it starts as the frozen model.
    """

    model: Any
    trained: list[nn.Parameter]
    active: Callable[[], AbstractContextManager[object]] = field(default=contextlib.nullcontext)
    held: object = None
    fixed: list[Tensor] = field(default_factory=list)
    as_frozen: bool = True

    @property
    def trainable(self) -> int:
        """The number of trained parameters."""
        return sum(own.numel() for own in self.trained)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in the results.
        label: a few words for a table.
        apply: prepares a model, in place. It is called with the model, and with batches too if `looks`.
        needs: the optional package that it comes from.
        looks: whether it needs batches of the task before it trains.
    """

    name: str
    label: str
    apply: Callable[..., Prepared]
    needs: str | None = None
    looks: bool = False

    def missing(self) -> str | None:
        """Why the method is unusable here, or None."""
        if self.needs is not None:
            try:
                require(self.needs, self.name)
            except ImportError as error:
                return str(error)
        return None


def with_peft(model: nn.Module, config: Any) -> Prepared:
    """The model with an adapter of PEFT; the rest of it is frozen."""
    import peft

    model.requires_grad_(False)
    made: Any = peft.get_peft_model(model, config)
    return Prepared(made, [own for own in made.parameters() if own.requires_grad])


def inputs_in_fp32(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook for a module whose parameters were converted to fp32."""
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in arguments
    )
