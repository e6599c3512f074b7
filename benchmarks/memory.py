"""The exact memory of a training step, by one definition on a GPU and on a CPU.

It is the peak of a step beyond the base weights, in bytes: activations, gradients, and the method's own parameters and
optimizer state. It counts the allocations of torch's allocator; the outputs of our CPU kernels do not use their pool
meanwhile. Scratch memory that a library allocates otherwise is not seen.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from red_kernels.backends import cpu


def held_bytes(tensors: Iterable[Tensor], base: Iterable[Tensor]) -> int:
    """The bytes of the tensors' memory, each piece once, without that of `base`."""
    seen = {own.untyped_storage().data_ptr() for own in base}
    total = 0
    for own in tensors:
        storage = own.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def peak_allocated(call: Callable[[], object], device: torch.device) -> int:
    """The largest number of bytes allocated at one time during a call, beyond those allocated before it.

    On a GPU the allocator records it. On a CPU torch's profiler reports every allocation and its end, and the peak is
    that of their running sum.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces each profile on the standard error
    torchs_own = contextlib.nullcontext() if cpu.load_error() else cpu.without_pool()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torchs_own, torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes().decode(errors="replace"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    running = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        running += change
        peak = max(peak, running)
    return peak
