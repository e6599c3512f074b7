"""The plan of a site for its output, kept while its preconditions are unchanged.

The search takes long: whether the block is observed, which edit is active here, whether a forward may run a second
time, and whether the vectors fit. ``csrc/nodes/quick.cpp`` compares a plan's preconditions with the present state, and
repeats the plan.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..backends.arguments import Edit
from ..edits.blocks import any_block
from ..edits.module import RedEdit
from ..ops.ambient import GRAD, INFERENCE, QUIET
from .record import Record

__all__ = ["Records", "SitePlan", "planned"]


class SitePlan:
    """The edit of a site's output, which waits or is applied at once.

    Attributes:
        edit, record: the edit, and the record of the site.
        hooks: torch's count of registered hooks.
        chosen: the active edit.
        vectors: of that edit: the Parameters of a module by name, a name, and the value there.
        modules: of the `RedEdit`.
        dtype, device: of the site's output.
    """

    __slots__ = ("chosen", "device", "dtype", "edit", "hooks", "modules", "record", "vectors")

    def __init__(self, own: RedEdit, h: Tensor, edit: Edit, record: Record) -> None:
        self.edit, self.record = edit, record
        self.hooks, self.chosen, self.modules = RemovableHandle.next_id, own.selection.chosen, own._modules
        self.dtype, self.device = h.dtype, h.device
        self.vectors = tuple(
            (holder._parameters, name, vector)
            for holder in (own._modules.get(own.selection.chosen or ""), own)
            if holder is not None
            for name, vector in holder._parameters.items()
            if vector is not None and any(vector is one for one in edit.vectors.values())
        )


class Records:
    """The records of a site, for each of its modes. A copy of the site starts empty.

    Attributes:
        modes: the records; the last one under -1.
        plans: for a thread's state, and training or not, if the value waits.
        alone: the same if the edit is applied at once.
    """

    __slots__ = ("alone", "modes", "plans")

    def __init__(self) -> None:
        self.modes: dict[int, Record] = {}
        self.plans: dict[int, SitePlan] = {}
        self.alone: dict[int, SitePlan] = {}

    def __reduce__(self) -> tuple[type[Records], tuple[()]]:
        return Records, ()

    def forget_edits(self) -> None:
        """Drop the plans, which refer to all edits of their time."""
        self.plans.clear()
        self.alone.clear()


def planned(own: RedEdit, h: Tensor, edit: Edit, record: Record, now: int) -> SitePlan | None:
    """A plan for later calls, from this call's results; None if they are valid for one call only."""
    plain = edit.ids is None and edit.dropout is None and edit.kind.kernel == "affine" and not record.apart
    if now & ~QUIET or not plain or type(own).live_state is not RedEdit.live_state or own.selection.open or any_block():
        return None
    if own.selection.varied and not now & (GRAD + INFERENCE):
        return None
    plan = SitePlan(own, h, edit, record)
    held = [vector for vector in edit.vectors.values() if vector is not None]
    # Tensors that a kind computes from its parts in each call are not kept.
    return plan if len(plan.vectors) == len(held) and not torch.compiler.is_compiling() else None
