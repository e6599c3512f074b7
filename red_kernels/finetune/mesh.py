"""The mesh of processes that have a model together: those with one batch along one side, its shares along the other."""

from __future__ import annotations

from typing import Any

from accelerate import ParallelismConfig

__all__ = ["DATA", "TENSOR", "Parallelism"]

DATA, TENSOR = "dp_shard", "tp"  # accelerate's names of the sides


class Parallelism(ParallelismConfig):
    """accelerate's own, which tells its loaders which processes get the same batch; here on CPUs too."""

    def __init__(self, shares: int, tp: int) -> None:
        super().__init__(dp_shard_size=shares, tp_size=tp)

    def _validate_accelerator(self, accelerator: Any) -> None:
        if accelerator.device.type != "cpu":  # these it refuses by their name; gloo does all that is needed
            super()._validate_accelerator(accelerator)
