"""The conditions under which a fused operation may replace a norm, and take a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from ..backends.arguments import Norm
from ..edits.module import RedEdit, plain_only
from .norm_kinds import NormSpec, could_be_norm, norm_spec

__all__ = [
    "OWN_HOOKS",
    "SPEC",
    "NormSpec",
    "could_be_norm",
    "globally_hooked",
    "is_dense",
    "is_like",
    "is_own",
    "norm_arguments",
    "norm_spec",
    "spec_of",
    "unobserved",
]

OWN_HOOKS: set[Callable[..., Any]] = set()  # of this package: they see a waiting value and ignore it
SPEC = "_red_kernels_norm"  # the attribute of a patched norm with its `NormSpec`


def is_own(hook: Callable[..., Any]) -> bool:
    """Whether a hook is of this package; others need not be hashable."""
    return any(hook is one for one in OWN_HOOKS)


def spec_of(norm: nn.Module) -> NormSpec | None:
    """The formula of a patched norm; None for any other module."""
    found: NormSpec | None = norm.__dict__.get(SPEC)
    return found


def globally_hooked() -> bool:
    """Whether there are hooks for all modules: they may observe or replace any output."""
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


def unobserved(module: nn.Module, own: RedEdit | None = None) -> bool:
    """Whether a module's call is only its class's `forward`: no hooks, no replaced or compiled `forward`.

    The hook of `own`, the edit of its output, does not count.
    """
    hooks = module._forward_hooks
    return not (
        (hooks and (own is None or not all(map(is_own, hooks.values()))))
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def norm_arguments(norm: nn.Module, x: Tensor, residual: Tensor | None, own: RedEdit | None = None) -> Norm | None:
    """The arguments of a fused operation that replaces `norm(residual + x)`, if it fits; else None.

    `own` is the norm's own edit, if the operation applies that too.

    None if the norm is observed or its `forward` replaced, if its parameters are not plain tensors like `x` (sharded,
    quantised, offloaded), or if the norm would return another dtype than its input's.
    """
    spec = spec_of(norm)
    if spec is None or not unobserved(norm, own) or globally_hooked() or plain_only():
        return None
    dtype = x.dtype
    if residual is not None:
        if not is_like(residual, x):
            return None
        if residual.dtype != dtype:
            dtype = torch.promote_types(dtype, residual.dtype)
    if not is_dense(x):
        return None
    parameters = norm._parameters
    weight: Tensor | None = None
    bias: Tensor | None = None
    if spec.weight:
        weight = parameters.get(spec.weight)
        if weight is None or not _is_plain(weight, x, dtype):
            return None
    if spec.bias:
        bias = parameters.get(spec.bias)
        if bias is not None and not _is_plain(bias, x, dtype):
            return None
    offset = spec.offset
    if spec.centered and offset and weight is not None:  # no kernel adds an offset to the weight of a LayerNorm
        weight, offset = weight + offset, 0.0
    if dtype is not torch.float32 and torch.is_autocast_enabled(x.device.type):
        return None  # autocast runs norms in fp32
    eps = spec.epsilon(norm, dtype)
    if type(eps) not in (float, int) or not 0.0 <= eps < math.inf:  # it may be a tensor, trained or not
        return None
    return Norm(weight, bias, eps, offset, spec.centered)


def is_dense(x: Tensor) -> bool:
    """Whether a kernel can read a tensor: not of a subclass, neither sparse nor nested."""
    return type(x) is Tensor and x.layout is torch.strided and not x.is_nested


def is_like(residual: Tensor, x: Tensor) -> bool:
    """Whether a kernel can read a tensor together with `x`, element by element."""
    return is_dense(residual) and residual.shape == x.shape and residual.device == x.device


def _is_plain(vector: Tensor, x: Tensor, dtype: torch.dtype) -> bool:
    kind = type(vector)
    return (
        (kind is nn.Parameter or kind is Tensor)
        and vector.layout is torch.strided
        and vector.dtype == dtype
        and vector.device == x.device
        and vector.shape == x.shape[-1:]
    )
