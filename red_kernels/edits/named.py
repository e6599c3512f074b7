"""Several named edits of one patched model: adding, switching, disabling, combining; and an edit for each row.

Every edit has its own vectors at every site (RED, arXiv 2402.15179, trains one). `rk.patch` makes the edit
`"default"`. At most one edit is active; `use_edits` chooses by row instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..support.text import listed
from .bank import EditBank
from .blocks import Block, lock, state_of
from .find import edit_modules, outer_modules, wrapper_of
from .kinds import PARTS
from .module import RECORDS, RedEdit, check_name
from .selection import DEFAULT, OFF, Rows, Selection
from .vectors import EditVectors, Gate

__all__ = [
    "active_edit",
    "add_edit",
    "combine_edits",
    "delete_edit",
    "disable_edits",
    "edit_names",
    "switch_edit",
    "use_edits",
]


def edit_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a patched model's edits, oldest first. Raises ValueError if it is not patched."""
    return tuple(dict.fromkeys(name for own in edit_modules(model).values() for name in own.names))


def active_edit(model: nn.Module) -> str | None:
    """The name of the active edit; None inside `disable_edits`. Raises ValueError if the model is not patched."""
    active = [active_name(selection) for selection in _selections(edit_modules(model))]
    if any(name != active[0] for name in active):
        raise ValueError(f"model: its parts have different active edits, {listed(list(map(str, active)))}")
    return active[0]


def active_name(selection: Selection) -> str | None:
    """The active edit of a selection; None inside `disable_edits`."""
    return None if state_of(selection)[0] is OFF else selection.chosen


def add_edit(model: nn.Module, name: str, copy_of: str | None = None) -> None:
    """Add an edit whose vectors start as the identity. Until `switch_edit` it is neither active nor trainable.

    Args:
        model: a patched model.
        name: of the new edit; no dots, and no name of an attribute.
        copy_of: the name of an edit whose values it copies.

    Raises:
        TypeError, ValueError: the model is not patched, or was wrapped for distributed training since; the name is
            taken or invalid; there is no edit `copy_of`. Nothing is changed then.
    """
    added = new_edit(model, name)
    if copy_of is not None:
        _check_there(_own_modules(model), copy_of, "copy_of")
        with torch.no_grad():
            for own, holder in added.values():
                if own.has(copy_of):
                    for part, target in holder._parameters.items():
                        if target is not None:
                            target.copy_(_vector(own.holder(copy_of), part))
    publish_edit(added, name)


# Site to the module of its new vectors, and the vectors; for sites that share vectors, the first one.
NewEdit = dict[str, tuple[EditBank, EditVectors]]


def new_edit(model: nn.Module, name: str) -> NewEdit:
    """The vectors of a new edit, initially the identity, which no request sees before `publish_edit`.

    Raises:
        TypeError, ValueError: as in `add_edit`. Nothing is changed then.
    """
    modules = _own_modules(model)
    wrapper = next(filter(None, (wrapper_of(module) for _, module in outer_modules(model))), None)
    if wrapper is not None:
        raise ValueError(f"model: has a {wrapper}, which would not see the new vectors; add edits before wrapping")
    check_name(name)
    if any(own.has(name) for own in modules.values()):
        raise ValueError(f"name: the model has an edit {name!r} already")
    with torch.inference_mode(False):
        made: NewEdit = {}
        for site, root in _roots(modules).items():
            like = next(iter(root.parameters()))
            made[site] = root, root.make(like.dtype, like.device)
    return made


def _roots(modules: Mapping[str, RedEdit]) -> dict[str, EditBank]:
    """The modules with the edits of a model, each once, by the first of its sites."""
    first: dict[int, str] = {}
    for site, own in modules.items():
        first.setdefault(id(own.root), site)
    return {site: modules[site].root for site in first.values()}


def publish_edit(added: NewEdit, name: str) -> None:
    """Add the result of `new_edit`, with its present values, at all sites in one step.

    Raises:
        ValueError: another thread has added an edit of this name in the meantime. Nothing is changed then.
    """
    gate = Gate()
    with lock:
        if any(name in own._modules for own, _ in added.values()):
            raise ValueError(f"name: the model has an edit {name!r} already")
        for own, holder in added.values():
            holder.gate = gate
            own.publish(name, holder)
        gate.open = True


