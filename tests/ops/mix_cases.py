"""Mixes as tests see them: their tensors, the fused call, and the composition a user would write."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from op_cases import ACTIVATIONS, EPS, Results, Tensors, call, leaves, outputs_of, widened
from torch import Tensor

import red_kernels as rk

# Each operation's tensors, in the order of its arguments.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "mix": ("x", "first", "second", "bias"),
    "mix_add": ("x", "residual", "first", "second", "bias"),
    "mix_add_rms_norm": ("x", "residual", "first", "second", "bias", "weight"),
    "mix_add_layer_norm": ("x", "residual", "first", "second", "bias", "weight", "norm_bias"),
}
OPERATIONS = tuple(ARGUMENTS)
VECTORS = ("first", "second", "bias")


def arguments(
    operation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    blocks: int = 0,
    edits: int | None = None,
    mean: float = 0.0,
    norms: torch.dtype | None = None,
    vectors: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensors:
    """Random tensors of an operation; the vectors of reflections have about unit length in each block."""
    draw = torch.Generator().manual_seed(seed)
    d = shape[-1]
    size = (d,) if edits is None else (edits, d)
    streaming = "residual" if "residual" in ARGUMENTS[operation] else "x"
    found: Tensors = {}
    for name in ARGUMENTS[operation]:
        if name in ACTIVATIONS:
            found[name] = (torch.randn(shape, generator=draw) + (mean if name == streaming else 0.0)).to(dtype)
        elif name in VECTORS:
            length = (d // blocks) ** -0.5 if blocks and name != "bias" else 1.0
            found[name] = (torch.randn(size, generator=draw) * length).to(vectors)
        else:
            found[name] = (torch.randn(d, generator=draw) * 0.5 + (name == "weight")).to(norms or dtype)
    return found


def fused(operation: str, tensors: Tensors, **options: Any) -> Any:
    """The public operation."""
    values = [tensors[name] for name in ARGUMENTS[operation]]
    if "norm" in operation:
        values.append(options.pop("eps", EPS))
    return call(getattr(rk, operation), *values, **options)


def eager(
    operation: str,
    tensors: Tensors,
    *,
    blocks: int = 0,
    edit_ids: Tensor | None = None,
    weight_offset: float = 0.0,
    eps: float = EPS,
    factor: Tensor | None = None,
    z_as: Tensor | None = None,
) -> Any:
    """The same in PyTorch's own operations, each rounding to the activations' dtype.

    ``factor`` is the mask of a dropout; with ``z_as`` the norm goes on from this value of ``z``.
    """
    x: Tensor = tensors["x"]

    def row(name: str) -> Any:
        vector = tensors.get(name)
        return vector if vector is None or edit_ids is None else vector[edit_ids]

    first, second, bias = row("first"), row("second"), row("bias")
    if blocks:
        h = _whole(x, x.shape[-1] // blocks)
        moved = h - _reflection(first, h)
        if second is not None:
            moved = moved + _reflection(second, h)
        z = moved.flatten(-2)
    else:
        low, high = x.unflatten(-1, (-1, 2, 32)).unbind(-2)
        z = first * x + second * torch.stack((high, low), -2).flatten(-3)
    z = (z if bias is None else z + bias).to(x.dtype)
    if factor is not None:
        z = z * factor.to(z.dtype)
    if tensors.get("residual") is not None:
        z = tensors["residual"] + z
    if "norm" not in operation:
        return z
    if z_as is not None:
        z = z + (z_as.to(z.dtype) - z).detach()
    weight = tensors["weight"]
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    if "layer_norm" in operation:
        return F.layer_norm(z, z.shape[-1:], weight, tensors["norm_bias"], eps), z
    return F.rms_norm(z, z.shape[-1:], weight, eps), z


def _whole(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (-1, width))


def _reflection(u: Tensor, h: Tensor) -> Tensor:
    u = _whole(u, h.shape[-1])
    return u * (u * h).sum(-1, keepdim=True)


def run(operation: Any, name: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> Results:
    """Results and gradients of all tensors, by name: ``y``, ``z``, ``d x``, ``d first``, ..."""
    asking = leaves(tensors)
    results = outputs_of(operation(name, asking, **options))
    wanted = {key: t for key, t in asking.items() if t is not None}
    found = torch.autograd.grad(results, list(wanted.values()), grads[: len(results)])
    values = dict(zip(("y", "z"), (t.detach() for t in results), strict=False))
    return values | {f"d {key}": gradient for key, gradient in zip(wanted, found, strict=True)}


def truth(name: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> Results:
    """The same from the reference in fp64, which ``gradcheck`` holds to the derivatives."""
    with rk.backend("reference"):
        return run(fused, name, widened(tensors), tuple(g.double() for g in grads), **options)


def exact(name: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> Results:
    """The composition in fp64."""
    return run(eager, name, widened(tensors), tuple(g.double() for g in grads), **options)
