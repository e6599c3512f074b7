"""The forward hook by which a site's output is edited: at once, or by the addition that takes it."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.module import NAME, SITE, RedEdit, plain_only
from ..ops import fused
from . import takers as takers  # which register themselves
from .applied import left_to_do
from .norms import is_dense, norm_arguments, unobserved
from .scopes import OWN_HOOKS, observed, running
from .stream import marked
from .sums import Record, add_edit, title_of
from .waiting import NO_EDIT, After, Waiting, wait

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
]

BEHIND = "_red_kernels_behind"  # of a norm: the `RedEdit` of the site whose output is the norm's, and the site
CARRIER = "_red_kernels_carrier"  # of an unedited projection whose output waits: a `RedEdit` of its layer
RECORDS = "_red_kernels_records"


class _Told(threading.local):
    def __init__(self) -> None:
        self.reached: set[int] = set()  # ids of watched edits that have run

    output: tuple[RedEdit, Tensor] | None = None  # an edit that is in this output already


_told = _Told()


class Records:
    """What is known of a site, for each mode that it runs in. A copy of the site starts anew."""

    __slots__ = ("modes",)

    def __init__(self) -> None:
        self.modes: dict[int, Record] = {}

    def __reduce__(self) -> tuple[type[Records], tuple[()]]:
        return Records, ()


def record_of(own: nn.Module, training: bool) -> Record:
    """What is known of a site, by its `RedEdit` or itself, in the mode that it runs in."""
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
    """What is known of a site in the mode that it ran in last; None before it ran."""
    records = own.__dict__.get(RECORDS)
    return None if records is None else records.modes.get(-1)


def edit_hook(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of an edited module."""
    own = module._modules.get(NAME)
    if own is None:
        return None
    assert isinstance(own, RedEdit)
    plain = plain_only()
    if own.watched and not (plain and torch.compiler.is_compiling()):
        _told.reached.add(id(own))
    first = output[0] if own.of_tuple and type(output) is tuple else output
    if not plain:
        done, _told.output = _told.output, None
        if done is not None and done[0] is own and done[1] is first:
            return None
        edited = _in_pass(own, module, first)
        if edited is not None:
            return edited if first is output else (edited, *output[1:])
    # Called as a module: hooks that bring its parameters to the device must fire.
    if own.inside:
        if own.off:
            return None
        edited = marked(first, own)
    else:
        edited = own(first)
    return edited if first is output else (edited, *output[1:])


def behind_hook(norm: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of the norm that gives the stream behind an attention, in a post-norm layer."""
    own: RedEdit = norm.__dict__[BEHIND][0]
    if own.watched and not torch.compiler.is_compiling():
        _told.reached.add(id(own))
    if not plain_only():
        done, _told.output = _told.output, None
        if done is not None and done[0] is own and done[1] is output:
            return None
    return own(output)


def carry_hook(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of an attention's last projection in a layer whose FFN is edited.

    Its output has no edit, and waits for the same addition and norm, which then take one pass.
    """
    own: RedEdit = module.__dict__[CARRIER]
    scopes = running()
    if not scopes or type(output) is not Tensor or not output.is_floating_point() or plain_only() or own.off:
        return None
    scope = scopes[-1]
    record = record_of(module, module.training)
    if record.at_once or scope.stack or not is_dense(output):
        return None
    if not scope.verdict.holds_for(own, scope.module):
        return None
    value = wait(output, NO_EDIT, record)
    scope.made.append(weakref.ref(value))
    return value


OWN_HOOKS.update((edit_hook, carry_hook, behind_hook))


def take_reached(own: RedEdit) -> bool:
    """Whether watched edits have run in this thread since this was asked before."""
    reached = _told.reached
    if id(own) in reached:
        reached.discard(id(own))
        return True
    return False


def _in_pass(own: RedEdit, module: nn.Module, h: Any) -> Tensor | None:
    """The output of a site whose edit shares a pass with what follows, mostly one that waits; None: edit it at once."""
    scopes = running()
    if not scopes:
        return None
    if own.place in ("res", "attn_res") and not own.inside:
        return _stream(own, module, h)
    record = record_of(own, module.training)
    if record.at_once and not own.inside:
        return None
    scope = scopes[-1]
    if scope.stack or not scope.verdict.holds_for(own, scope.module):
        return None
    if own.inside:
        return _stream_behind(own, h, record)
    if type(h) is not Tensor:
        return None
    edit = left_to_do(own, h)
    if edit is None or edit is NO_EDIT:
        return None
    value = wait(h, edit, record)
    scope.made.append(weakref.ref(value))
    return value


def _stream(own: RedEdit, module: nn.Module, z: Any) -> Tensor | None:
    """The edit of a block's output, in one pass with the norm that reads it."""
    if type(z) is Waiting:
        z = z.settle()
    if type(z) is not Tensor or observed(module) or not unobserved(own):
        return None
    return add_edit(own, z, record_of(own, module.training), module)


def _stream_behind(own: RedEdit, h: Any, record: Record) -> Tensor | None:
    """What an attention returns, for the addition behind which the stream is edited."""
    if type(h) is Waiting and h.done is None and h.residual is None and not h.others:
        h.after = After(own, record)
        return h
    h = h.settle() if type(h) is Waiting else h
    if type(h) is not Tensor or not h.is_floating_point() or own.off:
        return None  # then the edit is applied in plain operations, or is off
    value = wait(h, NO_EDIT, record, after=After(own, record))
    running()[-1].made.append(weakref.ref(value))
    return value


def norm_with_edit(norm: nn.Module, x: Tensor) -> Tensor | None:
    """`edit(norm(x))` in one pass, for a norm whose output is that of an edited site; None where that may not be."""
    own, site = norm.__dict__[BEHIND]
    if not unobserved(own) or not unobserved(site, own):
        return None
    found = norm_arguments(norm, x, None, own)
    if found is None:
        return None
    edit = left_to_do(own, x)
    if edit is None or edit is NO_EDIT:
        return None
    y = fused.norm_edit(x, found, edit)
    record_of(own, norm.training).taken(title_of(norm))
    _told.output = own, y
    return y
