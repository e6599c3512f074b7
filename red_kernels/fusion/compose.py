"""What the fused forwards are made of: each takes the fused operation where it may and the plain composition elsewhere.

`own` is the edit of `x`, and `after` that of the residual stream behind the addition (in `edit_then_norm`, of what the
norm gives); each is the site's `RedEdit`, or None for no edit. `p` and `training` are those of the dropout behind
`own`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..backends.arguments import Edit, affine_edit, operands_of
from ..edits.module import RedEdit, plain_only
from ..ops import fused
from ..ops.checks import fits
from .deferral import applied_inside, call_unedited
from .fingerprint import BASE, unwrapped
from .handoff import NextNorm, leave_note
from .norms import globally_hooked, is_dense, is_like, norm_arguments, unobserved

__all__ = [
    "ARGUMENTS",
    "CACHES",
    "LINK",
    "add",
    "add_then_norm",
    "arguments_of",
    "behind",
    "edit_add_to_next",
    "edit_then_norm",
    "given",
    "left_of_dropout",
    "may_defer",
]

LINK = "_red_kernels_next"  # the attribute of a fused block that holds its `NextNorm`
ARGUMENTS = "_red_kernels_arguments"  # the attribute of a fused block's class that holds its `Arguments`
CACHES = ("past_key_values", "cache")  # what releases of transformers call the cache of keys and values
_PLAIN = (Tensor, nn.Parameter)


class Arguments(NamedTuple):
    """What a library's forward takes beside its first argument: all names, those without a default, and defaults."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    defaults: dict[str, Any]


_NO_EDIT = affine_edit()


class _Sum(NamedTuple):
    """`residual + dropout(edit(x))`, not computed yet."""

    x: Tensor
    residual: Tensor | None
    edit: Edit  # without the dropout, whose seed is not drawn yet
    p: float
    training: bool

    @property
    def with_dropout(self) -> Edit:
        """The edit with the dropout behind it."""
        if not self.training or not self.p:
            return self.edit
        return self.edit._replace(dropout=fused.drawn_dropout(self.p, True, self.x))


def arguments_of(forward: Callable[..., Any]) -> Arguments:
    """What a library's forward takes beside the block and its first argument."""
    parameters = list(inspect.signature(unwrapped(forward)).parameters.values())[2:]
    named = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    defaults = {one.name: one.default for one in named if one.default is not inspect.Parameter.empty}
    return Arguments(
        tuple(one.name for one in named),
        tuple(one.name for one in named if one.name not in defaults),
        # A cache may come under its former name, and attention would then find two.
        {name: value for name, value in defaults.items() if name not in CACHES},
    )


