"""Facts about a module from outside: the width of its output, its device, its wrapper, its experts."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..fusion.norms import could_be_norm
from ..support.text import listed

__all__ = ["device_of", "experts_in", "experts_remark", "input_width", "linear_patterns", "output_width"]


def output_width(module: nn.Module) -> int | None:
    """The width of a module's one output tensor, if known: linear layers of any type, and norms."""
    for name in ("out_features", "nf"):
        width = getattr(module, name, None)
        if isinstance(width, int) and width > 0:
            return width
    if isinstance(module, nn.LayerNorm) or could_be_norm(module):
        weight = getattr(module, "weight", None)
        shape: Any = weight.shape if isinstance(weight, torch.Tensor) else getattr(module, "normalized_shape", ())
        return int(shape[-1]) if len(shape) == 1 else None
    return None


def input_width(module: nn.Module) -> int | None:
    """The input width of a linear layer of any type; None for other modules."""
    if output_width(module) is None:
        return None
    for name in ("in_features", "nx"):
        width = getattr(module, name, None)
        if isinstance(width, int) and width > 0:
            return width
    return None


def device_of(site: nn.Module, model: nn.Module) -> torch.device:
    """The device of a site's vectors: that of its tensors, or of the model's if it has none."""
    tensors = (*site.parameters(), *site.buffers())
    device = tensors[0].device if tensors else next((p.device for p in model.parameters()), torch.device("cpu"))
    # accelerate stores the weights elsewhere, and moves them here for a call of the site or a part of it
    for module in site.modules() if device.type == "meta" else ():
        hook = getattr(module, "_hf_hook", None)
        for one in (hook, *getattr(hook, "hooks", ())):
            execution = getattr(one, "execution_device", None)
            if execution is not None:
                return torch.device(execution)
    return device


def experts_in(model: nn.Module) -> list[str]:
    """Names of the modules whose weights are one 3-D Parameter for all experts."""
    return [
        name
        for name, module in model.named_modules()
        if not hasattr(module, "kernel_size")  # a convolution
        and any(p is not None and p.dim() == 3 and p.shape[0] > 1 for p in module._parameters.values())
    ]


def experts_remark(module: nn.Module, name: str) -> str:
    inner = [f"{name}.{inner}" if inner else name for inner in experts_in(module)]
    return f"; the weights of all experts are one 3-D Parameter in {listed(inner)}" if inner else ""


def linear_patterns(model: nn.Module) -> str:
    """The names of the linear layers, layer numbers replaced by `*`."""
    names = [name for name, module in model.named_modules() if name and output_width(module) is not None]
    patterns = dict.fromkeys(re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name) for name in names)
    return listed(list(patterns)) if patterns else "none"
