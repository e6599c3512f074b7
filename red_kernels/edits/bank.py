"""The edits of one site, by name, and the vectors of several of them stacked for the rows of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..support.sharded import is_sharded
from .blocks import lock
from .kinds import PARTS, Edit, Kind
from .lies import Lies, spread_vectors
from .selection import DEFAULT, Rows, Selection
from .vectors import EditVectors

__all__ = ["EditBank"]


class EditBank(EditVectors):
    """The edits of one site, of one kind.

    The edit named `"default"` has the module's own Parameters; further edits are children under their names.
    `selection` determines the applied edit. If sites share edits (`Kind.shared`), the first site has them, and the
    others read them there.

    Args:
        width, kind, dtype, device: as for `EditVectors`.
        selection: shared by all sites of a model.
        own: with False there is no edit yet, and one named `"default"` is a child like others.
        lead: the edits of another site, of the same kind and width, which this site shares.

    Attributes:
        root: the module with the edits: this one, or that of the other site.
        lies: how the vectors are placed on several processes; None if each process has all of them.
    """

    lies: Lies | None = None

    def __init__(
        self,
        width: int,
        kind: Kind | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
        selection: Selection | None = None,
        *,
        own: bool = True,
        lead: EditBank | None = None,
    ) -> None:
        super().__init__(width, kind if own and lead is None else None, dtype, device)
        self.kind, self.width, self.own = kind, width, own
        if lead is not None:
            self.__dict__["lead"] = lead.root  # not a child: the Parameters are at one site
        self.selection = Selection() if selection is None else selection

    @property
    def root(self) -> EditBank:
        return self.__dict__.get("lead") or self

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the edits, oldest first."""
        if self.root is not self:
            return self.root.names
        added = tuple(self._modules.items())  # a copy: another thread may add or delete
        return ((DEFAULT,) if self.own else ()) + tuple(name for name, holder in added if _is_visible(holder))

    def has(self, name: str | None) -> bool:
        """Whether an edit of this name exists."""
        if self.root is not self:
            return self.root.has(name)
        return _is_visible(self._modules.get(name)) if name in self._modules else self.own and name == DEFAULT

    def holder(self, name: str) -> EditVectors:
        """The module whose Parameters are an edit's vectors. Raises KeyError for an unknown name."""
        if self.root is not self:
            return self.root.holder(name)
        if self.own and name == DEFAULT:
            return self
        found = self._modules[name]
        assert isinstance(found, EditVectors)
        return found

    def make(self, dtype: torch.dtype, device: torch.device | str | None) -> EditVectors:
        """The vectors of a further edit, initially the identity and frozen, and not yet a part of the module."""
        made = EditVectors(self.width, self.kind, dtype, device)
        like = next((own for own in self.parameters() if is_sharded(own)), None)
        if like is not None:
            spread_vectors(made, like.device_mesh, like.placements)  # type: ignore[attr-defined]
        made.train(self.training)
        made.freeze()
        return made

    def publish(self, name: str, holder: EditVectors) -> None:
        """Make these vectors the edit of this name."""
        with lock:  # a new dict instead of a change: other threads may be iterating
            self.__dict__["_modules"] = {**self._modules, name: holder}

    def remove(self, name: str) -> None:
        """Remove the edit of this name, if it exists."""
        root = self.root
        with lock:
            root.__dict__["_modules"] = {key: holder for key, holder in root._modules.items() if key != name}

    def named(self, name: str | None, again: bool = False) -> Edit | None:
        """An edit, as by `EditVectors.vectors`; None if this site has none of that name."""
        root = self.root
        holder: Any = root._modules.get(name) if name is not None else None
        if holder is None:
            if not root.own or name != DEFAULT:
                return None
            holder = root
        found: Edit = holder.vectors(again)
        return found if root.lies is None else root.lies.here(found)

    def versions(self, state: Any) -> tuple[tuple[Tensor, int], ...]:
        """The vectors that a state applies here, with their counts of in-place changes."""
        names = state.names if isinstance(state, Rows) else state if isinstance(state, tuple) else (state,)
        return tuple(
            (vector, vector._version)
            for name in names
            if isinstance(name, str) and self.has(name)
            for vector in self.holder(name)._parameters.values()
            if vector is not None and not vector.is_inference()
        )

    def of_rows(self, rows: Rows, hidden: Tensor, again: bool = False) -> Edit | None:
        """The edits of the rows of `hidden`; None if no row is edited. `again`: as for `named`."""
        if not any(self.has(name) for name in rows.names):
            return None
        if not again and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._make_trainable(rows)
        if len(rows.names) == 1:
            rows.each(hidden)
            return self.named(rows.names[0], again)
        return self._stacked(rows, again)._replace(ids=rows.ids_for(hidden))

    def _make_trainable(self, rows: Rows) -> None:
        """Thaw frozen vectors, since the edits of a block may be trained; raise if their gradients would be lost."""
        if any(name is not None and self.has(name) and self.holder(name).frozen for name in rows.names):
            rows.thaw()
        if rows.thawed and nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            raise RuntimeError(
                "use_edits: DistributedDataParallel does not synchronise the vectors of edits that were inactive "
                "when it wrapped the model; before wrapping, set requires_grad on the vectors of "
                "rk.edit_parameters(model, name) for all edits to train"
            )

    def _stacked(self, rows: Rows, again: bool) -> Edit:
        """The vectors of all names, stacked. They are never cached: a change through `.data` leaves no trace."""
        found = [self.named(name, again) for name in rows.names]
        there = [one for one in found if one is not None]
        kind = next((one.kind for one in there if not one.kind.neutral), there[0].kind)
        lacking = len(there) < len(found) and not kind.neutral
        if lacking or any(one.kind.formula is not kind.formula for one in there):
            raise ValueError(f"ids: rows with edits of kind {kind.name!r} and rows without cannot share a batch")
        every = [{} if one is None else one.vectors for one in found]
        parts = dict.fromkeys(part for one in there for part, vector in one.vectors.items() if vector is not None)
        return Edit(kind, {part: _below(part, [vectors.get(part) for vectors in every]) for part in parts})


def _is_visible(holder: object) -> bool:
    gate = getattr(holder, "gate", None)
    return isinstance(holder, EditVectors) and (gate is None or gate.open)


def _below(part: str, vectors: list[Tensor | None]) -> Tensor:
    """This part of several edits, stacked; an edit without the part has its initial value, the identity."""
    like = next(vector for vector in vectors if vector is not None)
    start = torch.full_like(like, PARTS[part].start) if any(vector is None for vector in vectors) else None
    return torch.stack([start if vector is None else vector for vector in vectors])  # type: ignore[misc]
