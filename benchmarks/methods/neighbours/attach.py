"""Small modules attached to the modules of a frozen model, by forward hooks.

They compute in fp32, like PEFT's adapters on half-precision weights: the sum is rounded once.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

NAME = "neighbour"  # the added module's name


def beside(module: nn.Module, delta: nn.Module) -> None:
    """Make a module return `module(x) + delta(x)`; `delta` becomes a part of it.

    Args:
        module: a linear layer, of inputs of shape `(..., in)`.
        delta: maps an fp32 tensor of that shape to one of shape `(..., out)`.
    """
    module.add_module(NAME, delta)
    module.register_forward_hook(functools.partial(_add_of_input, delta))


def behind(module: nn.Module, delta: nn.Module) -> None:
    """Make a module return `y + delta(y)`, y its own output of shape `(..., out)`; `delta` becomes a part of it."""
    module.add_module(NAME, delta)
    module.register_forward_hook(functools.partial(_add_of_output, delta))


def _add_of_input(delta: nn.Module, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return (output + delta(arguments[0].float())).to(output.dtype)


def _add_of_output(delta: nn.Module, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return (output + delta(output.float())).to(output.dtype)
