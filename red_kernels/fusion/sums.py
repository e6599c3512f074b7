"""An addition that takes a waiting value, and how the norm of the sum joins the same pass.

The addition knows the norm from an earlier call: it computes `z = residual + dropout(edit(x))` and `y = norm(z)`,
returns `z`, and leaves `y` as a note on that tensor. The norm, when called with that tensor, removes the note and
returns `y`. If the norm is not known yet, the norm that reads `z` computes `y`, to the same bits: results never depend
on what has been learnt. In every other case (another tensor, another norm, an exception, an early exit) the note
disappears with its tensor.

`y` and `z` have separate nodes in the graph (`ops/handover.py`): the gradient of `z` is complete for every reader.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.arguments import Edit, Norm
from ..edits.module import RedEdit
from ..edits.selection import saved_tensor_hooks
from ..ops import fused
from ..ops.ambient import PLAIN, ambient
from ..ops.handover import Handover, norm_of, sum_of
from .applied import left_to_do
from .norms import norm_arguments, spec_of, unobserved
from .observe import chain
from .record import ADDS, Link, Record
from .scopes import Scope, running, stack_of
from .waiting import NO_EDIT, Waiting, edited, wait

__all__ = [
    "NOTE",
    "Note",
    "add",
    "add_edit",
    "hand_over",
    "norm_of_waiting",
    "take_note",
    "title_of",
    "total",
]

_AS_IT_IS = contextlib.nullcontext()
NOTE = "_red_kernels_note"  # the attribute of a sum with its `Note`
_MISSES = 3  # after this many, a sum is known to have no single norm
_SEARCHES = 2  # after this many calls without a norm, it is known to have none


class Note:
    """On a sum: the value of its norm, or the way to compute it.

    Attributes:
        record: of the site.
        scope: in which the sum was made; `stack`: in which it may be handed on, or None.
        source: the module whose output the sum finally is, or None for the scope's.
        handover: the way to compute a norm's value.
        normed, norm, weight: the value, its norm, and the norm's weight then, if it is computed already.
    """

    __slots__ = (
        "__weakref__", "handover", "holder", "hooks", "norm", "normed", "record", "recorded", "scope", "source",
        "stack", "total", "version", "weight",
    )  # fmt: skip

    def __init__(
        self,
        total: Tensor,
        record: Record,
        scope: Scope,
        stack: Scope | None,
        source: nn.Module | None,
        handover: Handover,
        normed: Tensor | None = None,
        norm: nn.Module | None = None,
        weight: Tensor | None = None,
    ) -> None:
        self.record, self.scope, self.stack, self.source = record, scope, stack, source or scope.module
        self.normed, self.norm, self.handover = normed, norm, handover
        self.weight = norm_weight(norm) if weight is None and norm is not None else weight
        self.total = weakref.ref(total)
        self.version = _version(total)
        self.recorded = torch.is_grad_enabled()
        self.hooks = saved_tensor_hooks(True)
        self.holder = scope.left
        total.__dict__[NOTE] = self
        scope.left.append(self)

    def holds_for(self, total: Tensor) -> bool:
        """Whether the sum is unchanged, and its gradient is unobserved."""
        return (
            self.version == _version(total)
            and self.recorded == torch.is_grad_enabled()
            and not total.retains_grad
            and total._backward_hooks is None
            and _same_hooks(self.hooks, saved_tensor_hooks(True))
        )

    def leave(self, scope: Scope) -> None:
        """At the end of its scope: move to the stack, or leave the sum."""
        stack = self.stack
        if stack is not None and stack is not scope:
            self.holder = stack.left
            stack.left.append(self)
            return
        total = self.total()
        if total is not None and stack is scope and (outer := _open_stack(running()[:-1])) is not None:
            self.stack, self.holder = outer, outer.left
            outer.left.append(self)
            return
        self.drop()
        if self.normed is not None:
            self.record.missed()

    def drop(self) -> None:
        """Leave the sum: together with the norm's value, whose graph may refer to it, it would keep it forever."""
        total = self.total()
        if total is not None and total.__dict__.get(NOTE) is self:
            del total.__dict__[NOTE]


def _same_hooks(first: Any, second: Any) -> bool:
    if first is None or second is None:
        return first is second
    return bool(first == second)


def _version(z: Tensor) -> int:
    return -1 if z.is_inference() else z._version


def add(value: Waiting, residual: Tensor) -> Tensor:
    """`residual + value`, for a plain residual of the value's shape on its device."""
    x, edit, record = value.h, value.edit, value.record
    for other in value.others:
        other.record.taken("residual add")
        residual = edited(other.h, residual, other.edit)
    adds = _adds(edit)
    if value.residual is not None:  # a sum to which a further term is added
        record.lazy = True
        residual = value.residual + residual
    after = value.after
    if after is not None:
        total = edited(x, residual, edit)
        record.taken(adds)
        return add_edit(after.own, total, after.record)
    return hand_over(x, residual, edit, record, adds)


