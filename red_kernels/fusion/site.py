"""The forward hook by which a site's output is edited: at once, or by the addition that takes it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.arguments import Edit
from ..edits.module import NAME, SITE, RedEdit, plain_only
from ..edits.selection import saved_tensor_hooks
from ..ops import fused
from ..ops.ambient import GRAD, ambient
from . import takers as takers  # which register themselves
from .applied import left_to_do
from .fingerprint import BASE
from .former import INSIDE, refuse_inside
from .norm_kinds import is_one_kernel
from .norms import is_dense, norm_arguments, unobserved
from .observe import observed
from .plan import SitePlan, planned
from .record import Record
from .scopes import OWN_HOOKS, here, running
from .stream import marked
from .sums import add_edit, title_of
from .waiting import NO_EDIT, After, Waiting, wait, wait_as_before

__all__ = [
    "BEHIND",
    "CARRIER",
    "RECORDS",
    "Carrier",
    "behind_hook",
    "carry_hook",
    "edit_hook",
    "last_record",
    "least_that_waits",
    "norm_with_edit",
    "record_of",
    "take_reached",
    "wait_in_any_size",
    "with_first",
]

BEHIND = "_red_kernels_behind"  # of a norm: the `RedEdit` of the site whose output is the norm's, and the site
CARRIER = "_red_kernels_carrier"  # of an unedited projection whose output waits: its `Carrier`
RECORDS = "_red_kernels_records"


# On a CPU, where each norm of a model is one kernel by itself: for fewer elements, to let a value wait takes the host
# longer than the passes that this saves (docs/decisions.md has the figures).
_LEAST = 1 << 12


def least_that_waits(norms: list[nn.Module]) -> int:
    """From how many elements on a value waits on a CPU, in a model with these norms."""
    return _LEAST if norms and all(map(is_one_kernel, norms)) else 0


def wait_in_any_size(model: nn.Module) -> None:
    """Let the values of all sites wait, however few elements they have."""
    for module in model.modules():
        if isinstance(module, RedEdit):
            module.least = 0
        carrier = module.__dict__.get(CARRIER)
        if carrier is not None:
            module.__dict__[CARRIER] = carrier._replace(least=0)


class Carrier(NamedTuple):
    """Of an unedited projection whose output waits: a `RedEdit` of its layer, and the least elements on a CPU."""

    own: RedEdit
    least: int


class _Told(threading.local):
    def __init__(self) -> None:
        self.reached: set[int] = set()  # ids of watched edits that have run

    output: tuple[RedEdit, Tensor] | None = None  # an edit that is in this output already
    normed: _Normed | None = None  # the output of a norm that its site may return


class _Normed(NamedTuple):
    """What a norm has computed of `x`, for the edit of the site that may return it."""

    own: RedEdit
    output: weakref.ref[Tensor]
    x: Tensor
    norm: nn.Module


_told = _Told()


class Records:
    """What is known of a site, for each mode that it runs in. A copy of the site starts anew.

    Attributes:
        modes: the records; the last one by -1.
        plans: for what holds in a thread, and training or not, where the value waits.
        alone: the same where the edit is applied at once.
    """

    __slots__ = ("alone", "modes", "plans")

    def __init__(self) -> None:
        self.modes: dict[int, Record] = {}
        self.plans: dict[int, SitePlan] = {}
        self.alone: dict[int, SitePlan] = {}

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
    own: Any = module._modules.get(NAME)
    if type(output) is Tensor and own is not None and not torch.compiler.is_compiling():
        value: Tensor | None = None
        if not own.least or not _is_small(output, own.least):
            value = _as_before(own, own, module, output)
        if value is None:
            value = _alone_as_before(own, module, output)
        if value is not None:
            if own.watched:
                _told.reached.add(id(own))
            return value
    if INSIDE in module.__dict__:
        refuse_inside(module)
    if own is None:
        return None
    assert isinstance(own, RedEdit)
    plain = plain_only()
    if own.watched and not (plain and torch.compiler.is_compiling()):
        _told.reached.add(id(own))
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
    # Called as a module: hooks that bring its parameters to the device must fire.
    if own.inside:
        if own.off:
            return None
        edited = marked(first, own)
    else:
        edited = own(_taken_over(first) if type(first) is Waiting else first)
    return edited if first is output else with_first(output, edited)


def with_first(output: Any, first: Tensor) -> Any:
    """A tuple, named or not, or a list, with another first entry; the caller's own is left as it is."""
    if hasattr(output, "_fields"):
        return output._replace(**{output._fields[0]: first})
    return type(output)((first, *output[1:]))


