"""The kernels of an implementation on a GPU: a library may choose among several, or use another library's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import DeviceType

from ..failure import in_words
from .inputs import Inputs
from .timing import Candidate, gradients

LONGEST = 160  # characters of a name: template arguments follow
NOT_KERNELS = ("Memcpy", "Memset")


def _profiler() -> AbstractContextManager[Any]:
    both = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    return torch.profiler.profile(activities=both)


def started(
    candidates: Mapping[str, Candidate],
    inputs: Inputs,
    profiler: Callable[[], AbstractContextManager[Any]] = _profiler,
) -> dict[str, list[str]]:
    """Implementation to the kernels of its forward and backward, in their order, each name once.

    If the profiler fails, the one entry states it: the timing does not depend on it.
    """
    found = {}
    for name, candidate in candidates.items():
        try:
            with profiler() as profile, candidate.active():
                gradients(inputs.operation, candidate.forward(inputs, 0), inputs, 0)
                if inputs[0][0].x.is_cuda:
                    torch.cuda.synchronize()
            found[name] = names_of(profile.events())
        except Exception as error:
            found[name] = [f"not known: {in_words(error)}"]
    return found


def names_of(events: Iterable[Any]) -> list[str]:
    """The names of the kernels among a profile's events, in the order of their starts."""
    of_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    of_gpu = [event for event in of_gpu if not event.name.startswith(NOT_KERNELS)]
    of_gpu.sort(key=lambda event: event.time_range.start)
    return list(dict.fromkeys(event.name[:LONGEST] for event in of_gpu))
