"""Comparing the results of all implementations of a case, values and gradients, before it is timed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .implementations.eager import composed
from .inputs import Inputs
from .operations import Arguments, Edit, Norm
from .timing import Candidate, gradients

NAMES = ("x", "residual", "scale", "bias")


def evaluate(candidate: Candidate, inputs: Inputs) -> list[Tensor]:
    """Results and gradients of the first set."""
    with candidate.active():
        results = candidate.forward(inputs, 0)
        found = gradients(inputs.operation, results, inputs, 0)
    return [*(result.detach() for result in results), *found]


def exact(inputs: Inputs) -> list[Tensor]:
    """The same in fp64, by the plain definition."""
    arguments, upstream = inputs[0]
    wide = Arguments(*(own.detach().double().requires_grad_(own.requires_grad) for own in arguments))
    results = composed(Edit(), Norm(), inputs.operation)(wide)
    found = torch.autograd.grad(
        results, inputs.operation.differentiated(wide), [gradient.double() for gradient in upstream]
    )
    return [*(result.detach() for result in results), *found]


def differing(candidates: Mapping[str, Candidate], inputs: Inputs) -> dict[str, str]:
    """Implementation to its fault; empty if all compute the same mathematics.

    By norms against fp64: an implementation may have the error of eager PyTorch plus a few roundings of the dtype. For
    sums over rows the bound grows by the root of their number, as some implementations add one row after the other.
    """
    expected = exact(inputs)
    arguments, upstream = inputs[0]
    errors = {name: _errors(evaluate(candidate, inputs), expected) for name, candidate in candidates.items()}
    rows, rounding = arguments.x.shape[0], torch.finfo(arguments.x.dtype).eps
    labels = [f"result {place}" for place in range(len(upstream))]
    labels += [f"gradient of {name}" for name in NAMES if name != "residual" or inputs.operation.residual]
    found: dict[str, str] = {}
    for name, own in errors.items():
        for place, (label, error) in enumerate(zip(labels, own, strict=True)):
            bound = errors["eager"][place] + 4 * rounding
            if label.endswith(("scale", "bias")):
                bound += rows**0.5 * torch.finfo(torch.float32).eps
            if not error <= bound:
                found.setdefault(name, f"{label} differs by {error:.1e} of its size, expected at most {bound:.1e}")
    return found


def _errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((one.double() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
