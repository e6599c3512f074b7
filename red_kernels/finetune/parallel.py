"""A job's model over several processes: its weights split (tensor parallelism), or sharded over all (FSDP2).

transformers splits the weights and torch shards them. Both are done here, not in Trainer. accelerate does neither on
CPUs (it keeps a copy in each process), and Trainer resumes no model that it did not shard itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..support.errors import one_line
from ..support.sharded import local
from .mesh import DATA, TENSOR
from .processes import Processes

__all__ = ["average_over_copies", "lay_in_parts", "split_weights"]


def _mesh(processes: Processes) -> Any:
    assert processes.parallelism is not None  # `join` has made it
    return processes.parallelism.get_device_mesh(processes.device.type)


def split_weights(model: Any, processes: Processes) -> None:
    """Split a model's weights over `processes.tp` processes by its own plan; before `rk.patch`, in all of them.

    Args:
        model: a transformers model, whole in each process. Each keeps its part, on the device of the mesh.
        processes: of the job.

    Raises:
        ValueError: the model has no plan, or cannot be split over this many.
        ModuleNotFoundError: transformers is too old.
    """
    try:
        from transformers.distributed import DistributedConfig
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tp: this transformers cannot split a model: {error}; pip install -U transformers"
        ) from error
    wrong = f"tp: got {processes.tp}, and {type(model).__name__}"
    if not model.tp_plan:
        raise ValueError(f"{wrong} has no plan for it in transformers")
    mesh = _mesh(processes)[TENSOR]
    _untie(model)
    try:
        plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=processes.tp))
        apply_tensor_parallelism(model, mesh, plan)
        model.to(processes.device)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=processes.device))
    except Exception as error:  # any error of a model with too few heads
        heads = {
            name: getattr(model.config.get_text_config(), name, None)
            for name in ("num_attention_heads", "num_key_value_heads")
        }
        has = ", ".join(f"{name} {count}" for name, count in heads.items() if count is not None)
        raise ValueError(
            f"{wrong} does not run when split over that many ({type(error).__name__}: {one_line(error)}); "
            f"expected a divisor of {has}"
        ) from error


def _untie(model: Any) -> None:
    """Give an output layer that shares the embedding's weight its own parameter: each is split differently."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is None or embedding is None or head.weight is not embedding.weight:
        return
    weight = head.weight
    head.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)


def lay_in_parts(model: Any, processes: Processes) -> None:
    """Shard a patched model over the processes (FSDP2): each layer separately, and the rest; in all of them.

    With tensor parallelism the shards are of each process's own part of the weights.
    """
    from torch.distributed.fsdp import fully_shard
    from transformers.distributed import DistributedConfig

    mesh = _mesh(processes)[DATA]
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in reversed(list(model.modules())):  # inner modules first
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    # Parameters behind the last layer are also read between forwards: to save a head, or to load the best one.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.config.distributed_config = DistributedConfig(fsdp_size=processes.shares)  # Trainer reads it


def average_over_copies(model: nn.Module, processes: Processes, accelerator: Any) -> None:
    """Make the copies of a split model, each with a share of the batch, train alike; in all processes.

    They start with the first copy's values. Gradients are averaged after the last forward pass of an optimizer step.
    Trainer averages unsplit parameters.
    """
    if processes.copies == 1:
        return
    group = _mesh(processes)[DATA].get_group()
    first = dist.get_global_rank(group, 0)

    def average(own: torch.Tensor) -> None:
        if accelerator.sync_gradients and own.grad is not None:
            gradient = local(own.grad)
            dist.all_reduce(gradient, group=group)
            gradient.div_(processes.copies)

    for own in model.parameters():
        if own.requires_grad and local(own) is not own:
            with torch.no_grad():
                dist.broadcast(local(own), first, group=group)
            own.register_post_accumulate_grad_hook(average)