def switch_edit(model: nn.Module, name: str) -> None:
    """Make an edit the active one; inside `disable_edits`, from its end on.

    The active edit is trainable, the others are frozen (`requires_grad`). The backward pass of an earlier forward still
    gives the former edit its gradients. Its Parameters are its own: an optimizer keeps the ones it was given. Inside
    `use_edits` the rows keep their edits.

    Raises:
        ValueError: the model is not patched, or has no edit of that name.
    """
    modules = _own_modules(model)
    _check_there(modules, name, "name")
    with lock:
        _check_there(modules, name, "name")
        for own in modules.values():
            former = own.selection.chosen
            if former is not None and former != name and own.has(former):
                if own.selection.in_rows(former):  # the last of the blocks that use it will freeze it
                    own.holder(former).lent = True
                else:
                    own.holder(former).freeze()
            if own.has(name):
                own.holder(name).thaw()
                own.holder(name).lent = False
        for selection in _selections(modules):
            selection.varied = selection.varied or name != selection.chosen
            selection.chosen = name


def delete_edit(model: nn.Module, name: str) -> None:
    """Delete an edit. It must not be active, in use by a running `use_edits`, or the one that the patch made.

    Raises:
        ValueError: the model is not patched, has no edit of that name, or the edit is one of these. Nothing is changed
            then.
    """
    modules = _own_modules(model)
    _check_there(modules, name, "name")
    with lock:  # no block with this edit can start between the check and the deletion
        used = next(filter(None, (selection.in_use(name) for selection in _selections(modules))), "")
        if used:
            raise ValueError(f"name: cannot delete {name!r}: {used}")
        if name == DEFAULT:
            raise ValueError(f"name: {name!r} is the edit that rk.patch made; rk.unpatch removes it")
        for own in modules.values():
            own.remove(name)
    for _, module in outer_modules(model):  # records of earlier calls refer to the former edits
        records = module.__dict__.get(RECORDS)
        if records is not None:
            records.forget_edits()


def disable_edits(model: nn.Module) -> Block:
    """Run the base model inside the block: no edit is applied, and the layers run as before the patch.

    The outputs are those of the base model, bit for bit. Its scope is that of `use_edits`; inside `use_edits` it
    disables the rows' edits.

    Raises:
        ValueError: the model is not patched.
    """
    return Block(_selections(edit_modules(model)), None)