def behind_hook(norm: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of the norm that gives the stream behind an attention, in a post-norm layer."""
    own: RedEdit = norm.__dict__[BEHIND][0]
    if own.watched and not torch.compiler.is_compiling():
        _told.reached.add(id(own))
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
    own, least = module.__dict__[CARRIER]
    if _is_small(output, least):
        return None
    if type(output) is Tensor and not torch.compiler.is_compiling():
        value = _as_before(module, own, module, output)
        if value is not None:
            return value
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


def _as_before(holder: nn.Module, own: RedEdit, module: nn.Module, h: Tensor) -> Waiting | None:
    """The value of a site that waits as in an earlier call; None where that has to be found anew.

    `holder` has what is known of the site.
    """
    records: Records | None = holder.__dict__.get(RECORDS)
    scopes = here.scopes
    if records is None or not scopes:
        return None
    now, scope = ambient(), scopes[-1]
    plan = records.plans.get(2 * now + module.training)
    if plan is None or plan.record.at_once or not scope.lets_wait_as_before(own, now & GRAD):
        return None
    if not plan.holds(own, now, h):
        return None
    records.modes[-1] = plan.record
    value = wait_as_before(h, plan.edit, plan.record)
    scope.made.append(weakref.ref(value))
    return value


def _is_small(h: Any, least: int) -> bool:
    """Whether an output on a CPU, or in the twin of a model there, has too few elements to wait."""
    return least > 0 and type(h) is Tensor and (h.is_cpu or h.is_meta) and h.numel() < least


def _alone(own: RedEdit, module: nn.Module, h: Any) -> Tensor | None:
    """The edit of a site in a pass of its own; None where the module has to be called."""
    record = record_of(own, module.training)
    small = _is_small(h, own.least)
    record.alone_in_pass(own.least if small else 0)
    if own.inside or type(h) is not Tensor or not (small or record.at_once):
        return None
    edit = left_to_do(own, h)
    if edit is None or edit is NO_EDIT:
        return None
    plan = planned(own, h, edit, record, ambient())
    if plan is not None:
        own.__dict__[RECORDS].alone[2 * ambient() + module.training] = plan
    return fused.edit(h, edit)


def _alone_as_before(own: RedEdit, module: nn.Module, h: Tensor) -> Tensor | None:
    """As `_alone`, where that is as in an earlier call."""
    records: Records | None = own.__dict__.get(RECORDS)
    if records is None or not records.alone:
        return None
    now = ambient()
    plan = records.alone.get(2 * now + module.training)
    small = _is_small(h, own.least)
    if plan is None or not (small or plan.record.at_once) or not plan.holds(own, now, h):
        return None
    nodes = plan.nodes_for(h)
    if nodes is None:
        return None
    records.modes[-1] = plan.record
    plan.record.alone_in_pass(own.least if small else 0)
    edited: Tensor = nodes.edit(h, None, plan.edit)
    return edited


def _plan(holder: nn.Module, own: RedEdit, module: nn.Module, h: Tensor, edit: Edit, record: Record) -> None:
    """Let later calls take what this one has found, where it is known by now who takes the value."""
    now = ambient()
    if record.proven:
        plan = planned(own, h, edit, record, now)
        if plan is not None:
            holder.__dict__[RECORDS].plans[2 * now + module.training] = plan


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
    if (record.at_once and not own.inside) or _is_small(h, own.least):
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
    if edit is None or (edit is NO_EDIT and own.off):
        return None  # with all edits off the model computes what it did, to the bit
    _plan(own, own, module, h, edit, record)
    value = wait(h, edit, record)
    scope.made.append(weakref.ref(value))
    return value


def _taken_over(value: Waiting) -> Tensor:
    """What a site returns that waits already, as the output of an unedited projection in it does."""
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
    """What an attention returns, for the addition behind which the stream is edited."""
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
    """`norm(x)`, for a norm whose output may be that of an edited site: with the edit, in one pass, where it is.

    Whether the site returns it as it is depends on the site's forward. The first call tells.
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
    """`edit(norm(x))` in one pass; None where that may not be."""
    found = norm_arguments(norm, x, None, own)
    edit = None if found is None else left_to_do(own, x)
    if found is None or edit is None or edit is NO_EDIT:
        return None
    record.taken(title_of(norm))
    return fused.norm_edit(x, found, edit)


def _from_norm(own: RedEdit, site: nn.Module, output: Any) -> Tensor | None:
    """The edited output of a site that has returned the output of its norm, to the bits of later calls."""
    normed, _told.normed = _told.normed, None
    if normed is None or normed.own is not own or normed.output() is not output:
        return None
    record = record_of(own, normed.norm.training)
    if saved_tensor_hooks(True) is None:  # a second run has to save what the first one has saved
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
            f"model: {own.__dict__.get(SITE, 'an edited site')} used to return the output of its norm as it is, and "
            "does not do so now, after the edit was applied by the norm; run the forward again: the edit is then "
            "applied to what it returns"
        )
    return True


def _forwards(site: nn.Module) -> tuple[Any, Any]:
    """The forward of a site's class, and of the class that ours is made from: either may be replaced."""
    kind = type(site)
    base = kind.__dict__.get(BASE)
    return kind.forward, None if base is None else base.forward