def given(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a block's forward was called with beside its first argument, by the names that the library gives it.

    The names differ between releases (the cache is `past_key_values` or `cache`), so a fused forward that only hands an
    argument on does not name it. Raises TypeError where the library's own forward would.
    """
    names, required, defaults = getattr(type(block), ARGUMENTS)
    if args:
        if len(args) > len(names):
            raise TypeError(
                f"{type(block).__name__}.forward takes {len(names) + 1} positional arguments, got {len(args) + 1}"
            )
        for name in names[: len(args)]:
            if name in kwargs:
                raise TypeError(f"{type(block).__name__}.forward got multiple values for argument {name!r}")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    for name in required:
        if name not in kwargs:
            raise TypeError(f"{type(block).__name__}.forward is missing the argument {name!r}")
    return {**defaults, **kwargs}


def may_defer(outer: nn.Module, site: nn.Module, own: RedEdit) -> bool:
    """Whether the caller of `outer` may apply the edit of `site` itself, and nobody could tell."""
    if (
        len(site._forward_hooks) != 1  # our own
        or site._backward_hooks
        or site._backward_pre_hooks
        or site._compiled_call_impl is not None
        or not unobserved(own)
    ):
        return False
    return outer is site or unobserved(outer)


def behind(own: RedEdit | None, dropout: nn.Dropout | nn.Identity) -> tuple[float, bool]:
    """`p` and `training` of a dropout inside of what `call_unedited` calls: left out together with an edit only."""
    if own is None or isinstance(dropout, nn.Identity):
        return 0.0, False
    return dropout.p, dropout.training


def left_of_dropout(dropout: nn.Module, x: Tensor) -> tuple[Tensor, float, bool]:
    """`x`, and `p` and `training` of the dropout of it that the caller is to apply.

    Where somebody hooks the dropout, or it is no `nn.Dropout` any more, the module is called, and none is left: then no
    edit of `x` waits to be applied before it, as a fused forward gets those edits only that no hook can apply.
    """
    kind = type(dropout)
    if getattr(kind, BASE, kind) is nn.Dropout and unobserved(dropout) and not globally_hooked():
        p: Any = dropout.p
        return x, p, dropout.training
    return dropout(x), 0.0, False


def add(x: Tensor, residual: Tensor, own: RedEdit | None = None, p: float = 0.0, training: bool = False) -> Tensor:
    """`residual + dropout(edit(x))`."""
    return _computed(_sum(x, residual, own, None, p, training))


def add_then_norm(
    x: Tensor,
    residual: Tensor,
    norm: nn.Module,
    p: float = 0.0,
    training: bool = False,
    *,
    own: RedEdit | None = None,
    after: RedEdit | None = None,
) -> tuple[Tensor, Tensor]:
    """`z = after(residual + dropout(edit(x)))` and `norm(z)`, as `(norm(z), z)`."""
    if after is not None:
        applied_inside(after)
    pending = _sum(x, residual, own, after, p, training)
    found = norm_arguments(norm, pending.x, pending.residual)
    if found is None:
        z = _computed(pending)
        return norm(z), z
    normed, summed = fused.edit_add_norm(pending.x, pending.residual, pending.with_dropout, found)
    assert summed is not None
    return normed, summed


def edit_then_norm(
    x: Tensor,
    residual: Tensor | None,
    own: RedEdit | None,
    norm: nn.Module,
    p: float = 0.0,
    training: bool = False,
    *,
    after: RedEdit | None = None,
) -> Tensor:
    """`after(norm(residual + dropout(edit(x))))`, for norms behind the site's own residual add, or without one."""
    if after is not None:
        applied_inside(after)
    pending = _sum(x, residual, own, None, p, training)
    if after is None:
        found = norm_arguments(norm, pending.x, pending.residual)
        if found is None:
            return norm(_computed(pending))
        return fused.edit_add_norm(pending.x, pending.residual, pending.with_dropout, found, False)[0]
    z = _computed(pending)
    found, applied = norm_arguments(norm, z, None, after), _applied(after, z)
    if found is None or applied is None or applied is _NO_EDIT:
        # The edit may hang on the norm itself, which then leaves it out.
        return after(call_unedited(norm, after, z))
    return fused.norm_edit(z, found, applied)


def edit_add_to_next(
    block: nn.Module,
    x: Tensor,
    residual: Tensor,
    own: RedEdit | None,
    p: float = 0.0,
    training: bool = False,
    *,
    after: RedEdit | None = None,
) -> Tensor:
    """`z = after(residual + dropout(edit(x)))`, with `norm(z)` for the next norm as a note on it where that may be."""
    pending = _sum(x, residual, own, after, p, training)
    link: NextNorm | None = block.__dict__.get(LINK)
    if link is not None and not plain_only():
        found = link.arguments(block, pending.x, pending.residual)
        if found is not None:
            norm, arguments = found
            normed, z = fused.edit_add_norm(pending.x, pending.residual, pending.with_dropout, arguments)
            assert z is not None
            leave_note(z, normed, norm)
            return z
    return _computed(pending)


def _sum(
    x: Tensor, residual: Tensor | None, own: RedEdit | None, after: RedEdit | None, p: float, training: bool
) -> _Sum:
    """What is to be computed; all but its last addition is done where there is an edit behind that."""
    edit = _NO_EDIT
    if own is not None:
        x, edit = _left_to_do(own, x)
    pending = _Sum(x, residual, edit, p, training)
    if after is None:
        return pending
    z, edit = _left_to_do(after, _computed(pending))
    return _Sum(z, None, edit, 0.0, False)


def _left_to_do(own: RedEdit, x: Tensor) -> tuple[Tensor, Edit]:
    """`x` and the edit that a fused operation has to apply to it; or `x` edited already, and none."""
    applied = _applied(own, x)
    return (own(x), _NO_EDIT) if applied is None else (x, applied)


def _applied(own: RedEdit, x: Tensor) -> Edit | None:
    """The edit that a fused operation can take, and that fits `x`; `_NO_EDIT` for none; None: call the module.

    That is so for tensors that are not plain, such as sharded ones, for kinds of edit whose kernel takes no addition,
    and for edits with hooks, which may bring their vectors to the device.
    """
    if plain_only() or not is_dense(x) or (own.inside and not unobserved(own)):
        return None
    applied = own.applied(x)
    if applied is None:
        return _NO_EDIT
    if applied.kind.kernel != "affine":
        return None
    applied = operands_of(applied)
    width, device, dimensions = x.shape[-1], x.device, 1 if applied.ids is None else 2
    for vector in applied.vectors.values():
        if vector is not None and not (type(vector) in _PLAIN and fits(vector, width, device, dimensions)):
            return None
    return applied


def _computed(pending: _Sum) -> Tensor:
    x, residual, edit, p, training = pending
    edits = edit is not _NO_EDIT
    if residual is None:
        return fused.edit(x, edit) if edits else x
    if edits and is_like(residual, x):
        return fused.edit_add(x, residual, pending.with_dropout)
    if edits:
        x = fused.edit(x, edit)
    return residual + (nn.functional.dropout(x, p, training) if training and p else x)
