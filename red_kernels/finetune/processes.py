"""The processes of one job, started by torchrun or `accelerate launch`: the writer, and shared decisions."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from ..support.errors import one_line

if TYPE_CHECKING:
    from .mesh import Parallelism

__all__ = ["ALONE", "FirstFailed", "Processes", "check_layout", "join"]

T = TypeVar("T")


class FirstFailed(RuntimeError):
    """The first process, which decides for all, has failed and has reported the reason."""

    said = True  # for the command line: it reports nothing more


@dataclass(frozen=True)
class Processes:
    """The number of processes of the job, and this one's place.

    Attributes:
        count: of all processes.
        rank: of this one, from 0.
        device: of this one.
        tp: the number of neighbours that share one model, with its weights split over them.
        fsdp: whether the model is sharded over all of them.
        parallelism: accelerate's configuration of both; None if each process has a whole model.
    """

    count: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tp: int = 1
    fsdp: bool = False
    parallelism: Parallelism | None = None

    @property
    def shares(self) -> int:
        """The number of shares of a batch: neighbours with one model get the same share."""
        return self.count // self.tp

    @property
    def copies(self) -> int:
        """The number of copies of the model."""
        return 1 if self.fsdp else self.shares

    @property
    def in_parts(self) -> bool:
        """Whether no process has the whole model, so that all of them must run each batch."""
        return self.fsdp or self.tp > 1

    @property
    def in_first_copy(self) -> bool:
        """Whether this one has a part of the model's first copy."""
        return self.rank < self.count // self.copies

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def first_decides(self, act: Callable[[], T]) -> T:
        """The result of `act` in the first process, in all of them. It must be picklable.

        Raises:
            FirstFailed: in the other processes, if `act` has raised an error in the first one.
        """
        if self.count == 1:
            return act()
        told: list[Any] = [None]
        failure: Exception | None = None
        if self.first:
            try:
                told = [("done", act())]
                pickle.dumps(told)
            except Exception as error:
                failure, told = error, [("failed", f"{type(error).__name__}: {one_line(error)}")]
        dist.broadcast_object_list(told, src=0)
        if failure is not None:
            raise failure
        how, value = told[0]
        if how == "failed":
            raise FirstFailed(f"the first process failed: {value}")
        result: T = value
        return result

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)


ALONE = Processes()


def join(device: torch.device, *, tp: int = 1, fsdp: bool = False) -> Processes:
    """Join the launcher's group of processes; a group of one without a launcher.

    Args:
        device: `cpu` or `cuda`. Of several GPUs each process of a machine gets its own.
        tp: the number of processes that share one model.
        fsdp: whether to shard the model over all processes.

    Raises:
        ValueError: there are too few processes, or their number is not a multiple of `tp`; or accelerate's
            configuration sets an option of the job.
    """
    _check_configuration()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(count, tp=tp, fsdp=fsdp)
    if count == 1:
        return Processes(device=device)
    from accelerate import PartialState

    # Trainer reuses it. One process may work alone for long, while the others wait.
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=12))
    if tp == 1 and not fsdp:
        return Processes(state.num_processes, state.process_index, state.device)
    from .mesh import Parallelism

    layout = Parallelism(state.num_processes // tp, tp)
    return Processes(state.num_processes, state.process_index, state.device, tp, fsdp, layout)


# The configuration of `accelerate launch`: the neutral value, the meaning of others, and the option to use here
# instead.
_CONFIGURED = (
    (
        "ACCELERATE_MIXED_PRECISION",
        "no",
        "mixed precision",
        "--dtype; pass accelerate launch --mixed_precision no",
    ),
    ("ACCELERATE_DYNAMO_BACKEND", "no", "torch.compile", "no option; pass accelerate launch --dynamo_backend no"),
    ("ACCELERATE_USE_FSDP", "false", "FSDP", "--fsdp; start it by torchrun"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "false", "a parallelism_config", "--fsdp and --tp; start it by torchrun"),
    ("ACCELERATE_USE_DEEPSPEED", "false", "DeepSpeed", "--fsdp; start it by torchrun"),
    ("ACCELERATE_USE_MEGATRON_LM", "false", "Megatron-LM", "--tp; start it by torchrun"),
)


def _check_configuration() -> None:
    """Raises ValueError if accelerate would train otherwise than the settings, and the results, state."""
    for name, nothing, what, here in _CONFIGURED:
        value = os.environ.get(name) or nothing
        if value.lower() != nothing:
            raise ValueError(f"accelerate's configuration requests {what} ({name}={value}); use {here}")


def check_layout(count: int, *, tp: int, fsdp: bool) -> None:
    """Raises ValueError if this number of processes cannot share a model in this way."""
    starts = "torchrun --nproc_per_node N, or accelerate launch, starts more"
    if count % tp:
        have = f"there is one process; {starts}" if count == 1 else f"there are {count} processes, no multiple of it"
        raise ValueError(f"tp: got {tp}, and {have}; --tp 1 splits nothing")
    if fsdp and count == 1:
        raise ValueError(f"fsdp: there is one process; {starts}; --no-fsdp shards nothing")
    if fsdp and count == tp:
        raise ValueError(f"fsdp: all {count} processes share the model's weights (tp); expected more processes")
