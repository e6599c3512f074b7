"""The choice among a model's named edits: one for all rows, one for each row of a batch, or none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..ops.ambient import saved_tensor_hooks as saved_tensor_hooks

__all__ = ["DEFAULT", "OFF", "Off", "Rows", "Selection", "saved_tensor_hooks"]

DEFAULT = "default"  # the edit that a patch makes


class Off(Enum):
    """The state inside `disable_edits`. An Enum, so copies of it are the same object."""

    OFF = "off"


OFF = Off.OFF


class Rows:
    """The edits of the rows of a batch.

    Rows are in memory order: if a tensor's first dimension is k times the batch (beams, or tokens laid out in rows),
    each entry serves k consecutive rows.

    Args:
        ids: for each row of the batch the name of its edit, or None for no edit.
    """

    def __init__(self, ids: Sequence[str | None]) -> None:
        # Sorted: code compiled for some edits serves every order of them.
        self.names = sorted(set(ids), key=lambda name: (name is None, name or ""))
        place = {name: at for at, name in enumerate(self.names)}
        with torch.inference_mode(False):  # a block may be entered in inference mode, and train later
            self.index = torch.tensor([place[name] for name in ids])
        self.thaw: Callable[[], None] = _nothing  # makes the edits trainable
        self.thawed = False  # whether it did
        self._ids: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def each(self, hidden: Tensor) -> int:
        """The number of rows of `hidden` for each entry."""
        batch, rows = self.index.shape[0], hidden.shape[0] if hidden.dim() > 1 else 0
        if hidden.dim() < 2 or rows % batch:
            raise ValueError(f"ids: got {batch} of them for a batch of {rows} rows, expected one for each row")
        return rows // batch

    def ids_for(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape[:-1]
        if torch.compiler.is_compiling():
            return self._spread(hidden)
        key = (shape, hidden.device)
        ids = self._ids.get(key)
        if ids is None:
            with torch.inference_mode(False):
                ids = self._ids[key] = self._spread(hidden)
        return ids

    def _spread(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape[:-1]
        ids = self.index.to(hidden.device).repeat_interleave(self.each(hidden))
        return ids.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()


def _nothing() -> None:
    pass


State = Rows | Off | str | None  # of a model's edits: by row, none, or the one of this name


class Selection:
    """The state shared by all sites of one patched model: the active edit, and the running blocks.

    A copy of the model, or a loaded one, has its own: with the same chosen edit, and no running block.

    Attributes:
        chosen: the name of the edit applied outside all blocks; None for none.
        open: the running `Block`s.
        shifting: the number of them whose state may change between two calls in a thread.
        here: for compiled code, which cannot read context variables: `applied` is the state of this thread's innermost
            block.
        unclear: the states applied under hooks for saved tensors of an unknown type, at most two; see `recompute`.
        first: the state applied before `varied`.
        varied: whether another state than `first` was ever applied.
        unnoted: whether a forward without gradients has run before that; it may have been a first run.
    """

    def __init__(self) -> None:
        self._reset(DEFAULT)

    def _reset(self, chosen: str | None) -> None:
        self.chosen = chosen
        self.open: list[Any] = []
        self.shifting = 0
        self.here = threading.local()  # no subclass: torch 2.11 would not read this thread's value
        self.unclear: set[Any] = set()
        self.first, self.varied, self.unnoted = chosen, False, False

    def __getstate__(self) -> dict[str, Any]:
        return {"chosen": self.chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset(state["chosen"])

    def in_use(self, name: str) -> str:
        """The use of the edit of this name, for a message; empty for none."""
        if name == self.chosen:
            return "it is the active edit; switch to another one first"
        return "rows of a running use_edits have it" if self.in_rows(name) else ""

    def in_rows(self, name: str) -> bool:
        """Whether rows of a running block have this edit."""
        return any(name in block.names for block in tuple(self.open))
