"""Which of a model's named edits is applied: one for all, or for each row of a batch its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .edit_module import RedEdit

__all__ = ["DEFAULT", "Rows", "Selection", "Vectors", "saved_tensor_hooks"]

DEFAULT = "default"  # the edit that a patch makes
# torch keeps no public way to ask whether saved tensors go through hooks, as under activation checkpointing.
saved_tensor_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: "unknown"
)


class Vectors(NamedTuple):
    """What is applied at one site: vectors of shape `(d,)`, or `(n, d)` with ids for the rows; None for none."""

    scale: Tensor | None
    bias: Tensor | None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    ids: Tensor | None = None


class Rows:
    """The edits of the rows of a batch.

    Rows follow each other as in memory: where a tensor's first dimension is k times the batch (beams, or tokens laid
    out in rows), each entry serves k of them in turn.

    Args:
        ids: for each row of the batch the name of its edit, or None for no edit.
    """

    def __init__(self, ids: Sequence[str | None]) -> None:
        self.names = list(dict.fromkeys(ids))
        place = {name: at for at, name in enumerate(self.names)}
        self.index = torch.tensor([place[name] for name in ids])
        self.recomputed = False  # whether a layer under activation checkpointing has used them
        self._ids: dict[tuple[torch.Size, torch.device], Tensor] = {}
        self._banks: dict[int, tuple[RedEdit, list[tuple[int, int]], Vectors]] = {}

    def vectors(self, own: RedEdit, hidden: Tensor) -> Vectors | None:
        """What `own` applies to `hidden`; None where no row is edited."""
        if len(self.names) == 1:
            return own.named(self.names[0])
        if not any(own.has(name) for name in self.names):
            return None
        return self._bank(own)._replace(ids=self._ids_for(hidden))

    def _ids_for(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape[:-1]
        key = (shape, hidden.device)
        ids = self._ids.get(key) if not torch.compiler.is_compiling() else None
        if ids is None:
            batch = self.index.shape[0]
            if not shape or shape[0] % batch:
                raise ValueError(
                    f"ids: got {batch} of them for a batch of {shape[0] if shape else 0} rows; use_edits takes one for "
                    "each row"
                )
            ids = self.index.to(hidden.device).repeat_interleave(shape[0] // batch)
            ids = ids.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
            if not torch.compiler.is_compiling():
                self._ids[key] = ids
        return ids

    def _bank(self, own: RedEdit) -> Vectors:
        """The vectors of all names, one below the other; kept while nobody wants gradients and none has changed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stacked(own)
        state = [(id(vector), vector._version) for vector in own.parameters() if not vector.is_inference()]
        kept = self._banks.get(id(own))
        if kept is None or kept[0] is not own or kept[1] != state:
            kept = self._banks[id(own)] = own, state, self._stacked(own)
        return kept[2]

    def _stacked(self, own: RedEdit) -> Vectors:
        found = [own.named(name) for name in self.names]

        def stacked(part: int) -> Tensor | None:
            there = [None if vectors is None else vectors[part] for vectors in found]
            like = next((vector for vector in there if vector is not None), None)
            if like is None:
                return None
            none = torch.ones_like(like) if part == 0 else torch.zeros_like(like)
            return torch.stack([none if vector is None else vector for vector in there])

        normed = {vectors is not None and vectors.norm_weight is not None for vectors in found}
        if len(normed) > 1:
            raise ValueError("ids: rows with edits of kind 'ln' and rows without cannot be in one batch")
        return Vectors(*(stacked(part) for part in range(4)))


class Selection:
    """What all sites of one patched model share: the active edit, and the rows of `use_edits` in each thread.

    Attributes:
        active: the name of the edit that is applied; None for none. A copy of the model has its own.
    """

    def __init__(self) -> None:
        self.active: str | None = DEFAULT
        self._rows: dict[int, Rows] = {}
        self._stale = False  # rows that a checkpointed layer has used were left, and no forward has run since

    def __getstate__(self) -> dict[str, Any]:
        return {"active": self.active}  # rows belong to a running block, not to a copy or a file

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.active, self._rows, self._stale = state["active"], {}, False

    def enter(self, rows: Rows) -> Rows | None:
        """Use `rows` in this thread from now on; returns those that were used."""
        former = self._rows.get(threading.get_ident())
        self._rows[threading.get_ident()] = rows
        return former

    def leave(self, former: Rows | None) -> None:
        """Use what was used before `enter`."""
        left = self._rows.pop(threading.get_ident())
        self._stale = left.recomputed
        if former is not None:
            self._rows[threading.get_ident()] = former

    def rows(self, training: bool) -> Rows | None:
        """The rows that hold here, if any."""
        if torch.compiler.is_compiling():
            return next(iter(self._rows.values()), None)
        if not self._rows and not self._stale:
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        found = self._rows.get(threading.get_ident())
        if found is None and in_backward:  # layers are run again, perhaps in a thread of autograd's
            if self._stale or len(self._rows) > 1:
                raise RuntimeError(
                    "use_edits: under activation checkpointing the backward pass runs layers again; it has to be "
                    "inside of the with block, and of one at a time"
                )
            found = next(iter(self._rows.values()), None)
        if not in_backward:
            self._stale = False
        checkpointed = saved_tensor_hooks(True) is not None or (training and not torch.is_grad_enabled())
        if found is not None and checkpointed:
            found.recomputed = True
        return found
