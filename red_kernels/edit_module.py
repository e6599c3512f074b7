"""The module that holds a site's vectors, and the forward hook by which it edits the site's output.

The site itself (a linear layer of any make) stays a black box. A caller that fuses the edit into its own next operation
asks the hook to leave the output alone for one call: `call_unedited`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .functional import edit

__all__ = ["NAME", "RedEdit", "call_unedited", "edit_hook", "plain_only"]

NAME = "red_edit"  # the child's name in the site: state_dict keys are `<site>.red_edit.scale`


class RedEdit(nn.Module):
    """RED's vectors at one site: `scale * h + bias` (arXiv 2402.15179), the identity at the start.

    `model.half()`, `model.to(torch.bfloat16)` and the like leave fp32 vectors in fp32: in half precision an update
    smaller than half a rounding step at 1.0 is lost.

    Args:
        width: of the site's output.
        parts: `"scale"`, `"bias"` or both.
        dtype, device: of the vectors.
    """

    scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, width: int, parts: tuple[str, ...], dtype: torch.dtype, device: torch.device | str | None
    ) -> None:
        super().__init__()
        for part, start in (("scale", torch.ones), ("bias", torch.zeros)):
            value = nn.Parameter(start(width, dtype=dtype, device=device)) if part in parts else None
            self.register_parameter(part, value)

    def reset_parameters(self) -> None:
        """Back to the identity, for instance after `to_empty` has given a meta model its memory."""
        with torch.no_grad():
            if self.scale is not None:
                self.scale.fill_(1.0)
            if self.bias is not None:
                self.bias.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RedEdit:
        def keeping_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype.itemsize < min(4, tensor.dtype.itemsize):
                return tensor.to(moved.device)
            return moved

        super()._apply(keeping_precision, recurse)
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` of shape `(..., width)`, edited, in its dtype. Raises TypeError for what is no tensor."""
        if plain_only() or type(hidden) is not Tensor:
            if not isinstance(hidden, Tensor):
                raise TypeError(f"the output of an edited module must be one tensor, got {type(hidden).__name__}")
            return reference.edit_forward(hidden, None, self.scale, self.bias, None, None, 0.0)
        return edit(hidden, self.scale, self.bias)

    def extra_repr(self) -> str:
        shown = [name for name in ("scale", "bias") if self._parameters.get(name) is not None]
        width = next((p.shape[0] for p in self._parameters.values() if p is not None), 0)
        return f"{width}, {' and '.join(shown)}"


class _Deferred(threading.local):
    edit: RedEdit | None = None  # the edit that the caller applies itself


_deferred = _Deferred()


def plain_only() -> bool:
    """Whether only plain PyTorch will do: under `torch.compile` (fusion is Inductor's), tracing, and `torch.func`."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def edit_hook(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of an edited module."""
    own = module._modules[NAME]
    assert own is not None
    if not torch.compiler.is_compiling() and _deferred.edit is own:
        _deferred.edit = None
        return None
    # Called as a module: hooks that bring its parameters to the device must fire.
    return own(output)


def call_unedited(module: nn.Module, own: RedEdit, *args: Any) -> Any:
    """Call a module that ends in the site of `own`, leaving out the edit: the caller applies it."""
    _deferred.edit = own
    try:
        return module(*args)
    finally:
        _deferred.edit = None
