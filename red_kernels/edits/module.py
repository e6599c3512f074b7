"""The module that a site gets: its edits, and the choice of the edit for the site's output."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.ambient import PLAIN, ambient
from ..ops.functional import edit, edit_add_layer_norm
from ..ops.mixing import mix
from .bank import EditBank
from .blocks import state_of
from .kinds import PARTS, Edit, Kind
from .kinds.ln import NORM_EPS
from .kinds.registry import RESERVED
from .recompute import recalled, runs_plainly
from .selection import DEFAULT, OFF, Rows
from .stream import STREAM, initial_of

__all__ = ["CONTEXTS", "EDITED", "NAME", "NORM_EPS", "RECORDS", "SITE", "Edited", "RedEdit", "check_name", "plain_only"]

NAME = "red_edit"  # the child's name in the site: state_dict keys are `<site>.red_edit.scale`
RECORDS = "_red_kernels_records"  # of a module in a patched model: what `fusion` found in earlier calls
SITE = "_red_kernels_site"  # of a RedEdit: its site's name in the patched model
EDITED = "_red_kernels_edited"  # of a RedEdit: the `Edited` of its module


class Edited:
    """A weak reference to an edited module. A copy refers to the module's copy."""

    __slots__ = ("reference",)

    def __init__(self, module: nn.Module | None) -> None:
        self.reference = None if module is None else weakref.ref(module)

    def __call__(self) -> nn.Module | None:
        return None if self.reference is None else self.reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> Edited:
        return Edited(copy.deepcopy(self(), memo))

    def __reduce__(self) -> tuple[type[Edited], tuple[nn.Module | None]]:
        return Edited, (self(),)


