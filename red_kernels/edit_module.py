"""The module that holds a site's vectors, and the forward hook by which it edits the site's output.

The site itself (a linear layer of any make) stays a black box. A caller that fuses the edit into its own next operation
asks the hook to leave the output alone for one call: `call_unedited`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import lock, state_of
from .edits.kinds import PARTS, Edit, Kind, kind_with
from .edits.kinds.ln import NORM_EPS
from .ops.functional import edit, edit_add_layer_norm
from .recompute import recalled, runs_plainly
from .selection import DEFAULT, OFF, Rows, Selection

__all__ = [
    "INSIDE",
    "NAME",
    "NORM_EPS",
    "OWN_HOOKS",
    "SITE",
    "EditVectors",
    "Gate",
    "RedEdit",
    "applied_inside",
    "call_unedited",
    "edit_hook",
    "edited_output",
    "plain_only",
    "skips_dropout",
    "take_reached",
]

NAME = "red_edit"  # the child's name in the site: state_dict keys are `<site>.red_edit.scale`
INSIDE = "_red_kernels_inside"  # in a layer whose forward applies an edit that no hook could: the path of its site
SITE = "_red_kernels_site"  # of a RedEdit: the name that its site had in the patched model


class Gate:
    """Whether an edit is visible: one for all of its sites, so that it becomes visible at all of them in one step."""

    def __init__(self) -> None:
        self.open = False


class EditVectors(nn.Module):
    """What one edit trains at one site: Parameters named as the parts of its kind, mostly vectors of shape `(width,)`.

    `model.half()`, `model.to(torch.bfloat16)` and the like leave fp32 vectors in fp32: in half precision an update
    smaller than half a rounding step at 1.0 is lost.

    An edit is frozen while it is not active. A backward pass through a forward from before still brings its vectors
    their gradients, as autograd alone would not.

    Args:
        width: of the site's output.
        kind: which tensors there are, and how they start; None for none.
        dtype, device: of the vectors.

    Attributes:
        frozen: the parts that were trainable before `freeze`.
        lent: whether a block of `use_edits` has thawed them, and they are to be frozen behind the last one.
    """

    frozen: tuple[str, ...] = ()
    lent: bool = False

    gate: Gate | None = None  # shared by what becomes visible at once; None for visible at all times

    def __init__(self, width: int, kind: Kind | None, dtype: torch.dtype, device: torch.device | str | None) -> None:
        super().__init__()
        self.kind = kind
        for part in () if kind is None else kind.parts:
            self.register_parameter(part.name, nn.Parameter(part.made(width, dtype, device)))

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return () if self.kind is None else self.kind.names

    def reset_parameters(self) -> None:
        """Back to the start, where vectors on the meta device were given memory without values."""
        with torch.no_grad():
            for part in () if self.kind is None else self.kind.parts:
                vector = self._parameters[part.name]
                if vector is not None:
                    vector.fill_(part.start)

    def freeze(self) -> None:
        """Make the vectors untrainable, until `thaw`."""
        for part, vector in tuple(self._parameters.items()):
            if vector is not None and vector.requires_grad:
                self.frozen = (*self.frozen, part)
                _bring_late_gradients(self, part, vector)
                vector.requires_grad_(False)
        self.lent = False

    def thaw(self) -> bool:
        """Make those vectors trainable again that `freeze` has frozen; whether there were any."""
        held = (self._parameters.get(part) for part in self.frozen)
        found = [vector for vector in held if vector is not None and not vector.requires_grad]
        self.frozen = ()
        for vector in found:
            with torch.inference_mode(vector.is_inference()):  # torch refuses it elsewhere
                vector.requires_grad_(True)
        return bool(found)

    def requires_grad_(self, requires_grad: bool = True) -> EditVectors:
        """As for any module, of the edits inside as well; what `freeze` has frozen and `thaw` would make trainable."""
        for module in self.modules():
            if isinstance(module, EditVectors) and not requires_grad:
                module.freeze()
            elif isinstance(module, EditVectors):
                module.frozen, module.lent = (), False
        super().requires_grad_(requires_grad)
        return self

    def vectors(self, again: bool = False) -> Edit:
        """The edit as it is now. `again`: for the second run of a forward, whose edit may be frozen by now."""
        own, kind = self._parameters, self.kind
        assert kind is not None
        found: dict[str, Tensor | None]
        try:
            found = {name: own[name] for name in kind.names}
        except KeyError:  # FSDP 1 puts views of its flat parameter in their place
            found = {name: getattr(self, name) for name in kind.names}
        if again and self.frozen and torch.is_grad_enabled():
            found = {name: None if vector is None else _trainable_again(vector) for name, vector in found.items()}
        return Edit(kind, found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "kind" not in state:  # of a release whose modules had no kind, and None for parts that they did not have
            own = {name: held for name, held in state["_parameters"].items() if held is not None}
            rest = {name: held for name, held in state.items() if name != "parts"}
            state = {**rest, "_parameters": own, "kind": kind_with(state.get("parts", own))}
        super().__setstate__(state)
        if self.lent:  # a copy, which no block is running in
            self.freeze()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EditVectors:
        def keeping_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype.itemsize < min(4, tensor.dtype.itemsize):
                return tensor.to(moved.device)
            return moved

        super()._apply(keeping_precision, recurse)
        return self


class RedEdit(EditVectors):
    """The edits of one site, of one kind: RED's `scale * h + bias` (arXiv 2402.15179), or another.

    The edit named `"default"` is in the module's own Parameters, further ones are children of their names; `selection`
    says which is applied.

    Args:
        width, kind, dtype, device: as for `EditVectors`.
        selection: shared by all sites of a model.
        own: with False there is no edit yet, and one named `"default"` is a child like others.

    Attributes:
        of_tuple: whether the site may return a tuple, of which the first is edited, as layers do.
        inside: whether no hook can apply the edit, only the forward of the layer.
        watched: whether somebody asks, by `take_reached`, whether the edits have run.
        seen: whether it was said, or need not be, that they have never run.
    """

    of_tuple = False
    inside = False
    watched = False
    seen = False

    def __init__(
        self,
        width: int,
        kind: Kind | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
        selection: Selection | None = None,
        *,
        own: bool = True,
    ) -> None:
        super().__init__(width, kind if own else None, dtype, device)
        self.kind, self.width, self.own = kind, width, own
        self.selection = Selection() if selection is None else selection

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the edits, in the order they came."""
        added = tuple(self._modules.items())  # a copy: another thread may add or delete
        return ((DEFAULT,) if self.own else ()) + tuple(name for name, holder in added if _is_visible(holder))

    def has(self, name: str | None) -> bool:
        """Whether there is an edit of this name."""
        return _is_visible(self._modules.get(name)) if name in self._modules else self.own and name == DEFAULT

    def holder(self, name: str) -> EditVectors:
        """The module whose Parameters are an edit's vectors. Raises KeyError for a name that is not there."""
        if self.own and name == DEFAULT:
            return self
        found = self._modules[name]
        assert isinstance(found, EditVectors)
        return found

    def make(self, dtype: torch.dtype, device: torch.device | str | None) -> EditVectors:
        """The vectors of a further edit, the identity at the start and frozen, which are no part of the module yet."""
        made = EditVectors(self.width, self.kind, dtype, device)
        made.train(self.training)
        made.freeze()
        return made

    def publish(self, name: str, holder: EditVectors) -> None:
        """Make vectors the edit of this name."""
        with lock:  # a new dict and no change of the old one: other threads may be walking through it
            self.__dict__["_modules"] = {**self._modules, name: holder}

    def remove(self, name: str) -> None:
        """Take the edit of this name away, if there is one."""
        with lock:
            self.__dict__["_modules"] = {key: holder for key, holder in self._modules.items() if key != name}

    def named(self, name: str | None, again: bool = False) -> Edit | None:
        """An edit, as by `EditVectors.vectors`; None where this site has none of that name."""
        holder: Any = self._modules.get(name) if name is not None else None
        if holder is None:
            if not self.own or name != DEFAULT:
                return None
            holder = self
        found: Edit = holder.vectors(again)
        return found

    def state(self) -> tuple[Any, bool]:
        """What this forward applies, `OFF`, rows or what `by_state` takes; and whether it runs for the second time."""
        state, block = state_of(self.selection)
        state = self.live_state(state, block is not None)
        if torch.compiler.is_compiling() or runs_plainly(self.selection):
            return state, False
        return recalled(self, state, block)

    def is_active(self, name: str) -> bool:
        """Whether an edit is applied outside of all blocks."""
        return name == self.selection.chosen

    def live_state(self, state: Any, in_block: bool) -> Any:
        """What holds here, given what the selection says; a hashable value."""
        return state

    def versions(self, state: Any) -> tuple[tuple[Tensor, int], ...]:
        """The vectors that a state applies here, and how often each was changed in place."""
        names = state.names if isinstance(state, Rows) else state if isinstance(state, tuple) else (state,)
        return tuple(
            (vector, vector._version)
            for name in names
            if isinstance(name, str) and self.has(name)
            for vector in self.holder(name)._parameters.values()
            if vector is not None and not vector.is_inference()
        )

    @property
    def off(self) -> bool:
        """Whether edits are disabled in this forward."""
        return self.state()[0] is OFF

    def applied(self, hidden: Tensor) -> Edit | None:
        """What is applied to `hidden` now; None for nothing.

        Raises:
            RuntimeError: the forward runs again, and its edit was deleted since, or cannot be told.
        """
        state, again = self.state()
        if state is OFF:
            return None
        if again:
            names = state.names if isinstance(state, Rows) else (state,)
            gone = [name for name in names if self.own and isinstance(name, str) and not self.has(name)]
            if gone:
                raise RuntimeError(
                    f"under activation checkpointing a forward runs again with the edit {gone[0]!r}, which was "
                    "deleted since; delete it behind the backward pass"
                )
        if isinstance(state, Rows):
            return state.vectors(self, hidden, again)
        return self.by_state(state, again)

    def by_state(self, state: Any, again: bool) -> Edit | None:
        """One edit for all rows."""
        return self.named(state, again)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` of shape `(..., width)`, edited, in its dtype. Raises TypeError for what is no tensor."""
        if not isinstance(hidden, Tensor):
            raise TypeError(f"the output of an edited module must be one tensor, got {type(hidden).__name__}")
        applied = self.applied(hidden)
        if applied is None:
            return hidden
        kernel = applied.kind.kernel
        if kernel is None or plain_only() or type(hidden) is not Tensor:
            return applied.plain(hidden)
        return _KERNELS[kernel](hidden, applied)

    def extra_repr(self) -> str:
        names = ", ".join(self.names)
        kind = "" if self.kind is None else f", {self.kind.name}"
        return f"{self.width}{kind}" + ("" if names == DEFAULT else f", edits: {names}")


def _bring_late_gradients(holder: EditVectors, part: str, vector: Tensor) -> None:
    """Let a frozen vector have the gradients of forwards from before: autograd drops those of what is frozen by now."""
    if any(getattr(hook, "func", None) is _late_gradient for hook in (vector._backward_hooks or {}).values()):
        return
    vector.register_hook(partial(_late_gradient, weakref.ref(holder), part))


def _late_gradient(reference: weakref.ref[EditVectors], part: str, gradient: Tensor) -> None:
    holder = reference()
    if holder is None or part not in holder.frozen:  # autograd brings it, or somebody has frozen the vector himself
        return
    vector = holder._parameters.get(part)
    if vector is not None and not vector.requires_grad:
        _accumulate(vector, gradient)


def _accumulate(vector: Tensor, gradient: Tensor) -> None:
    with torch.no_grad():
        vector.grad = gradient.detach().clone() if vector.grad is None else vector.grad + gradient


def _trainable_again(vector: Tensor) -> Tensor:
    """A frozen vector for the second run of a forward from before, whose graph brings it its gradients."""
    if vector.requires_grad or not vector.is_leaf:
        return vector
    with torch.enable_grad():
        alias = vector.detach().requires_grad_()
    alias.register_hook(partial(_accumulate, vector))
    return alias


def _is_visible(holder: object) -> bool:
    gate = getattr(holder, "gate", None)
    return isinstance(holder, EditVectors) and (gate is None or gate.open)


def check_name(name: object) -> None:
    """Raises TypeError or ValueError for what cannot be the name of an edit."""
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}, expected a string")
    if not name or "." in name or hasattr(RedEdit, name) or name in PARTS or name in _TAKEN:
        raise ValueError(f"name: got {name!r}, which cannot be the name of an edit; take letters and digits")


_TAKEN = ("width", "kind", "parts", "own", "selection", "training", "frozen", "lent", "watched", "seen")


def _affine(hidden: Tensor, applied: Edit) -> Tensor:
    vectors = applied.operands
    return edit(hidden, vectors.get("scale"), vectors.get("bias"), edit_ids=applied.ids)


def _affine_layer_norm(hidden: Tensor, applied: Edit) -> Tensor:
    vectors, ids = applied.operands, applied.ids
    scale, bias = vectors.get("scale"), vectors.get("bias")
    weight, norm_bias = vectors.get("norm_weight"), vectors.get("norm_bias")
    if ids is not None:  # the rows' norms differ: their vectors are an edit behind a norm without any
        normed, _ = edit_add_layer_norm(hidden, None, scale, bias, None, None, NORM_EPS, edit_ids=ids, need_z=False)
        return edit(normed, weight, norm_bias, edit_ids=ids)
    return edit_add_layer_norm(hidden, None, scale, bias, weight, norm_bias, NORM_EPS, need_z=False)[0]


_KERNELS = {"affine": _affine, "affine_layer_norm": _affine_layer_norm}


class _Deferred(threading.local):
    def __init__(self) -> None:
        self.reached: set[int] = set()  # ids of watched edits that have run

    edit: RedEdit | None = None  # the edit that the caller applies itself
    dropout: nn.Module | None = None  # the dropout behind it, which the caller applies as well
    output: tuple[RedEdit, Tensor] | None = None  # an edit that is in this output already
    inside: RedEdit | None = None  # an edit that the forward of its layer has applied


_deferred = _Deferred()


def plain_only() -> bool:
    """Whether only plain PyTorch will do: under `torch.compile` (fusion is Inductor's), tracing, and `torch.func`."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
    )


def edit_hook(module: nn.Module, args: Any, output: Any) -> Any:
    """The forward hook of an edited module."""
    own = module._modules.get(NAME)
    compiling = torch.compiler.is_compiling()
    if INSIDE in module.__dict__ and not compiling:
        _check_inside(module)
    if own is None:
        return None
    assert isinstance(own, RedEdit)
    if own.watched and not compiling:
        _deferred.reached.add(id(own))
    first = output[0] if own.of_tuple and type(output) is tuple else output
    if not compiling:
        if _deferred.edit is own:
            _deferred.edit = None
            return None
        done, _deferred.output = _deferred.output, None
        if done is not None and done[0] is own and done[1] is first:
            return None
    # Called as a module: hooks that bring its parameters to the device must fire.
    edited = own(first)
    return edited if first is output else (edited, *output[1:])


OWN_HOOKS: set[Callable[..., Any]] = {edit_hook}  # of this package: they do not keep `z`


def take_reached(own: RedEdit) -> bool:
    """Whether watched edits have run in this thread since this was asked before."""
    reached = _deferred.reached
    if id(own) in reached:
        reached.discard(id(own))
        return True
    return False


def _check_inside(layer: nn.Module) -> None:
    applied, _deferred.inside = _deferred.inside, None
    site: Any = layer
    for part in layer.__dict__[INSIDE]:
        site = site._modules[part]
    own = site._modules[NAME]
    if applied is not own and not own.off:
        raise RuntimeError(
            f"the forward of this {type(layer).__name__} was replaced after patching, and the new one leaves out the "
            "edit behind the residual add of its attention; replace it before patching"
        )


def call_unedited(
    module: nn.Module, own: RedEdit | None, *args: Any, without: nn.Module | None = None, **kwargs: Any
) -> Any:
    """Call a module that ends in the site of `own`, leaving out the edit: the caller applies it. With None, just call.

    `without` is a dropout between the site and the module's end that is left out as well, with the edit.
    """
    if own is None:
        return module(*args, **kwargs)
    outer = _deferred.edit, _deferred.dropout  # of a call that this one is inside of: a hook may run a model
    _deferred.edit, _deferred.dropout = own, without
    try:
        return module(*args, **kwargs)
    finally:
        _deferred.edit, _deferred.dropout = outer


def skips_dropout(dropout: nn.Module) -> bool:
    """Whether this call of a dropout is to be left out."""
    if _deferred.dropout is not dropout:
        return False
    _deferred.dropout = None
    return True


def edited_output(own: RedEdit | None, output: Tensor) -> Tensor:
    """Tell the hook of a block, whose forward has applied its edit to what it returns, to leave that alone."""
    if own is not None:
        _deferred.output = own, output
    return output


def applied_inside(own: RedEdit) -> None:
    """Say that a forward has applied this edit: the hook of the layer, where no hook could, and whoever watches it."""
    if own.inside:
        _deferred.inside = own
    if own.watched:
        _deferred.reached.add(id(own))
