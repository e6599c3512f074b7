"""Starting a worker script as the processes of a gloo group, mostly two, and the beginning and end of such a script."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ready
import torch
import torch.distributed as dist
from patience import HANGS

HERE = Path(__file__).resolve().parent


def run_pair(script: str, *arguments: str, timeout: float = HANGS, count: int = 2) -> None:
    """Run `script` (of this folder) as `count` processes with `rank, port, *arguments`; all have to end well."""
    port = ready.free_port()
    sizes = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    workers = [
        ready.Process([str(HERE / script), str(rank), port, *arguments], number=rank, **sizes) for rank in range(count)
    ]
    code = ready.ended(workers, timeout)
    assert code == 0, "\n".join(text for worker in workers for text in worker.communicate())


@contextmanager
def in_group(*, initialise: bool = True) -> Iterator[int]:
    """The body of a worker: gives the rank, and ends the process behind it. By `initialise` it is in the group."""
    rank, port = sys.argv[1:3]
    torch.set_num_threads(1)
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank})
    os.environ["LOCAL_RANK"] = rank
    if initialise:
        dist.init_process_group("gloo")
    try:
        yield int(rank)
        # While a wrapped model is still held by a cycle, so is its gloo group with its threads.
        gc.collect()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # A gloo thread that lets go of its last tensor while the interpreter ends aborts the process (pytorch issue 190489,
    # pull request 179291). All has been checked by now, and whatever failed has left by its exception.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
