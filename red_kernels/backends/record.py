"""A backend as one record, the package's whole interface to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def _nothing() -> str:
    return ""


def _as_it_is(name: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Backend:
    """An implementation of the operations.

    Attributes:
        name: for ``rk.backend``.
        operations: an object with the six functions of :mod:`red_kernels.backends.reference`, with the same arguments
            and results; a module or any other object. The four on mixes may be missing: the reference then computes
            them. It may also have ``linear_edit_forward(x, weight, linear_bias, residual, edit)``: all of
            :func:`red_kernels.linear_edit`, without gradients, or None if the composed form is better. None if the
            backend is missing.
        missing: why it is unusable here, with the remedy, or None.
        unsupported: why it cannot take an activation, or None. Raises ValueError if it has an invalid setting.
        device: the device type of its tensors, for example "cpu"; None for all.
        automatic: whether it gets tensors on this device if no backend is chosen.
        state: its text in `red-kernels info` when usable.
        variants: its ways of running here, each to be tested separately.
        use: runs one of them in a ``with`` block.
        nodes: its operations with gradients (see :func:`red_kernels.backends.nodes.nodes_of`); None if the Functions of
            :mod:`red_kernels.ops.autograd` add these to ``operations``.
    """

    name: str
    operations: Any
    missing: Callable[[], str | None]
    unsupported: Callable[[Tensor], str | None]
    device: str | None = None
    automatic: bool = True
    state: Callable[[], str] = _nothing
    variants: Callable[[], Sequence[str]] = list
    use: Callable[[str], AbstractContextManager[None]] = _as_it_is
    nodes: Any = None
