"""A backend as one record: all that the package knows of it."""

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
        name: as ``rk.backend`` takes it.
        operations: what has the six functions of :mod:`red_kernels.backends.reference`, with the same arguments and
            results; a module or any other object. The four on mixes may be missing, then the reference computes them.
            It may have ``linear_edit_forward(x, weight, linear_bias, residual,
            edit)`` too: all of :func:`red_kernels.linear_edit`, without gradients, or None where it is better
            composed. None where the backend is missing.
        missing: why it cannot be used here, with the remedy, or None.
        unsupported: why it cannot take an activation, or None. Raises ValueError where it has a setting that cannot be
            followed.
        device: the type of the devices that it takes tensors of, such as "cpu"; None for all.
        automatic: whether tensors on such a device go to it if nobody asks for a backend.
        state: what `red-kernels info` says of it where it can be used.
        variants: ways of running that it has here, each to be tested by itself.
        use: runs one of them in a ``with`` block.
        nodes: its operations with gradients (see :func:`red_kernels.backends.nodes.nodes_of`); None where the Functions
            of :mod:`red_kernels.ops.autograd` are to add these to ``operations``.
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
