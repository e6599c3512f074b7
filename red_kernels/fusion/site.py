"""The forward hook that edits a site's output: at once, or by the addition that takes it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..backends import nodes
from ..backends.arguments import Edit
from ..edits.module import NAME, RECORDS, SITE, RedEdit, plain_only
from ..edits.selection import saved_tensor_hooks
from ..ops import fused
from ..ops.ambient import ambient
from . import takers as takers  # they register themselves
from .applied import left_to_do
from .fingerprint import BASE
from .former import INSIDE, refuse_inside
from .norms import is_dense, norm_arguments, unobserved
from .observe import observed
from .plan import Records, planned
from .record import Record
from .scopes import OWN_HOOKS, running
from .stream import marked
from .sums import add_edit, title_of
from .waiting import APPLIED, NO_EDIT, After, Waiting, wait

__all__ = [
    "BEHIND",
    "CARRIER",
    "RECORDS",
    "behind_hook",
    "carry_hook",
    "edit_hook",
    "last_record",
    "norm_with_edit",
    "record_of",
    "take_reached",
    "with_first",
]

BEHIND = "_red_kernels_behind"  # of a norm: the `RedEdit` of the site whose output is the norm's, and the site
CARRIER = "_red_kernels_carrier"  # of an unedited projection with a waiting output: a `RedEdit` of its layer


class _Told(threading.local):
    output: tuple[RedEdit, Tensor] | None = None  # an edit applied to this output already
    normed: _Normed | None = None  # the output of a norm that its site may return


class _Normed(NamedTuple):
    """A norm's result for `x`, for the edit of the site that may return it."""

    own: RedEdit
    output: weakref.ref[Tensor]
    x: Tensor
    norm: nn.Module


_told = _Told()


def record_of(own: nn.Module, training: bool) -> Record:
    """The record of a site, under its `RedEdit` or itself, in its present mode."""
    records = own.__dict__.get(RECORDS)
    if records is None:
        records = own.__dict__[RECORDS] = Records()
    mode = 2 * training + torch.is_grad_enabled()
    record: Record | None = records.modes.get(mode)
    if record is None:
        record = records.modes[mode] = Record(own.__dict__.get(SITE, ""))
    records.modes[-1] = record  # the last one
    return record


def last_record(own: nn.Module) -> Record | None:
    """The record of a site in its last mode; None before it ran."""
    records = own.__dict__.get(RECORDS)
    return None if records is None else records.modes.get(-1)


