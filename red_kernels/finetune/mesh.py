"""The mesh of processes that share a model: the tensor dimension shares a batch, the other one its shards."""

from __future__ import annotations

from typing import Any

from accelerate import ParallelismConfig

__all__ = ["DATA", "TENSOR", "Parallelism"]

DATA, TENSOR = "dp_shard", "tp"  # accelerate's names of the dimensions


class Parallelism(ParallelismConfig):
    """accelerate's own, from which its loaders know which processes share a batch; here on CPUs too."""

    def __init__(self, shares: int, tp: int) -> None:
        super().__init__(dp_shard_size=shares, tp_size=tp)

    def _validate_accelerator(self, accelerator: Any) -> None:
        if accelerator.device.type != "cpu":  # it refuses CPUs by name; gloo suffices
            super()._validate_accelerator(accelerator)
