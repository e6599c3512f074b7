"""The functions that take a waiting value as it is: additions, dropouts, factors, views, and norms."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import nodes
from ..backends.arguments import Edit, Norm, affine_edit
from ..ops import fused
from .norms import is_like
from .scopes import running
from .sums import add, normalised
from .waiting import NO_EDIT, PLAIN, TAKERS, Waiting, wait

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]


def _waits(value: object) -> bool:
    """Whether it still waits: a site's value, or its sum."""
    return type(value) is Waiting and value.waits()


def _open(value: object) -> bool:
    """Whether it waits, and was not added yet."""
    return type(value) is Waiting and value.residual is None and value.waits()


def _like(value: Waiting, **changes: Any) -> Waiting:
    """A waiting value that was made from another one."""
    fields: dict[str, Any] = {"others": value.others, "after": value.after, **changes}
    made = wait(fields.pop("h", value.h), fields.pop("edit", value.edit), value.record, **fields)
    scopes = running()
    if scopes:
        scopes[-1].made.append(weakref.ref(made))
    return made


# --- additions


def _add(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    first, second = args
    value, residual = (first, second) if type(first) is Waiting else (second, first)
    total = nodes.added(value, residual)
    if total is not None:
        return total
    if type(residual) is Waiting:
        if not _waits(residual):
            residual = residual.settle()
        elif not _waits(value):
            value, residual = residual, value.settle()
        else:
            return _meet(value, residual)
    if not _waits(value):
        return NotImplemented
    kind = type(residual)
    if kind not in PLAIN or not is_like(residual, value.h) or not residual.is_floating_point():
        return NotImplemented
    return add(value, residual)


def _meet(first: Waiting, second: Waiting) -> Any:
    """The sum of two waiting values: it waits for the residual, if neither has one."""
    if first is second or first.shape != second.shape:
        return NotImplemented
    if first.residual is not None or second.residual is not None:  # a sum is settled, and the other one added to it
        value, other = (first, second) if second.residual is not None else (second, first)
        return add(value, other.settle())
    if first.after is not None or second.after is not None or first.h.dtype != second.h.dtype:
        return NotImplemented
    if second.edit is NO_EDIT:  # the one with an edit goes into the last pass
        first, second = second, first
    others = (*first.others, *second.others, first)
    return _like(second, others=others)


def _add_in_place(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    target, other = args
    if type(target) is Waiting:
        if not _waits(target) or target.base is not None or target.viewed or target.others:
            return NotImplemented
        if type(other) is Waiting:
            if target.residual is None and _open(other):
                met = _meet(_like(target), other)
                if met is not NotImplemented:
                    target.done = met
                    return met
            other = other.settle()
        if type(other) not in PLAIN or not is_like(other, target.h) or other.dtype != target.h.dtype:
            return NotImplemented
        target.done = add(target, other)  # every holder of the target sees the sum
        return target.done
    if type(target) not in PLAIN or not _open(other) or not is_like(target, other.h):
        return NotImplemented
    if target.dtype != other.h.dtype or (target.is_leaf and target.requires_grad and torch.is_grad_enabled()):
        return NotImplemented
    total = add(other, target)
    return target.copy_(total.settle() if type(total) is Waiting else total)


# --- dropout


def _dropout(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    if len(args) == 1 and len(kwargs) == 3:  # as `F.dropout` passes it on
        (value,), p, training, inplace = args, kwargs["p"], kwargs["training"], kwargs["inplace"]
    else:
        names = ("input", "p", "training", "inplace")
        value, p, training, inplace = _given(args, kwargs, names, (None, 0.5, True, False))
    if not _waits(value):
        return NotImplemented
    if not training or p == 0.0:
        return value
    if (
        value.residual is not None
        or value.others
        or inplace
        or value.edit.dropout is not None
        or not isinstance(p, float)
        or not 0.0 <= p < 1.0
    ):
        return NotImplemented
    return _like(value, edit=value.edit._replace(dropout=fused.drawn_dropout(p, True, value.h)))


def _torch_dropout(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    value, p, training = _given(args, kwargs, ("input", "p", "train"), (None, None, None))
    return _dropout(func, (value, p, training), {}) if p is not None and training is not None else NotImplemented


# --- factors


def _mul(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    first, second = args
    value, factor = (first, second) if type(first) is Waiting else (second, first)
    if not _open(value) or type(factor) is Waiting:
        return NotImplemented
    edits = [_times(one.edit, factor, one.h) for one in (value, *value.others)]
    found = [edit for edit in edits if edit is not None]
    if len(found) < len(edits):
        return NotImplemented
    others = tuple(_like(one, edit=edit) for one, edit in zip(value.others, found[1:], strict=True))
    return _like(value, edit=found[0], others=others)


def _div(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    if kwargs or len(args) != 2 or type(args[1]) not in (int, float) or args[1] == 0:
        return NotImplemented
    return _mul(func, (args[0], 1.0 / args[1]), {})


def _times(edit: Edit, factor: Any, h: Tensor) -> Edit | None:
    """The edit with a result scaled by a factor, a number or a tensor; None if no edit has it."""
    if edit.kind.kernel != "affine":
        return None
    kind, width = type(factor), h.shape[-1]
    if kind is float or kind is int:
        own: Any = float(factor)
    elif kind in PLAIN and factor.is_floating_point() and factor.layout is torch.strided:
        if torch.result_type(h, factor) != h.dtype or (factor.dim() and factor.device != h.device):
            return None
        if factor.dim() > h.dim() or h.dtype == torch.float64:
            return None
        wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
        if factor.numel() == 1:
            own = wide.reshape(()).to(h.device)
        elif factor.numel() == width and factor.shape[-1] == width:
            own = wide.reshape(width)
        else:
            return _times_by_sample(edit, factor, wide, h)
    else:
        return None
    scale, bias = edit.vectors.get("scale"), edit.vectors.get("bias")
    if scale is None:
        scale = torch.ones(width, device=h.device) * own
        if edit.ids is not None and bias is not None:
            scale = scale.expand(bias.shape[0], width).contiguous()
    else:
        scale = scale * own
    return affine_edit(scale, None if bias is None else bias * own, edit.ids, edit.dropout)


def _times_by_sample(edit: Edit, factor: Tensor, wide: Tensor, h: Tensor) -> Edit | None:
    """A gate of each sample: `(batch, 1, ..., 1 or width)`; each sample gets its own vectors."""
    width, batch = h.shape[-1], h.shape[0]
    if edit.ids is not None or factor.dim() != h.dim() or h.dim() < 2 or factor.shape[0] != batch:
        return None
    if factor.shape[-1] not in (1, width) or any(size != 1 for size in factor.shape[1:-1]) or h.numel() == 0:
        return None
    own = wide.reshape(batch, -1).expand(batch, width)
    scale, bias = edit.vectors.get("scale"), edit.vectors.get("bias")
    ids = torch.arange(batch, device=h.device).view(-1, *(1,) * (h.dim() - 2)).expand(h.shape[:-1]).contiguous()
    return affine_edit(
        (own if scale is None else scale * own).contiguous(), None if bias is None else bias * own, ids, edit.dropout
    )


# --- views and casts


def _view(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Views and reshapes that keep the order of the elements, and the last dimension."""
    if not args or not _waits(args[0]):
        return NotImplemented
    value, *how = args
    if not value.h.is_contiguous():
        return _moved(value, lambda tensor: func(tensor, *how, **kwargs))
    return _viewed(value, lambda tensor: func(tensor, *how, **kwargs))


def _viewed(value: Any, view: Callable[[Tensor], Tensor], ordered: bool = True) -> Any:
    if value.others:
        return NotImplemented
    h, edit, residual = value.h, value.edit, value.residual
    if residual is not None and not residual.is_contiguous():
        return NotImplemented
    seen = view(h)
    if not _keeps_rows(h, seen) or seen.numel() != h.numel():
        return NotImplemented
    if not ordered and edit.dropout is not None:  # the mask depends on the order of the elements
        return NotImplemented
    if edit.ids is not None:
        edit = edit._replace(ids=_ids(edit.ids, h, view))
    if h.data_ptr() != seen.data_ptr() and h.numel():
        return NotImplemented
    value.viewed = True
    if residual is not None:
        value.record.lazy = True
        residual = view(residual)
    return _like(value, h=seen, edit=edit, residual=residual, base=value, again=view)


def _moved(value: Waiting, move: Callable[[Tensor], Tensor]) -> Any:
    """Operations that copy whole rows to other places may do so before the edit."""
    if value.residual is not None or value.others or value.after is not None or value.edit.dropout is not None:
        return NotImplemented
    h, edit = value.h, value.edit
    moved = move(h)
    if not _keeps_rows(h, moved) or moved is h:
        return NotImplemented
    if edit.ids is not None:
        edit = edit._replace(ids=_ids(edit.ids, h, move))
    return _like(value, h=moved, edit=edit)


def _keeps_rows(h: Tensor, seen: Any) -> bool:
    return type(seen) is Tensor and seen.dtype == h.dtype and seen.dim() > 0 and seen.shape[-1] == h.shape[-1]


def _ids(ids: Tensor, h: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """The ids of the rows after a view or a move."""
    return view(ids.unsqueeze(-1).expand(h.shape).contiguous())[..., 0].contiguous()


def _roll(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """`torch.roll` along other dimensions than the last."""
    value, shifts, dims = _given(args, kwargs, ("input", "shifts", "dims"), (None, None, None))
    if not _open(value) or dims is None:
        return NotImplemented
    along = dims if isinstance(dims, (tuple, list)) else (dims,)
    count = value.dim()
    if not along or any(type(at) is not int or at % count == count - 1 for at in along):
        return NotImplemented
    return _moved(value, lambda tensor: torch.roll(tensor, shifts, dims))


def _sliced(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Slices along other dimensions than the last."""
    if len(args) != 2 or kwargs or not _open(args[0]):
        return NotImplemented
    value, index = args
    index = index if type(index) is tuple else (index,)
    rest = value.dim() - 1
    if len(index) > rest and index[rest:] == (slice(None),):
        index = index[:rest]
    if not index or len(index) > rest or any(type(one) is not slice for one in index):
        return NotImplemented
    return _moved(value, lambda tensor: tensor[index].contiguous())


def _transpose(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    if kwargs or len(args) != 3 or not _waits(args[0]):
        return NotImplemented
    value, *how = args
    if not value.h.is_contiguous():
        return NotImplemented
    last = value.dim() - 1
    if any(type(at) is not int or at % (last + 1) == last for at in how):
        return NotImplemented
    return _viewed(value, lambda tensor: func(tensor, *how), ordered=False)


def _permute(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    if kwargs or not args or not _waits(args[0]):
        return NotImplemented
    value, *how = args
    if not value.h.is_contiguous():
        return NotImplemented
    order = how[0] if len(how) == 1 and type(how[0]) in (tuple, list, torch.Size) else how
    count = value.dim()
    if len(order) != count or any(type(at) is not int for at in order) or order[-1] % count != count - 1:
        return NotImplemented
    return _viewed(value, lambda tensor: func(tensor, *how), ordered=False)


def _same(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """`contiguous`; the sum always is."""
    if len(args) != 1 or kwargs or not _waits(args[0]):
        return NotImplemented
    value = args[0]
    return value if value.h.is_contiguous() else _moved(value, Tensor.contiguous)


def _cast(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """A cast to its present dtype and device."""
    if not args or not _waits(args[0]):
        return NotImplemented
    value = args[0]
    if kwargs.keys() - {"dtype", "device", "non_blocking"}:
        return NotImplemented
    for wanted in (*args[1:], *(kwargs[name] for name in ("dtype", "device") if name in kwargs)):
        if isinstance(wanted, torch.dtype):
            same = wanted == value.h.dtype
        elif isinstance(wanted, (torch.device, str)):
            same = torch.device(wanted) == value.h.device
        elif isinstance(wanted, Tensor) and len(args) == 2:
            same = wanted.dtype == value.h.dtype and wanted.device == value.h.device
        else:
            return NotImplemented
        if not same:
            return NotImplemented
    return value


def _cast_to(dtype: torch.dtype) -> Callable[[Any, Arguments, Keywords], Any]:
    def cast(func: Any, args: Arguments, kwargs: Keywords) -> Any:
        value = args[0]
        return value if len(args) == 1 and not kwargs and _open(value) and value.h.dtype == dtype else NotImplemented

    return cast


# --- norms called as functions


def _layer_norm(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    value, shape, weight, bias, eps = _given(args, kwargs, names, (None, None, None, None, 1e-5))
    return _norm(value, shape, Norm(weight, bias, eps, 0.0, True), "LayerNorm")


def _rms_norm(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    value, shape, weight, eps = _given(args, kwargs, ("input", "normalized_shape", "weight", "eps"), (None,) * 4)
    if eps is None and isinstance(value, Tensor) and value.is_floating_point():
        eps = torch.finfo(value.dtype).eps
    return _norm(value, shape, Norm(weight, None, eps, 0.0, False), "RMSNorm")


def _norm(value: Any, shape: Any, norm: Norm, title: str) -> Any:
    if not _waits(value) or value.others:
        return NotImplemented
    h = value.h
    if tuple(shape) != h.shape[-1:] or (h.dtype != torch.float32 and torch.is_autocast_enabled(h.device.type)):
        return NotImplemented
    for vector in norm[:2]:
        if vector is not None and (
            type(vector) not in PLAIN
            or vector.dtype != h.dtype
            or vector.device != h.device
            or vector.shape != h.shape[-1:]
        ):
            return NotImplemented
    if value.residual is not None and value.residual.dtype != h.dtype:
        return NotImplemented
    return normalised(value, norm, title)


def _given(args: Arguments, kwargs: Keywords, names: tuple[str, ...], defaults: tuple[Any, ...]) -> list[Any]:
    found = dict(zip(names, defaults, strict=True))
    found.update(zip(names, args, strict=False))
    found.update(kwargs)
    return [found[name] for name in names]


def _data_ptr(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    raise RuntimeError(
        "data_ptr: the output of an edited site has no memory until it is added to the residual stream; pass it to a "
        "torch operation first"
    )


def _made_like(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """A new tensor, with the value's dtype and device, and perhaps its shape."""
    value, *how = args
    return func(value.h, *how, **kwargs) if type(value) is Waiting else NotImplemented


for _functions, _taker in (
    ((Tensor.add, torch.add), _add),
    ((Tensor.add_,), _add_in_place),
    ((F.dropout,), _dropout),
    ((torch.dropout,), _torch_dropout),
    ((Tensor.mul, torch.mul, torch.multiply, Tensor.multiply), _mul),
    ((Tensor.div, torch.div, torch.true_divide, Tensor.true_divide), _div),
    (
        (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.unflatten, Tensor.unsqueeze,
         torch.unsqueeze, Tensor.squeeze, torch.squeeze, Tensor.view_as, Tensor.reshape_as),
        _view,
    ),
    ((Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes), _transpose),
    ((Tensor.permute, torch.permute), _permute),
    ((Tensor.contiguous,), _same),
    ((Tensor.roll, torch.roll), _roll),
    ((Tensor.__getitem__,), _sliced),
    ((Tensor.to, Tensor.type_as), _cast),
    ((Tensor.float,), _cast_to(torch.float32)),
    ((Tensor.half,), _cast_to(torch.float16)),
    ((Tensor.bfloat16,), _cast_to(torch.bfloat16)),
    ((Tensor.double,), _cast_to(torch.float64)),
    ((F.layer_norm,), _layer_norm),
    ((F.rms_norm,), _rms_norm),
    ((Tensor.data_ptr,), _data_ptr),
    (
        (Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor, torch.empty_like,
         torch.zeros_like, torch.ones_like, torch.full_like),
        _made_like,
    ),
):  # fmt: skip
    for _function in _functions:
        TAKERS[_function] = _taker
