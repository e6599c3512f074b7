"""Which of a model's named edits is applied: one for all, or for each row of a batch its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
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


_Seen = tuple[Mapping[str, "Tensor | None"], str, Tensor, int]  # where a vector hangs, and its version


class Rows:
    """The edits of the rows of a batch.

    Rows follow each other as in memory: where a tensor's first dimension is k times the batch (beams, or tokens laid
    out in rows), each entry serves k of them in turn.

    Args:
        ids: for each row of the batch the name of its edit, or None for no edit.
    """

    def __init__(self, ids: Sequence[str | None]) -> None:
        # Sorted: what is compiled for some edits serves every order of them.
        self.names = sorted(set(ids), key=lambda name: (name is None, name or ""))
        place = {name: at for at, name in enumerate(self.names)}
        self.index = torch.tensor([place[name] for name in ids])
        self.modes: set[bool] = set()  # `training` of layers that have used them and that may be run again in backward
        self._ids: dict[tuple[torch.Size, torch.device], Tensor] = {}
        self._banks: dict[int, tuple[RedEdit, list[_Seen], Vectors]] = {}

    def vectors(self, own: RedEdit, hidden: Tensor) -> Vectors | None:
        """What `own` applies to `hidden`; None where no row is edited."""
        if not any(own.has(name) for name in self.names):
            return None
        if len(self.names) == 1:
            self._each(hidden)
            return own.named(self.names[0])
        return self._bank(own)._replace(ids=self._ids_for(hidden))

    def _each(self, hidden: Tensor) -> int:
        """How many rows of `hidden` each entry serves."""
        batch, rows = self.index.shape[0], hidden.shape[0] if hidden.dim() > 1 else 0
        if hidden.dim() < 2 or rows % batch:
            raise ValueError(f"ids: got {batch} of them for a batch of {rows} rows; use_edits takes one for each row")
        return rows // batch

    def _ids_for(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape[:-1]
        key = (shape, hidden.device)
        ids = self._ids.get(key) if not torch.compiler.is_compiling() else None
        if ids is None:
            ids = self.index.to(hidden.device).repeat_interleave(self._each(hidden))
            ids = ids.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()
            if not torch.compiler.is_compiling():
                self._ids[key] = ids
        return ids

    def _bank(self, own: RedEdit) -> Vectors:
        """The vectors of all names, one below the other; kept while nobody wants gradients and none has changed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stacked(own)
        kept = self._banks.get(id(own))
        if kept is not None and kept[0] is own and _as_they_were(kept[1]):
            return kept[2]
        state: list[_Seen] = [
            (holder._parameters, part, vector, -1 if vector.is_inference() else vector._version)
            for holder in (own.holder(name) for name in self.names if name is not None and own.has(name))
            for part, vector in holder._parameters.items()
            if vector is not None
        ]
        self._banks[id(own)] = own, state, self._stacked(own)
        return self._banks[id(own)][2]

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


def _as_they_were(state: list[_Seen]) -> bool:
    """Whether a bank still has the values of its vectors. Those made in inference mode do not say, so it has not."""
    return bool(state) and all(
        own.get(part) is vector and version >= 0 and vector._version == version for own, part, vector, version in state
    )


class _Here(threading.local):
    rows: Rows | None = None  # of the innermost block in this thread
    plain: frozenset[bool] = frozenset()  # modes of layers that ran without rows here, and may run again in backward


class Selection:
    """What all sites of one patched model share: the active edit, and the rows of `use_edits` in each thread.

    A copy of the model, or one from a file, has its own: with the same edit chosen, and no block running.

    Attributes:
        chosen: the name of the edit that is applied while edits are not disabled; None for none.
        disabled: how many blocks of `disable_edits` are running.
    """

    def __init__(self) -> None:
        self._reset(DEFAULT)

    def _reset(self, chosen: str | None) -> None:
        self.chosen, self.disabled = chosen, 0
        self._here = _Here()
        self._rows: dict[int, Rows] = {}  # those of every thread, for autograd's own threads
        self._blocks: list[Rows] = []
        self._stale: set[bool] = set()  # modes of layers that ran in a block that was left; see `rows`

    def __getstate__(self) -> dict[str, Any]:
        return {"chosen": self.chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset(state["chosen"])

    @property
    def active(self) -> str | None:
        """The name of the edit that is applied where no rows are; None for none."""
        return None if self.disabled else self.chosen

    @active.setter
    def active(self, name: str | None) -> None:
        self.chosen = name

    def enter(self, rows: Rows | None) -> Rows | None:
        """Use `rows` in this thread from now on, or none at all; returns those that were used."""
        former = self._here.rows
        self._set(rows)
        self._here.plain = frozenset()
        if rows is not None:
            self._blocks.append(rows)
        return former

    def leave(self, former: Rows | None) -> None:
        """Use what was used before `enter`."""
        left = self._here.rows
        if left is not None:
            self._stale |= left.modes
            self._blocks.remove(left)
        self._set(former)

    def _set(self, rows: Rows | None) -> None:
        self._here.rows = rows
        if rows is None:
            self._rows.pop(threading.get_ident(), None)
        else:
            self._rows[threading.get_ident()] = rows

    def in_use(self, name: str) -> str:
        """What uses the edit of this name, for a message; empty for nothing."""
        if name == self.chosen:
            return "it is the active edit; switch to another one first"
        return "rows of a running use_edits have it" if any(name in rows.names for rows in self._blocks) else ""

    def rows(self, training: bool) -> Rows | None:
        """The rows that hold here, if any; `training` is the mode of the layer that asks.

        Activation checkpointing runs layers again in the backward pass, on a GPU in a thread of autograd's, and that
        has to use the same rows. Where it cannot be told which ones those are, it is refused.
        """
        found = self._here.rows
        if torch.compiler.is_compiling():
            if found is None and self._rows:
                raise RuntimeError(
                    "use_edits: a compiled model was called outside of the block that another thread is in"
                )
            return found
        # Its reentrant form runs layers without gradients first, the other one under hooks for saved tensors.
        if torch.is_grad_enabled() and saved_tensor_hooks(True) is None and not self._rows and not self._stale:
            return None
        if torch._C._current_graph_task_id() == -1:
            if not torch.is_grad_enabled() or saved_tensor_hooks(True) is not None:
                self._stale.discard(training)
                if found is None:
                    self._here.plain |= {training}
                else:
                    found.modes.add(training)
            return found
        if found is None and training not in self._here.plain and (self._rows or training in self._stale):
            if training in self._stale or len(self._rows) > 1:
                raise RuntimeError(
                    "use_edits: under activation checkpointing the backward pass runs layers again; it has to be "
                    "inside of the with block, and of one at a time"
                )
            found = next(iter(self._rows.values()))
        return found