class RedEdit(EditBank):
    """The edits of one site, of one kind: RED's `scale * h + bias` (arXiv 2402.15179), or another.

    A call applies the edit in force. Arguments: see `EditBank`.

    Attributes:
        of_tuple: whether the site may return a tuple whose first entry is edited, like layers.
        inside: whether the edit is of the sum to which the site's output is added.
        on_input: whether the edit is of the site's input, by a hook before it.
        place: in its layer, as in `models.family.PLACES` or `NARROWER`; empty if unknown.
        watched: whether `take_reached` checks that the edits have run.
        seen: whether the warning that they have never run was given, or is not needed.
    """

    of_tuple = False
    inside = False
    on_input = False
    place = ""
    watched = False
    seen = False

    def state(self) -> tuple[Any, bool]:
        """The edit of this forward: `OFF`, rows, or an argument of `by_state`; and whether it is a second run."""
        state, block = state_of(self.selection)
        state = self.live_state(state, block is not None)
        if torch.compiler.is_compiling() or runs_plainly(self.selection):
            return state, False
        return recalled(self, state, block)

    def is_active(self, name: str) -> bool:
        """Whether an edit is applied outside all blocks."""
        return name == self.selection.chosen

    def live_state(self, state: Any, in_block: bool) -> Any:
        """The state in force here, given the selection's; a hashable value."""
        return state

    @property
    def off(self) -> bool:
        """Whether edits are disabled in this forward."""
        return self.state()[0] is OFF

    def applied(self, hidden: Tensor) -> Edit | None:
        """The edit applied to `hidden` now; None for none.

        Raises:
            RuntimeError: the forward runs again, but its edit was deleted since, or is unknown.
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
                    "deleted in between; delete it after the backward pass"
                )
        found = self.of_rows(state, hidden, again) if isinstance(state, Rows) else self.by_state(state, again)
        return found if found is None or not found.kind.context else self._in_context(found, hidden)

    def _in_context(self, edit: Edit, hidden: Tensor) -> Edit:
        """The same with the context of its formula."""
        edited: Edited | None = self.__dict__.get(EDITED)
        module = None if edited is None else edited()
        given: dict[str, Tensor | None] = {}
        for name in edit.kind.context:
            if name == "initial":
                given[name] = initial_of(self.__dict__.get(STREAM), hidden, self.__dict__.get(SITE, "an edited module"))
            else:
                value = None if module is None or self.on_input else CONTEXTS[name](module, self.width)
                lies = self.root.lies
                given[name] = value if value is None or lies is None else lies.part_of(value)
        return edit._replace(vectors={**edit.vectors, **given})

    def by_state(self, state: Any, again: bool) -> Edit | None:
        """One edit for all rows."""
        return self.named(state, again)

    def forward(self, hidden: Tensor) -> Tensor:
        """`hidden` of shape `(..., width)`, edited, in its dtype. Raises TypeError if it is not a tensor."""
        if not isinstance(hidden, Tensor):
            what = "input of a module whose input is edited" if self.on_input else "output of an edited module"
            raise TypeError(f"the {what} must be one tensor, got {type(hidden).__name__}")
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


def check_name(name: object) -> None:
    """Raises TypeError or ValueError for an invalid name of an edit."""
    if not isinstance(name, str):
        raise TypeError(f"name: got {name!r}, expected a string")
    if not name or "." in name or hasattr(RedEdit, name) or name in PARTS or name in _TAKEN:
        raise ValueError(f"name: got {name!r}, expected a name of letters, digits and underscores")


_TAKEN = (
    "width",
    "kind",
    "parts",
    "own",
    "selection",
    "training",
    "frozen",
    "lent",
    "watched",
    "seen",
    "inside",
    "lead",
    "of_tuple",
    "on_input",
    "place",
    "lies",
)
RESERVED.update(_TAKEN, dir(RedEdit))  # a part is an attribute of it


def linear_bias(module: nn.Module, width: int) -> Tensor | None:
    """The bias that a linear layer has added to its output; None if it has none, or the module is no linear layer.

    Wrappers of tuners are unwrapped.
    """
    while callable(inner := getattr(module, "get_base_layer", None)) and (base := inner()) is not module:
        module = base
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(bias, Tensor) or not isinstance(weight, Tensor) or weight.dim() < 2:
        return None  # a norm has no matrix
    return bias if bias.shape == (width,) else None


# The context of formulas, by name: from the edited module, and the width of its output.
# (`"initial"` belongs to a forward, not to a module: see `stream`.)
CONTEXTS: dict[str, Callable[[nn.Module, int], Tensor | None]] = {"linear_bias": linear_bias}


def refuse_site(kind: Kind, module: nn.Module, width: int, where: str, on_input: bool = False) -> None:
    """Raise ValueError if a module cannot have an edit of a kind: by its width, or for a missing entry."""
    kind.refuse_width(width, where)
    for name in kind.requires:
        if name not in CONTEXTS:
            continue
        if on_input:
            raise ValueError(f"{where}: an edit of kind {kind.name!r} is of a module's output, and not of its input")
        if CONTEXTS[name](module, width) is None:
            what = name.replace("_", " ")
            raise ValueError(f"{where} has no {what}, of which an edit of kind {kind.name!r} is computed")


def _affine(hidden: Tensor, applied: Edit) -> Tensor:
    vectors = applied.operands
    return edit(hidden, vectors.get("scale"), vectors.get("bias"), edit_ids=applied.ids)


def _affine_layer_norm(hidden: Tensor, applied: Edit) -> Tensor:
    vectors, ids = applied.operands, applied.ids
    scale, bias = vectors.get("scale"), vectors.get("bias")
    weight, norm_bias = vectors.get("norm_weight"), vectors.get("norm_bias")
    if ids is not None:  # the rows' norms differ: their vectors are an edit behind a norm without vectors
        normed, _ = edit_add_layer_norm(hidden, None, scale, bias, None, None, NORM_EPS, edit_ids=ids, need_z=False)
        return edit(normed, weight, norm_bias, edit_ids=ids)
    return edit_add_layer_norm(hidden, None, scale, bias, weight, norm_bias, NORM_EPS, need_z=False)[0]


def _mix(hidden: Tensor, applied: Edit) -> Tensor:
    vectors = applied.operands
    first, second, bias = (vectors.get(name) for name in ("first", "second", "bias"))
    assert first is not None
    return mix(hidden, first, second, bias, blocks=applied.kind.blocks, edit_ids=applied.ids)


def _mix_mix(hidden: Tensor, applied: Edit) -> Tensor:
    vectors = applied.operands
    inner, outer, bias = (vectors.get(name) for name in ("inner", "outer", "bias"))
    assert inner is not None
    assert outer is not None
    blocks, ids = applied.kind.blocks, applied.ids
    return mix(mix(hidden, inner, blocks=blocks, edit_ids=ids), outer, None, bias, blocks=blocks, edit_ids=ids)


_KERNELS = {"affine": _affine, "affine_layer_norm": _affine_layer_norm, "mix": _mix, "mix_mix": _mix_mix}


def plain_only() -> bool:
    """Whether plain PyTorch must run: under `torch.compile` (Inductor fuses), tracing, and `torch.func`."""
    return torch.compiler.is_compiling() or bool(ambient() & PLAIN)