def edit_hook(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of an edited module."""
    if not is_dynamo_compiling():
        value = nodes.edited(module, output)
        if value is not None:
            return value
    own: Any = module._modules.get(NAME)
    if INSIDE in module.__dict__:
        refuse_inside(module)
    if own is None:
        return None
    assert isinstance(own, RedEdit)
    plain = plain_only()
    if own.watched and not (plain and torch.compiler.is_compiling()):
        reach(own)
    first = output[0] if own.of_tuple and isinstance(output, (tuple, list)) and output else output
    if not plain:
        if _is_edited(own, first):
            return None
        edited = _from_norm(own, module, first)
        if edited is None:
            edited = _in_pass(own, module, first)
        if edited is not None:
            return edited if first is output else with_first(output, edited)
        edited = _alone(own, module, first)
        if edited is not None:
            return edited if first is output else with_first(output, edited)
    # A module call: hooks that move its parameters to the device must run.
    if own.inside:
        if own.off:
            return None
        edited = marked(first, own)
    else:
        edited = own(_taken_over(first) if type(first) is Waiting else first)
    return edited if first is output else with_first(output, edited)


def with_first(output: Any, first: Tensor) -> Any:
    """A copy of a tuple, named or not, or a list, with another first entry."""
    if hasattr(output, "_fields"):
        return output._replace(**{output._fields[0]: first})
    return type(output)((first, *output[1:]))


def behind_hook(norm: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of the norm that gives the stream behind an attention, in a post-norm layer."""
    own: RedEdit = norm.__dict__[BEHIND][0]
    if own.watched and not torch.compiler.is_compiling():
        reach(own)
    if not plain_only():
        if _is_edited(own, output):
            return None
        edited = _from_norm(own, norm, output)
        if edited is not None:
            return edited
    return own(output)


def carry_hook(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of an attention's last projection in a layer whose FFN is edited.

    Its output has no edit, and waits for the same addition and norm, which then take one pass.
    """
    if not is_dynamo_compiling():
        value = nodes.carried(module, output)
        if value is not None:
            return value
    if torch.compiler.is_compiling():
        return None
    own: RedEdit = module.__dict__[CARRIER]
    scopes = running()
    if not scopes or type(output) is not Tensor or not output.is_floating_point() or plain_only() or own.off:
        return None
    scope = scopes[-1]
    record = record_of(module, module.training)
    if record.at_once or not is_dense(output) or not scope.lets_wait(own):
        return None
    _plan(module, own, module, output, NO_EDIT, record)
    value = wait(output, NO_EDIT, record)
    scope.made.append(weakref.ref(value))
    return value


def _alone(own: RedEdit, module: nn.Module, h: Any) -> Tensor | None:
    """The edit of a site in its own pass; None if the module must be called."""
    record = record_of(own, module.training)
    record.alone_in_pass()
    if own.inside or type(h) is not Tensor or not record.at_once:
        return None
    edit = left_to_do(own, h)
    if edit is None or edit is NO_EDIT:
        return None
    plan = planned(own, h, edit, record, ambient())
    if plan is not None:
        own.__dict__[RECORDS].alone[2 * ambient() + module.training] = plan
    return fused.edit(h, edit)


def _plan(holder: nn.Module, own: RedEdit, module: nn.Module, h: Tensor, edit: Edit, record: Record) -> None:
    """Keep this call's results for later calls, if the taker of the value is known by now."""
    now = ambient()
    if record.proven:
        plan = planned(own, h, edit, record, now)
        if plan is not None:
            holder.__dict__[RECORDS].plans[2 * now + module.training] = plan


OWN_HOOKS.update((edit_hook, carry_hook, behind_hook))


class _Reached(threading.local):
    def __init__(self) -> None:
        self.ids: set[int] = set()  # of watched edits that have run


_reached = _Reached()


def _reach(own: RedEdit) -> None:
    _reached.ids.add(id(own))


def _take_reached(own: RedEdit) -> bool:
    reached = _reached.ids
    if id(own) in reached:
        reached.discard(id(own))
        return True
    return False


reach: Callable[[RedEdit], None] = nodes.reach or _reach
# Whether the edit of a site has run in this thread since the last check.
take_reached: Callable[[RedEdit], bool] = nodes.take_reached or _take_reached


def _in_pass(own: RedEdit, module: nn.Module, h: Any) -> Tensor | None:
    """The output of a site whose edit shares a pass with its taker, usually a waiting one; None: edit it at once."""
    scopes = running()
    if not scopes:
        return None
    if own.place in ("res", "attn_res") and not own.inside:
        return _stream(own, module, h)
    record = record_of(own, module.training)
    if record.at_once and not own.inside:
        return None
    scope = scopes[-1]
    if not scope.lets_wait(own):
        return None
    if own.inside:
        return _stream_behind(own, h, record)
    if type(h) is Waiting:
        h = _taken_over(h)
    if type(h) is not Tensor:
        return None
    edit = left_to_do(own, h)
    if edit is NO_EDIT and own.off:
        return None  # with all edits off the model's results are the base model's, to the bit
    record.apart = edit is None
    if edit is None:  # its takers still share one pass
        if not is_dense(h) or not h.is_floating_point():
            return None
        h, edit = own(h), APPLIED
        if type(h) is not Tensor:
            return h
    _plan(own, own, module, h, edit, record)
    value = wait(h, edit, record)
    scope.made.append(weakref.ref(value))
    return value


def _taken_over(value: Waiting) -> Tensor:
    """A site's output that waits already, like that of an unedited projection in it."""
    unedited = value.edit is NO_EDIT and value.after is None and value.residual is None and not value.others
    return value.h if unedited and value.done is None else value.settle()


def _stream(own: RedEdit, module: nn.Module, z: Any) -> Tensor | None:
    """The edit of a block's output, in one pass with the norm that reads it."""
    if type(z) is Waiting:
        z = z.settle()
    if type(z) is not Tensor or observed(module) or not unobserved(own):
        return None
    return add_edit(own, z, record_of(own, module.training), module)


def _stream_behind(own: RedEdit, h: Any, record: Record) -> Tensor | None:
    """An attention's output, for the addition behind which the stream is edited."""
    if type(h) is Waiting and h.waits() and h.residual is None and not h.others:
        h.after = After(own, record)
        return h
    h = h.settle() if type(h) is Waiting else h
    if type(h) is not Tensor or not h.is_floating_point() or own.off:
        return None  # then the edit is applied in plain operations, or is off
    value = wait(h, NO_EDIT, record, after=After(own, record))
    running()[-1].made.append(weakref.ref(value))
    return value


def norm_with_edit(norm: nn.Module, x: Tensor, forward: Callable[..., Any]) -> Any:
    """`norm(x)`, for a norm whose output may be an edited site's: with the edit, in one pass, if it is.

    Whether the site returns it unchanged depends on the site's forward. The first call shows it.
    """
    own, site = norm.__dict__[BEHIND]
    _told.output = _told.normed = None
    if not unobserved(own) or not unobserved(site, own):
        return forward(norm, x)
    record = record_of(own, norm.training)
    if record.returned_by != _forwards(site):
        y = forward(norm, x)
        if type(y) is Tensor:
            _told.normed = _Normed(own, weakref.ref(y), x, norm)
        return y
    y = _with_edit(own, norm, x, record)
    if y is None:
        return forward(norm, x)
    _told.output = own, y
    return y


def _with_edit(own: RedEdit, norm: nn.Module, x: Tensor, record: Record) -> Tensor | None:
    """`edit(norm(x))` in one pass; None if that is not possible."""
    found = norm_arguments(norm, x, None, own)
    edit = None if found is None else left_to_do(own, x)
    if found is None or edit is None or edit is NO_EDIT:
        return None
    record.taken(title_of(norm))
    return fused.norm_edit(x, found, edit)


def _from_norm(own: RedEdit, site: nn.Module, output: Any) -> Tensor | None:
    """The edited output of a site that returned its norm's output, to the bits of later calls."""
    normed, _told.normed = _told.normed, None
    if normed is None or normed.own is not own or normed.output() is not output:
        return None
    record = record_of(own, normed.norm.training)
    if saved_tensor_hooks(True) is None:  # a second run must save the tensors of the first one
        record.returned_by = _forwards(site)
    return _with_edit(own, normed.norm, normed.x, record)


def _is_edited(own: RedEdit, output: Any) -> bool:
    """Whether the norm has applied the edit to an output already."""
    done = _told.output
    if done is None or done[0] is not own:
        return False
    _told.output = None
    if done[1] is not output:
        for record in own.__dict__[RECORDS].modes.values():
            record.returned_by = None
        raise RuntimeError(
            f"model: {own.__dict__.get(SITE, 'an edited site')} returned its norm's output unchanged before, but not "
            "in this call, after the norm applied the edit; run the forward again: the edit is then applied to the "
            "returned tensor"
        )
    return True


def _forwards(site: nn.Module) -> tuple[Any, Any]:
    """The forward of a site's class, and of the base of ours: either may be replaced."""
    kind = type(site)
    base = kind.__dict__.get(BASE)
    return kind.forward, None if base is None else base.forward
