"""How the vectors of a site are placed on several processes: each one's part, and the sums of gradients.

Under tensor parallelism a process has all columns of a site's output, or a part of them. The vectors are DTensors:
logically whole, and split like the columns. If the processes of a group have different rows, each has the gradients of
the vectors from its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..support.sharded import is_sharded, spread
from .kinds import Edit, Kind
from .vectors import EditVectors

__all__ = ["Lies", "spread_vectors"]


class Lies:
    """How the vectors of a site are placed on several processes. It never changes; copies of a model share it.

    Attributes:
        kind: of the edit that this process applies; None for the vectors' own kind.
        columns: whether this process has only a part of the columns.
        groups: the process groups over which gradients are summed.
    """

    __slots__ = ("columns", "groups", "kind")

    def __init__(self, kind: Kind | None = None, columns: bool = False, groups: tuple[Any, ...] = ()) -> None:
        self.kind, self.columns, self.groups = kind, columns, groups

    def __deepcopy__(self, memo: dict[int, Any]) -> Lies:
        return self

    def __reduce__(self) -> tuple[type[Lies], tuple[Any, ...]]:
        if self.groups:
            raise TypeError(
                "a model whose vectors' gradients are summed over a process group cannot be pickled; save the edits by "
                "rk.save_edits"
            )
        return Lies, (self.kind, self.columns)

    def summed_over(self, group: Any) -> Lies:
        """The same, with gradients also summed over this group."""
        return Lies(self.kind, self.columns, (*self.groups, group))

    def here(self, edit: Edit) -> Edit:
        """The part of an edit that this process applies: plain tensors, of its own columns."""
        vectors = {name: None if vector is None else self._local(vector) for name, vector in edit.vectors.items()}
        return edit._replace(kind=self.kind or edit.kind, vectors=vectors)

    def part_of(self, tensor: Tensor) -> Tensor:
        """This process's columns of a tensor of the site, for example its linear layer's bias."""
        own: Any = tensor
        if not is_sharded(tensor):
            return tensor
        part: Tensor = own.to_local() if self.columns else own.full_tensor()
        return part

    def _local(self, vector: Tensor) -> Tensor:
        own: Any = vector
        local: Tensor = own.to_local() if is_sharded(vector) else vector
        if self.groups and local.requires_grad and torch.is_grad_enabled():
            for group in self.groups:
                local = _Summed.apply(local, group)
        return local


class _Summed(torch.autograd.Function):
    """The tensor itself; its gradient is the sum over all processes of a group."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return vector.view_as(vector)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # others may use the gradient too
        dist.all_reduce(total, group=ctx.group)
        return total, None


def spread_vectors(holder: EditVectors, mesh: Any, placements: Any) -> None:
    """Turn vectors that are whole in every process into DTensors of a mesh; random values are those of its first
    process.

    Args:
        holder: the module of the Parameters, which are replaced.
        mesh: a `DeviceMesh`; all its processes must call this.
        placements: one for each of its dimensions.
    """
    drawn = holder.kind is not None and holder.kind.draws
    for name, vector in tuple(holder._parameters.items()):
        if vector is not None:
            part = spread(vector.detach(), mesh, placements, from_first=drawn)
            holder._parameters[name] = nn.Parameter(part, vector.requires_grad)
