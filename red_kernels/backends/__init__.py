"""The list of backends, and the choice of one for an operation.

To add one, write a file with its :class:`~red_kernels.backends.record.Backend` and a line of the table below; from
outside the package, use :func:`register_backend`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import choice, cpu, cuda, find_triton, nodes, reference
from .record import Backend
from .schemas import REQUIRED

__all__ = [
    "REFERENCE",
    "Backend",
    "available_backends",
    "backend",
    "by_name",
    "choose",
    "choose_backward",
    "forced_backend",
    "records",
    "register_backend",
]

REFERENCE = Backend("reference", reference, lambda: None, lambda x: None)
_TABLE = (find_triton.BACKEND, cuda.BACKEND, cpu.BACKEND, REFERENCE)

_ENVIRONMENT = "RED_KERNELS_BACKEND"


class _Blocks:
    """The open ``rk.backend`` blocks of one thread; ``name`` is the choice of the last one, None if there is none.

    ``open`` has a list ``[name]`` for each block, compared by identity, in the order of opening.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.open: list[list[str]] = []

    def add(self, entry: list[str]) -> None:
        self.open.append(entry)
        self.name = entry[0]

    def remove(self, entry: list[str]) -> None:
        self.open = [other for other in self.open if other is not entry]
        self.name = self.open[-1][0] if self.open else None


# A plain `local`, not a subclass: then torch.compile reads and guards the calling thread's own value.
_thread = threading.local()
_FROM_ENVIRONMENT = os.environ.get(_ENVIRONMENT) or None
_lock = threading.Lock()
_blocks_open = 0  # in all threads


class _Known:
    """The backends by name, and their order for tensors of a type of device.

    Attributes:
        by_name: in the order of listing.
        orders: for a type of device, keyed by the preferred backend of ``choice.py``; "" if it has no preference.
        on_cpu: the order for CPU tensors.
    """

    def __init__(self, table: Iterable[Backend]) -> None:
        self._table = tuple(table)
        self.by_name = {record.name: record for record in self._table}
        self.orders: dict[str, dict[str, tuple[Backend, ...]]] = {}
        self._added: tuple[Backend, ...] = ()
        self._arrange()

    def add(self, record: Backend) -> None:
        self.by_name[record.name] = record
        if record.missing() is None:
            self._added = (record, *self._added)
            self._arrange()

    def _arrange(self) -> None:
        tried: dict[str, list[Backend]] = {}
        for record in (*self._added, *self._table):
            if record.automatic and record.operations is not None and record.device is not None:
                tried.setdefault(record.device, []).append(record)
        self.orders = {
            device: {
                first: tuple(sorted(found, key=lambda one: (one not in self._added, one.name != first)))
                for first in ("", *(one.name for one in found))
            }
            for device, found in tried.items()
        }
        self.on_cpu = self.orders["cpu"][""] if "cpu" in self.orders else ()


_known = _Known(_TABLE)


def records() -> tuple[Backend, ...]:
    """All backends, missing ones included."""
    return tuple(_known.by_name.values())


def register_backend(record: Backend) -> None:
    """Register a further backend for ``rk.backend``, the choice, `red-kernels info` and the benchmarks.

    Args:
        record: with a new name. If it is ``automatic``, it gets tensors on its device before all other backends. If it
            is missing now, it is not checked again.

    Raises:
        TypeError: it is not a `Backend`, or a field of it is not a function.
        ValueError: its name is taken; it is ``automatic`` for no device; it lacks a function.
    """
    if not isinstance(record, Backend):
        raise TypeError(f"record: got {type(record).__name__}, expected a red_kernels.backends.Backend")
    if not isinstance(record.name, str):
        raise TypeError(f"record: got the name {record.name!r}, expected a string")
    if not record.name or record.name in _known.by_name:
        taken = ", ".join(map(repr, _known.by_name))
        raise ValueError(f"record: got the name {record.name!r}, expected a name that is not taken; taken: {taken}")
    for field in ("missing", "unsupported", "state", "variants", "use"):
        if not callable(getattr(record, field)):
            raise TypeError(f"record: {field} of {record.name!r} is {getattr(record, field)!r}, expected a function")
    known = isinstance(record.device, str) and ":" not in record.device
    if record.device is not None and not known:
        raise ValueError(f"record: {record.name!r} has the device {record.device!r}, expected a type such as 'cpu'")
    if record.automatic and record.device is None and record.operations is not None:
        raise ValueError(f"record: {record.name!r} is automatic for no device, expected a device such as 'cpu'")
    if record.operations is None and record.missing() is None:
        raise ValueError(f"record: {record.name!r} has no operations, and `missing` gives no reason")
    lacking = [name for name in REQUIRED if not callable(getattr(record.operations, name, None))]
    if record.operations is not None and lacking:
        raise ValueError(f"record: the operations of {record.name!r} lack {', '.join(lacking)}")
    _known.add(record)
    _count_blocks(0)


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None if it is usable here, else the reason and the remedy."""
    return {record.name: record.missing() for record in records()}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for all operations in a ``with`` block (the variable RED_KERNELS_BACKEND does so for a process).

    The choice applies to the calling thread, including compiled code. Of the open blocks, the one opened last in this
    thread decides, in whatever order they close, and whatever blocks other threads open. A backward uses the backend
    that was chosen at its forward. Raises ValueError for an unknown name and RuntimeError for a missing backend, with
    the reason and the remedy.
    """
    _require(name, "rk.backend")
    blocks = getattr(_thread, "blocks", None)
    if blocks is None:
        blocks = _thread.blocks = _Blocks()
    entry = [name]
    _count_blocks(1)
    blocks.add(entry)
    try:
        yield
    finally:
        blocks.remove(entry)
        _count_blocks(-1)


