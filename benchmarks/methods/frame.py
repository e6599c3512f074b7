"""What a method is, and what it gives back."""

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
    """A model that a method has made ready: call `model(**batch).loss.backward()` inside of `active()`.

    Attributes:
        model: what is called; it may be a wrapper of the model that came.
        trained: what the optimizer steps, the head included; empty for the frozen models without one.
        active: gives a context manager that each step has to run in, forward and backward.
        held: what has to live as long as the model is used this way.
        fixed: tensors that the method adds and does not train, such as random projections or lists of indices.
        as_frozen: whether it begins as the frozen model.
    """

    model: Any
    trained: list[nn.Parameter]
    active: Callable[[], AbstractContextManager[object]] = field(default=contextlib.nullcontext)
    held: object = None
    fixed: list[Tensor] = field(default_factory=list)
    as_frozen: bool = True

    @property
    def trainable(self) -> int:
        """How many numbers are trained."""
        return sum(own.numel() for own in self.trained)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: in the results.
        label: a few words for a table.
        apply: makes a model ready, in place. It is called with the model, and with batches too if `looks`.
        needs: the package that it comes from, if it is an optional one.
        looks: whether it looks at batches of the task before it trains.
    """

    name: str
    label: str
    apply: Callable[..., Prepared]
    needs: str | None = None
    looks: bool = False

    def missing(self) -> str | None:
        """Why the method cannot be used here, or None."""
        if self.needs is not None:
            try:
                require(self.needs, self.name)
            except ImportError as error:
                return str(error)
        return None


def with_peft(model: nn.Module, config: Any) -> Prepared:
    """The model with an adapter of PEFT's; the rest of it is frozen."""
    import peft

    model.requires_grad_(False)
    made: Any = peft.get_peft_model(model, config)
    return Prepared(made, [own for own in made.parameters() if own.requires_grad])


def inputs_in_fp32(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook for a module whose parameters were turned to fp32."""
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in arguments
    )