def combine_edits(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Add an edit that is a weighted combination of the changes of others.

    Each part is `start + sum(w * (part_i - start))`, so `scale = 1 + sum(w * (scale_i - 1))` and
    `bias = sum(w * bias_i)`. Weights that add up to 1 give weighted means; a single weight below 1 weakens an edit;
    -1 reverses it.

    Args:
        model: a patched model.
        weights: name of an edit to its weight, any finite number.
        name: of the new edit.

    Raises:
        TypeError, ValueError: the model is not patched, a name is unknown or taken, a weight is not a finite number, or
            the edits are of a kind that is initially not the identity (`"ln"`). Nothing is changed then.
    """
    modules = _own_modules(model)
    if not isinstance(weights, Mapping) or not weights:
        raise TypeError(f"weights: got {weights!r}, expected a dict of edit names to numbers")
    for edit, weight in weights.items():
        _check_there(modules, edit, "weights")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not _is_finite(weight):
            raise TypeError(f"weights: got {weight!r} for {edit!r}, expected a finite number")
    for own in modules.values():
        if own.kind is not None and not own.kind.combinable:
            raise ValueError(f"model: its edits are of kind {own.kind.name!r}, which cannot be combined by weights")
    added = new_edit(model, name)
    with torch.no_grad():
        for root, holder in added.values():
            there = [(root.holder(edit), weight) for edit, weight in weights.items() if root.has(edit)]
            for part, target in holder._parameters.items():
                if target is None:
                    continue
                start = PARTS[part].start
                changed = sum(
                    (weight * (_vector(of, part).double() - start) for of, weight in there),
                    torch.zeros((), dtype=torch.float64, device=target.device),
                )
                target.copy_(start + changed)
    publish_edit(added, name)


def use_edits(model: nn.Module, ids: Sequence[str | None]) -> Block:
    """Inside the block each row of a batch uses its own edit, in training and in `generate`.

    The fused operations take the vectors of all edits in the batch, and an id for each row. If a tensor has k times as
    many rows as there are ids (the beams of `generate`, tokens laid out in rows), each id serves k consecutive rows.
    Inactive edits can be trained inside.

    The block is in force for its code and the code called from it: in threads started there, in tasks of asyncio or of
    a `ThreadPoolExecutor` from there, and in the backward pass of a forward there, in any thread. A generator that
    yields inside the block does not pass it to its caller. Blocks may end in any order, in any thread.

    Args:
        model: a patched model.
        ids: for each row of the batch the name of its edit; None for a row without an edit.

    Raises:
        TypeError: ids is a single string or not a sequence.
        ValueError: the model is not patched, an edit is unknown, ids is empty, or has None next to edits of a kind
            that is initially not the identity (`"ln"`); later, for a batch with another number of rows.
    """
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
        raise TypeError(f"ids: got {type(ids).__name__}, expected a list with an edit's name for each row")
    if not ids:
        raise ValueError("ids: got no name, expected one for each row of the batch")
    modules = edit_modules(model)
    for name in ids:
        if name is not None:
            _check_there(modules, name, "ids")
    rows = Rows(ids)
    if rows.names == [None]:
        return Block(_selections(modules), None)
    kinds = [own.kind for own in modules.values() if own.own and own.kind is not None and not own.kind.neutral]
    if kinds and None in rows.names and len(rows.names) > 1:
        raise ValueError(f"ids: rows with edits of kind {kinds[0].name!r} and rows without cannot share a batch")
    trained = _Trained(list(modules.values()), rows)
    rows.thaw = trained.thaw
    return Block(_selections(modules), rows, lambda: _check_all_there(modules, rows), trained.enter, trained.leave)


def _check_all_there(modules: Mapping[str, RedEdit], rows: Rows) -> None:
    """When a block starts: edits may have been deleted since it was made."""
    for name in rows.names:
        if name is not None:
            _check_there(modules, name, "ids")


class _Trained:
    """Makes the edits of a block trainable while it runs; inactive edits are frozen outside."""

    def __init__(self, modules: list[RedEdit], rows: Rows) -> None:
        self.modules, self.rows = modules, rows
        self.names = [name for name in rows.names if name is not None]
        self.running = 0

    def enter(self) -> None:
        self.running += 1
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            self.thaw()

    def thaw(self) -> None:
        """Also called by the first forward with gradients, if the block was entered without."""
        for own in self.modules if self.running else ():
            for name in self.names:
                if own.has(name) and own.holder(name).thaw():
                    own.holder(name).lent = True
                    self.rows.thawed = True

    def leave(self) -> None:
        self.running -= 1
        for own in self.modules:
            for name in self.names:
                if own.has(name) and own.holder(name).lent and not own.selection.in_rows(name):
                    if own.is_active(name):
                        own.holder(name).lent = False
                    else:
                        own.holder(name).freeze()


def _own_modules(model: nn.Module) -> dict[str, RedEdit]:
    """As `edit_modules`, for a model of `rk.patch`. Raises ValueError for edits of another tuner."""
    modules = edit_modules(model)
    if not all(own.own for own in modules.values()):
        raise ValueError("model: its edits are adapters of a tuner such as PEFT's; add and switch them by that tuner")
    return modules


def _selections(modules: Mapping[str, RedEdit]) -> list[Selection]:
    return list({id(own.selection): own.selection for own in modules.values()}.values())


def _check_there(modules: Mapping[str, RedEdit], name: object, argument: str) -> None:
    if not isinstance(name, str) or not any(own.has(name) for own in modules.values()):
        names = dict.fromkeys(name for own in modules.values() for name in own.names)
        raise ValueError(
            f"{argument}: got {name!r}, expected one of the model's edits: {listed(list(map(repr, names)))}"
        )


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer larger than every float
        return False


def _vector(holder: EditVectors, part: str) -> torch.Tensor:
    """A vector with its effective value, which a parametrization may compute."""
    vector = holder.vectors().vectors[part]
    assert vector is not None  # all edits of a model have the same parts
    return vector