def _adds(edit: Edit) -> str:
    return ADDS[edit.dropout is not None]


def total(value: Waiting) -> Tensor:
    """A waiting sum, computed now, with a note for the norm that may read it."""
    return hand_over(value.h, value.residual, value.edit, value.record, _adds(value.edit), later=True)


Record.total = staticmethod(total)


def add_edit(own: RedEdit, total: Tensor, record: Record, source: nn.Module | None = None) -> Tensor:
    """`edit(total)`, an edit of the residual stream, with the norm that reads it; `source` returned the total."""
    edit = left_to_do(own, total)
    if edit is None:
        return own(total)
    if edit is NO_EDIT:
        return total
    return hand_over(total, None, edit, record, "", source)


def hand_over(
    x: Tensor,
    residual: Tensor | None,
    edit: Edit,
    record: Record,
    adds: str,
    source: nn.Module | None = None,
    later: bool = False,
) -> Tensor:
    """`z = residual + dropout(edit(x))`, with `norm(z)` for the norm known to read it.

    The sum waits too, unless this is `later`, if its reader is unknown or varies.
    """
    scopes = running()
    if not scopes:
        record.taken(adds)
        return edited(x, residual, edit)
    scope = scopes[-1]
    for undecided, total, normed in scope.undecided:
        undecided.decide(residual, total, normed)
    if residual is not None and residual.dtype != x.dtype:
        x, residual = fused.of_one_dtype(x, residual)
    record.taken(adds)
    again = saved_tensor_hooks(True) is not None
    waits = record.lazy or record.alone or again or _is_searching(record)
    if waits and residual is not None and not scope.stack and not later and (again or not record.astray):
        if not again:
            record.searches += record.link is None
        value = wait(x, edit, record, residual=residual)
        scope.made.append(weakref.ref(value))
        return value
    link = record.link
    if link is not None and link.norm is None:
        record.missed()
        link = None
    if link is not None and not again:
        found = _ready(link, scopes, x, residual)
        if found is not None:
            record.taken(f"{adds} + {link.title}" if adds else link.title)
            with _counting():
                z, handover = sum_of(x, residual, edit, found)
                normed = norm_of(z, handover, found)
            stack = _open_stack(scopes) if link.across else None
            Note(z, record, scope, stack, source, handover, normed, link.norm)
            return z
    stack = None if again else _open_stack(scopes)
    if ((link is None and (later or _is_searching(record))) or again) and not (scope.stack and stack is None):
        if not later and not again:
            record.searches += 1
        with _counting():
            z, handover = sum_of(x, residual, edit)
        Note(z, record, scope, stack, source, handover)
        return z
    return edited(x, residual, edit)


def _counting() -> contextlib.AbstractContextManager[None]:
    """Let torch count in-place changes of a sum, which it does not for one made in inference mode."""
    return _out_of_inference() if torch.is_inference_mode_enabled() else _AS_IT_IS


@contextlib.contextmanager
def _out_of_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _is_searching(record: Record) -> bool:
    """Whether the readers of a site's sums are unknown, or known to vary."""
    return record.link is None and (record.searches < _SEARCHES or record.misses > 0)


def _open_stack(scopes: list[Scope]) -> Scope | None:
    """The stack in which a sum may now be handed from block to block; None for none."""
    stack = stack_of(scopes)
    if stack is None or stack.collects or saved_tensor_hooks(True) is not None:
        return None
    # Reentrant checkpointing runs a training model without gradients first, and then block by block.
    if stack.module.training and not torch.is_grad_enabled():
        return None
    return stack


def _ready(link: Link, scopes: list[Scope], x: Tensor, residual: Tensor | None) -> Norm | None:
    """The norm's arguments, if a note may be left for it."""
    norm = link.norm
    if norm is None or (link.across and _open_stack(scopes) is None) or not link.unseen():
        return None
    found = norm_arguments(norm, x, residual)
    if found is not None and residual is not None and residual.dtype is x.dtype:
        link.keep(norm, found, x.dtype, x.device, ambient())
    return found


