"""A waiting value: an edited site's output, not edited yet; the addition behind it applies the edit in its own pass.

`Waiting` is a tensor without storage. It refers to the site's output and the edit; `takers.py` lists the functions that
take it as it is. Any other function settles it: the edit is applied, and the call continues with a plain tensor. So no
code needs to know of it, and none can get a wrong value.

Autograd does not pass through it. A torch function sees plain tensors instead. `autograd.Function.apply` and callers in
C++ do not dispatch. For them the value has its own node until its taker is known, and later one that raises, so that no
gradient is ever lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..backends import nodes
from ..backends.arguments import Edit, affine_edit
from ..edits.selection import saved_tensor_hooks
from ..ops import fused
from ..ops.autograd import direct
from ..ops.passes import Gradients
from .stream import marked

if TYPE_CHECKING:
    from ..edits.module import RedEdit
    from .record import Record

__all__ = ["APPLIED", "NO_EDIT", "PLAIN", "TAKERS", "After", "Waiting", "edited", "wait"]

NO_EDIT = affine_edit()
APPLIED = affine_edit()  # of a value whose edit had its own pass
PLAIN = (Tensor, nn.Parameter)
TAKERS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}  # by function; `takers.py` fills it
_ALONE = 2  # references to a value in only one attribute: that, and the argument of `getrefcount`
_wrapper: Any = Tensor._make_wrapper_subclass
_metadata: set[Any] = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta",
                 "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps", "itemsize", "is_leaf")
    if hasattr(getattr(Tensor, name, None), "__get__")
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.element_size, Tensor.get_device, Tensor.__len__, Tensor.is_signed, Tensor.ndimension,
}  # fmt: skip


class After(NamedTuple):
    """An edit of the sum with a value, and the record of its site."""

    own: RedEdit
    record: Record


class Waiting(Tensor):
    """The output of a site, and its pending edit.

    No slots: attributes with the class's value need not be set, and most have it.

    Attributes:
        h: the site's output, or a view of it.
        edit: with the factors and the dropout behind it.
        record: the record of the site.
        residual: the other term of the addition, if the norm of the sum is awaited too.
        others: waiting values to which this one was added.
        after: an edit of the sum with this value; it cannot be applied to the value alone.
        base, again: the viewed value, and the function that views it.
        viewed: whether this value has a view.
        done: the plain tensor in its place, once it is settled with gradients, or needs none.
    """

    h: Tensor
    edit: Edit
    record: Record
    residual: Tensor | None = None
    others: tuple[Waiting, ...] = ()
    after: After | None = None
    base: Waiting | None = None
    again: Callable[[Tensor], Tensor] | None = None
    viewed = False
    done: Tensor | None = None
    differentiable: bool

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # it was passed to compiled code: settle it outside the graph
            from ..edits.uncompiled import uncompiled

            plain = uncompiled(_plainly, (args, kwargs or {}), getattr(func, "__name__", str(func)))
            return func(*plain[0], **plain[1])
        taker = TAKERS.get(func)
        if taker is not None:
            found = taker(func, args, kwargs or {})
            if found is not NotImplemented:
                return found
        elif func in _metadata:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        return func(*_plainly(args, name), **_plainly(kwargs or {}, name))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch.no_grad():  # autograd is on the outside
            return func(*_plainly(args, str(func)), **_plainly(kwargs or {}, str(func)))

    def waits(self) -> bool:
        """Whether it may still be taken as it is.

        Not after its base was settled, and perhaps changed. Nor without gradients if it was made with them: this may be
        the forward of an `autograd.Function`, whose gradient goes to the node of this wrapper.
        """
        if self.done is not None or (self.differentiable and not torch.is_grad_enabled()):
            return False
        base = self.base
        while base is not None:
            if base.done is not None:
                return False
            base = base.base
        return True

    def settle(self) -> Tensor:
        """The edited value as a plain tensor, computed once."""
        done = self.done
        if type(done) is Waiting:  # it was added to in place
            return done.settle()
        if done is None:
            done = self._computed()
            if torch.is_grad_enabled() or not self.differentiable:
                self.done = done
                self.base = self.again = None  # so that its base is not computed for it alone
            else:  # perhaps by the forward of an autograd.Function
                self.record.astray, self.record.proven = True, False
        return done

    def settle_for(self, name: str) -> Tensor:
        """As `settle`; the report names this function as the taker of the site's value."""
        if self.done is None:
            if self.residual is None:
                self.record.settled(name)
            else:
                self.record.alone = False
        return self.settle()

    def _shares_memory(self) -> bool:
        """Whether it is a view of a value with other references, or of a settled one."""
        if self.base is None:
            return False
        return sys.getrefcount(self.base) > _ALONE or self.base.done is not None or self.base.base is not None

    def _computed(self) -> Tensor:
        if self.after is not None:
            return marked(edited(self.h, None, self.edit), self.after.own)
        # A view of a value with other references must share its memory.
        if self.again is not None and self._shares_memory():
            assert self.base is not None
            return self.again(self.base.settle())
        if self.residual is not None:
            return self.record.total(self)
        residual: Tensor | None = None
        for other in self.others:
            residual = other.settle() if residual is None else residual + other.settle()
        return edited(self.h, residual, self.edit)


