"""An attention's output where values may not wait: the edit of the stream behind its addition, in plain operations.

Under `torch.compile`, tracing and `torch.func`, and in an observed block, the output of an attention is marked as a
`Stream`, an alias of it. The addition that takes it applies the edit of the sum.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.module import RedEdit

__all__ = ["Stream", "is_lost", "marked"]

_PASSED_ON = {
    F.dropout, torch.dropout, Tensor.mul, torch.mul, Tensor.div, torch.div, Tensor.view, Tensor.reshape, torch.reshape,
    Tensor.contiguous, Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.flatten,
    Tensor.unflatten, Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.squeeze,
    Tensor.unsqueeze, F.layer_norm, F.rms_norm,
}  # fmt: skip
_SUMS = {Tensor.add, torch.add, Tensor.add_}


class Stream(Tensor):
    """A term added to the residual stream, whose sum `own` then edits."""

    own: RedEdit

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func in _SUMS:
            own = next(part.own for part in args if isinstance(part, Stream))
            if not torch.compiler.is_compiling():
                _marked.edits.discard(id(own))
            return own(result)
        if func in _PASSED_ON:
            found = next((part.own for part in args if isinstance(part, Stream)), None)
            if found is not None and isinstance(result, Tensor):
                return marked(result, found)
        return result


class _Marked(threading.local):
    def __init__(self) -> None:
        self.edits: set[int] = set()  # ids of the edits whose addition is pending


_marked = _Marked()


def is_lost(own: RedEdit) -> bool:
    """Whether the edit of a stream was not applied since it was marked, at the end of the block."""
    if id(own) in _marked.edits:
        _marked.edits.discard(id(own))
        return True
    return False


def marked(output: Tensor, own: RedEdit) -> Tensor:
    """The output of an attention, marked so that `own` edits the sum with it."""
    if not torch.compiler.is_compiling():
        _marked.edits.add(id(own))
    stream: Any = output.as_subclass(Stream)
    stream.own = own
    return stream