def _count_blocks(change: int) -> None:
    """Count the open blocks of all threads: while there are any, a thread's choice is not shared."""
    global _blocks_open
    if nodes.forget_choices is None or torch.compiler.is_compiling():
        return
    with _lock:
        _blocks_open += change
        nodes.forget_choices(_blocks_open == 0)


def choose(x: Tensor, operation: str) -> Backend:
    """The backend for an operation on ``x``: the chosen one, else the first that takes ``x``.

    Registered ones come first, then those of the package, on a GPU in the order of ``choice.py``.

    ``operation`` is "edit", "edit_norm", "norm_edit" or "linear_edit", for the table in ``choice.py``.

    Raises RuntimeError if the chosen one is missing, and ValueError if it cannot take ``x``, or if
    RED_KERNELS_BACKEND or RED_KERNELS_CPU has a value that is none of those expected.
    """
    name = forced_backend()
    if name is None:
        for record in _order(x, operation):
            if record.unsupported(x) is None:
                return record
        return REFERENCE
    record = _known.by_name[name]
    reason = record.unsupported(x)
    if reason is not None:
        raise ValueError(f"the backend {name!r} was asked for, but {reason}; remedy: rk.backend('reference')")
    return record


def choose_backward(x: Tensor, operation: str, forward: Backend) -> Backend:
    """The backend for the backward of an operation whose forward on ``x`` was by ``forward``: the same.

    After Triton's kernels it is the table's row for "... backward" in ``choice.py``, if no backend was chosen: both
    backends of an NVIDIA GPU save the same tensors.
    """
    if forward.name != "triton" or not x.is_cuda or "cuda" not in _known.orders["cuda"] or forced_backend() is not None:
        return forward
    row = choice.preferred(f"{operation} backward", x.numel(), x.shape[-1], cuda.capability(x.get_device()))
    other = _known.by_name[row.backend]
    return other if other.unsupported(x) is None else forward


def _order(x: Tensor, operation: str) -> tuple[Backend, ...]:
    """The backends to try for ``x``."""
    if x.is_cpu:  # faster than a query of the device's type
        return _known.on_cpu
    device = "cuda" if x.is_cuda else x.device.type
    orders = _known.orders.get(device)
    if orders is None:
        return ()
    if device == "cuda" and "cuda" in orders and "triton" in orders:
        capability = cuda.capability(x.get_device())
        return orders[choice.preferred(operation, x.numel(), x.shape[-1], capability).backend]
    return orders[""]


def by_name(name: str) -> Backend:
    """The backend of that name. Raises KeyError for an unknown one."""
    return _known.by_name[name]


def forced_backend() -> str | None:
    """The backend chosen by ``rk.backend`` or RED_KERNELS_BACKEND, or None for the automatic choice.

    The variable is checked here, at the first use, not on import: `red-kernels info` must run with an invalid one to
    report it. Raises ValueError and RuntimeError as :func:`backend` does.
    """
    blocks = getattr(_thread, "blocks", None)
    if blocks is not None and blocks.name is not None:
        return blocks.name
    if _FROM_ENVIRONMENT is not None:
        _require(_FROM_ENVIRONMENT, _ENVIRONMENT)
    return _FROM_ENVIRONMENT


def _require(name: str, source: str) -> None:
    if name not in _known.by_name:
        raise ValueError(f"{source} got {name!r}, expected one of {', '.join(map(repr, _known.by_name))}")
    reason = _known.by_name[name].missing()
    if reason is not None:
        raise RuntimeError(f"{source}: the backend {name!r} is missing: {reason}")