def edited(x: Tensor, residual: Tensor | None, edit: Edit) -> Tensor:
    """`residual + dropout(edit(x))`; `x` itself if there is nothing to compute."""
    plain = edit.dropout is None and edit.ids is None and not any(v is not None for v in edit.vectors.values())
    if residual is None:
        if plain:
            return x
        return fused.edit(x, edit) if edit.dropout is None else fused.edit_add(x, None, edit)
    return residual + x if plain else fused.edit_add(x, residual, edit)


def wait(
    h: Tensor,
    edit: Edit,
    record: Record,
    *,
    residual: Tensor | None = None,
    others: tuple[Waiting, ...] = (),
    after: After | None = None,
    base: Waiting | None = None,
    again: Callable[[Tensor], Tensor] | None = None,
) -> Waiting:
    """A waiting value. The edit's vectors fit `h`, a dense floating-point tensor."""
    needs = torch.is_grad_enabled() and (_asks(h, edit, residual) or any(other.differentiable for other in others))
    # Under hooks for saved tensors a second run must save the same: no node that only a first run needs.
    second = saved_tensor_hooks(True) is not None
    unknown = not (record.proven or second) if residual is None else second or record.link is None
    if needs and unknown and not others:
        made: Any = _node(h, residual, edit, *edit.vectors.values())
        made.h, made.edit, made.record, made.differentiable = h, edit, record, True
    else:
        made = _made(h, edit, record, needs)
    made.residual, made.others, made.after, made.base, made.again = residual, others, after, base, again
    return made


def _made(h: Tensor, edit: Edit, record: Record, needs: bool) -> Waiting:
    made: Waiting = _wrapper(Waiting, h.shape, dtype=h.dtype, device=h.device, requires_grad=needs)
    if needs:
        with torch._C.DisableTorchFunctionSubclass():
            made._backward_hooks = _LOST
    made.h, made.edit, made.record, made.differentiable = h, edit, record, needs
    return made


def _asks(h: Tensor, edit: Edit, residual: Tensor | None) -> bool:
    """Whether one of them requires gradients."""
    if h.requires_grad or (residual is not None and residual.requires_grad):
        return True
    for vector in edit.vectors.values():  # noqa: SIM110 - a generator takes three times as long
        if vector is not None and vector.requires_grad:
            return True
    return False


class WaitingFunction(Function):
    """``apply(h, residual, edit, *vectors)``: the wrapper, with a node for takers that do not dispatch."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, residual: Tensor | None, edit: Edit, *vectors: Tensor | None) -> Tensor:
        ctx.edit = edit
        ctx.save_for_backward(h, residual, *vectors)
        return _wrapper(Waiting, h.shape, dtype=h.dtype, device=h.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        dy, saved = grads[0], ctx.saved_tensors
        if dy is None:
            return (None,) * (len(saved) + 1)
        with torch.enable_grad():
            leaves = [None if t is None else t.detach().requires_grad_() for t in saved]
            vectors = dict(zip(ctx.edit.vectors, leaves[2:], strict=True))
            assert leaves[0] is not None
            again = edited(leaves[0], leaves[1], ctx.edit._replace(vectors=vectors))
        need = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:])
        wanted = [needed and leaf is not None for leaf, needed in zip(leaves, need, strict=True)]
        asked: Any = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(again, asked, dy))
        dh, dresidual, *rest = (next(found) if want else None for want in wanted)
        return dh, dresidual, None, *rest


_node = direct(WaitingFunction)


def _lost(gradient: Tensor) -> None:
    raise RuntimeError(
        "the value of an edited site went to an autograd.Function or to C++ code, where the addition took it before; "
        "its gradient would be lost; run the forward again: the edit is then applied at once"
    )


_LOST: Any = {0: _lost}
if nodes.set_lost_gradient is not None:
    nodes.set_lost_gradient(_lost)


def _plainly(value: Any, name: str) -> Any:
    """The same with all waiting values settled."""
    kind = type(value)
    if kind is Waiting:
        return value.settle_for(name)
    if kind is tuple or kind is list:
        return kind(_plainly(part, name) for part in value)
    if kind is dict:
        return {key: _plainly(part, name) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(_plainly(part, name) for part in value))
    return value
