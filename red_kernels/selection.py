"""Which of a model's named edits is applied: one for all, for each row of a batch its own, or none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .edits.kinds import PARTS, Edit

if TYPE_CHECKING:
    from .blocks import Block
    from .edit_module import RedEdit

__all__ = ["DEFAULT", "OFF", "Off", "Rows", "Selection", "saved_tensor_hooks"]

DEFAULT = "default"  # the edit that a patch makes
# torch keeps no public way to ask whether saved tensors go through hooks, as under activation checkpointing.
saved_tensor_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: "unknown"
)


class Off(Enum):
    """The state inside of `disable_edits`. An Enum, so that copies of it are the same object."""

    OFF = "off"


OFF = Off.OFF


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
        with torch.inference_mode(False):  # a block may be entered in inference mode, and train later
            self.index = torch.tensor([place[name] for name in ids])
        self.thaw: Callable[[], None] = _nothing  # makes the edits trainable
        self.thawed = False  # whether it has
        self._ids: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def vectors(self, own: RedEdit, hidden: Tensor, again: bool = False) -> Edit | None:
        """What `own` applies to `hidden`; None where no row is edited. `again`: as for `RedEdit.named`."""
        if not any(own.has(name) for name in self.names):
            return None
        if not again and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._make_trainable(own)
        if len(self.names) == 1:
            self._each(hidden)
            return own.named(self.names[0], again)
        return self._stacked(own, again)._replace(ids=self._ids_for(hidden))

    def _make_trainable(self, own: RedEdit) -> None:
        """Thaw what is frozen, as the edits of a block may be trained; raise where their gradients would be lost."""
        if any(name is not None and own.has(name) and own.holder(name).frozen for name in self.names):
            self.thaw()
        if self.thawed and nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            raise RuntimeError(
                "use_edits: DistributedDataParallel does not know the vectors of edits that were not active when it "
                "was made, and would not sum up their gradients; set requires_grad on the vectors of "
                "rk.edit_parameters(model, name) for all edits to train before wrapping the model"
            )

    def _each(self, hidden: Tensor) -> int:
        """How many rows of `hidden` each entry serves."""
        batch, rows = self.index.shape[0], hidden.shape[0] if hidden.dim() > 1 else 0
        if hidden.dim() < 2 or rows % batch:
            raise ValueError(f"ids: got {batch} of them for a batch of {rows} rows; use_edits takes one for each row")
        return rows // batch

    def _ids_for(self, hidden: Tensor) -> Tensor:
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
        ids = self.index.to(hidden.device).repeat_interleave(self._each(hidden))
        return ids.reshape(-1, *(1,) * (len(shape) - 1)).expand(shape).contiguous()

    def _stacked(self, own: RedEdit, again: bool) -> Edit:
        """The vectors of all names, one below the other. Never kept: nothing tells of a change through `.data`."""
        found = [own.named(name, again) for name in self.names]
        there = [one for one in found if one is not None]
        kind = next((one.kind for one in there if not one.kind.neutral), there[0].kind)
        lacking = len(there) < len(found) and not kind.neutral
        if lacking or any(one.kind.formula is not kind.formula for one in there):
            raise ValueError(f"ids: rows with edits of kind {kind.name!r} and rows without cannot be in one batch")
        every = [{} if one is None else one.vectors for one in found]
        parts = dict.fromkeys(part for one in there for part, vector in one.vectors.items() if vector is not None)
        return Edit(kind, {part: _below(part, [vectors.get(part) for vectors in every]) for part in parts})


def _nothing() -> None:
    pass


def _below(part: str, vectors: list[Tensor | None]) -> Tensor:
    """Those of several edits, one below the other; where one lacks the part, it is as it starts: the identity."""
    like = next(vector for vector in vectors if vector is not None)
    start = torch.full_like(like, PARTS[part].start) if any(vector is None for vector in vectors) else None
    return torch.stack([start if vector is None else vector for vector in vectors])  # type: ignore[misc]


State = Rows | Off | str | None  # of a model's edits: by row, none, or the one of this name


class Selection:
    """What all sites of one patched model share: the active edit, and the blocks that are running.

    A copy of the model, or one from a file, has its own: with the same edit chosen, and no block running.

    Attributes:
        chosen: the name of the edit that is applied outside of all blocks; None for none.
        open: the blocks that are running.
        shifting: how many of these may hold in one call in a thread and not in the next one.
        here: for compiled code, which cannot ask for context variables: `applied` is what this thread's innermost block
            applies.
        unclear: what was applied under hooks for saved tensors of an unknown make, two states at most; see `recompute`.
        first: what was applied before `varied`.
        varied: whether there was ever anything else to apply than `first`.
        unnoted: whether a forward without gradients has run before that; it may have been a first run.
    """

    def __init__(self) -> None:
        self._reset(DEFAULT)

    def _reset(self, chosen: str | None) -> None:
        self.chosen = chosen
        self.open: list[Block] = []
        self.shifting = 0
        self.here = threading.local()  # no subclass: torch 2.11 would not read the calling thread's own value
        self.unclear: set[Any] = set()
        self.first, self.varied, self.unnoted = chosen, False, False

    def __getstate__(self) -> dict[str, Any]:
        return {"chosen": self.chosen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset(state["chosen"])

    def in_use(self, name: str) -> str:
        """What uses the edit of this name, for a message; empty for nothing."""
        if name == self.chosen:
            return "it is the active edit; switch to another one first"
        return "rows of a running use_edits have it" if self.in_rows(name) else ""

    def in_rows(self, name: str) -> bool:
        """Whether rows of a running block have this edit."""
        return any(name in block.names for block in tuple(self.open))
