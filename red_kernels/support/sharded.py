"""Sharded vectors: gathering them, scattering them, and writing from one process.

Sharded parameters are `torch.distributed.tensor.DTensor`s (FSDP2, tensor parallelism), recognised by their
`device_mesh`. Those of DeepSpeed's ZeRO-3 are recognised too, but only DeepSpeed itself can gather them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["is_sharded", "local", "placed_as", "refuse_partitioned", "spread", "whole", "write_from_one"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process has only a part of the tensor."""
    return hasattr(tensor, "device_mesh")


def refuse_partitioned(name: str, parameter: Tensor) -> None:
    """Raise for a parameter whose values DeepSpeed's ZeRO-3 has removed.

    Raises:
        ValueError: it is partitioned; the message has the remedy.
    """
    stored = getattr(parameter, "ds_numel", None)
    if stored is not None and stored != parameter.numel():
        raise ValueError(
            f"model: {name} is partitioned by DeepSpeed ZeRO-3; gather the vectors first: with "
            "deepspeed.zero.GatheredParameters(vectors, modifier_rank=0): ... in all processes, and save or load in "
            "process 0"
        )


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, detached, on its device. For a sharded one all processes of its mesh must call it."""
    gathered: Any = tensor.detach()
    full: Tensor = gathered.full_tensor() if is_sharded(tensor) else gathered
    return full


def local(tensor: Tensor) -> Tensor:
    """This process's part of the tensor: its shard, or all of it if it is not sharded."""
    own: Any = tensor
    part: Tensor = own.to_local() if is_sharded(tensor) else tensor
    return part


def placed_as(value: Tensor, like: Tensor, device: torch.device | None = None) -> Tensor:
    """`value`, equal in all processes, on the device (or another), in the dtype and sharding of `like`."""
    value = value.to(device=like.device if device is None else device, dtype=like.dtype)
    if not is_sharded(like):
        return value
    sharded: Any = like
    return spread(value, sharded.device_mesh, sharded.placements)


def spread(value: Tensor, mesh: Any, placements: Sequence[Any], *, from_first: bool = False) -> Tensor:
    """A tensor, whole in every process of a mesh, as a DTensor of which each keeps its part.

    Args:
        value: of any shape.
        mesh: a `DeviceMesh`.
        placements: one for each of its dimensions.
        from_first: send the values of the mesh's first process to the others, whose values may differ. Otherwise
            nothing is sent.
    """
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, placements, src_data_rank=0 if from_first and not value.is_meta else None)


def write_from_one(tensors: Iterable[Tensor], write: Callable[[], object]) -> None:
    """Call `write` here, or, if any of `tensors` is sharded, only in the first process of its mesh.

    In that case all processes of the mesh must call this, and it returns in all of them after the files are written.

    Raises:
        Exception: any error of `write`, in the process that called it.
        RuntimeError: in the other processes, if `write` has raised.
    """
    meshes: list[Any] = [tensor.device_mesh for tensor in tensors if is_sharded(tensor)]  # type: ignore[attr-defined]
    if not meshes:
        write()
        return
    mesh = meshes[0]
    first = int(mesh.mesh.min())
    failure: BaseException | None = None
    if dist.get_rank() == first:
        try:
            write()
        except BaseException as error:  # the others are waiting
            failure = error
    failed = torch.tensor(int(failure is not None), device=mesh.device_type)
    for group in mesh.get_all_groups():  # dimension by dimension, so that it reaches the whole mesh
        dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(f"process {first} could not write the edits; see that process's error")
