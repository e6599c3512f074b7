"""Training on processes with different rows: the gradients of the vectors are summed."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from .find import edit_modules
from .lies import Lies

__all__ = ["sum_gradients_over"]


def sum_gradients_over(model: nn.Module, group: Any) -> None:
    """Sum the gradients of a patched model's vectors over a process group, in each backward pass.

    For processes that each have a part of the rows of one batch, as under sequence or context parallelism. A vector
    serves all rows, so its gradient is the sum over all of them. The sum applies to all edits of the model, also to
    those added later, to gradient accumulation, and under FSDP2 and DDP over other groups. All processes of the group
    must run the same backward passes.

    The loss of a process must be its share of the whole: a sum over its rows, divided by the number of all rows. If
    each process takes the mean over its own rows, divide the loss by the size of the group.

    Args:
        model: patched by `rk.patch`, wrapped for distributed training or not.
        group: a `ProcessGroup`, or a `DeviceMesh` of one dimension, over which neither DDP nor FSDP2 averages.

    Raises:
        TypeError: group has another type.
        ValueError: the model is not patched; this process is not in the group, or the mesh has several dimensions; the
            gradients are summed over this group already. Nothing is changed then.
    """
    found = _group_of(group)
    roots = {id(own.root): own.root for own in edit_modules(model).values()}
    if any(root.lies is not None and found in root.lies.groups for root in roots.values()):
        raise ValueError("group: the gradients of this model's vectors are summed over it already")
    for root in roots.values():
        root.lies = (root.lies or Lies()).summed_over(found)


def _group_of(group: Any) -> dist.ProcessGroup:
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(f"group: got a mesh of {group.ndim} dimensions, expected one; take mesh['name']")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not in it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, expected a ProcessGroup or a DeviceMesh")
    return group