def take_note(norm: nn.Module, z: Tensor) -> Tensor | None:
    """Remove the note from `z`, if there is one, and return `norm(z)` if the note determines it."""
    note: Note | None = z.__dict__.pop(NOTE, None)
    if note is None:
        return None if z._base is None else _take_through_view(norm, z)
    if ambient() & PLAIN:
        return None
    scopes = running()
    within = bool(scopes) and scopes[-1] is note.scope and not note.scope.stack
    if not within and (note.stack is None or note.stack is not stack_of(scopes) or note.stack.collects):
        return None
    if not note.holds_for(z) or not unobserved(norm):
        return None
    record = note.record
    if note.normed is not None:
        if note.norm is norm and note.weight is norm_weight(norm):
            note.holder.remove(note)
            return note.normed
        record.missed()  # another norm reads this sum: it computes the result of a first call
    handover = note.handover
    found = norm_arguments(norm, z, None)
    if found is None:
        return None
    link = _learn(note, norm, within)
    if not link.unseen():
        return None
    if record.misses < _MISSES and note.hooks is None:
        record.link = link
    if record.what is not None:
        record.what = f"{record.what} + {link.title}" if record.what else link.title
    note.holder.remove(note)
    normed = norm_of(z, handover, found)
    if within and not record.decided and note.hooks is None:
        note.scope.undecided.append((record, z, normed))
    return normed


def _take_through_view(norm: nn.Module, z: Tensor) -> Tensor | None:
    """As `take_note`, for a view with the elements of a sum in their order, for example a reshape to rows."""
    total = z._base
    if total is None or NOTE not in total.__dict__ or z.retains_grad or z._backward_hooks is not None:
        return None
    same = z.dtype == total.dtype and z.shape[-1:] == total.shape[-1:] and z.numel() == total.numel()
    if not (same and z.is_contiguous() and total.is_contiguous() and z.storage_offset() == total.storage_offset()):
        return None
    normed = take_note(norm, total)
    return None if normed is None else normed.view(z.shape)


def _learn(note: Note, norm: nn.Module, within: bool) -> Link:
    kind = title_of(norm)
    if within:
        return Link(norm, False, kind, (), (norm,))
    assert note.stack is not None
    stack = note.stack.module
    leaving, entering = tuple(chain(stack, note.source)), tuple(chain(stack, norm))
    title = f"final {kind}" if len(entering) == 1 else f"next layer's {kind}"
    return Link(norm, True, title, leaving, entering)


def title_of(norm: nn.Module) -> str:
    spec = spec_of(norm)
    return "norm" if spec is None else spec.title


def norm_weight(norm: nn.Module) -> Tensor | None:
    """The weight of a known norm."""
    spec = spec_of(norm)
    return norm._parameters.get(spec.weight) if spec is not None and spec.weight else None


def norm_of_waiting(norm: nn.Module, value: Waiting) -> Tensor | None:
    """The norm of a waiting value in one pass; None if the value must be settled first."""
    if not value.waits() or value.others:
        return None
    link, x, residual = value.record.link, value.h, value.residual
    found = norm_arguments(norm, x, residual)
    if found is None:
        return None
    if link is not None and link.norm is norm and residual is not None and residual.dtype is x.dtype:
        link.keep(norm, found, x.dtype, x.device, ambient())
    return normalised(value, found, title_of(norm), norm)


def _keeps(edit: Edit) -> bool:
    """Whether a sum that only its norm reads is kept for the backward, instead of both of its terms.

    The gradient of the scale always needs the site's output.
    """
    vectors = [vector for part, vector in edit.vectors.items() if part != "bias"]
    return torch.is_grad_enabled() and not any(vector is not None and vector.requires_grad for vector in vectors)


def normalised(value: Waiting, found: Norm, title: str, norm: nn.Module | None = None) -> Tensor:
    """The norm of a waiting value, which waits for an addition itself if the value comes from none."""
    record, residual = value.record, value.residual
    scopes = running()
    if residual is not None:
        return _norm_of_sum(value, residual, found, title, norm)
    y, _ = fused.edit_add_norm(value.h, None, value.edit, found, False)
    record.taken(f"its own {title}")
    behind = record.of_norm()
    if (behind.at_once and value.after is None) or not scopes:
        return y
    made = wait(y, NO_EDIT, behind, after=value.after)
    scopes[-1].made.append(weakref.ref(made))
    return made


def _norm_of_sum(value: Waiting, residual: Tensor, found: Norm, title: str, norm: nn.Module | None) -> Tensor:
    """The norm of a waiting sum; the sum is computed as well unless the norm is its only reader."""
    record, again = value.record, saved_tensor_hooks(True) is not None
    record.taken(f"{_adds(value.edit)} + {title}")
    if record.alone and not again:
        return fused.edit_add_norm(value.h, residual, value.edit, found, _keeps(value.edit))[0]
    if record.link is not None and not again:
        value.done, handover = sum_of(value.h, residual, value.edit, found)
        return norm_of(value.done, handover, found)
    z, handover = sum_of(value.h, residual, value.edit)
    value.done = z
    normed = norm_of(z, handover, found)
    scopes = running()
    if norm is not None and not again and record.misses < _MISSES:
        record.link = Link(norm, False, title, (), (norm,))
        if scopes and not record.decided:
            scopes[-1].undecided.append((record, z, normed))
    return normed
