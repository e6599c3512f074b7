"""Timing of several implementations of one thing: interleaved round robin in one process, medians with quartiles."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import red_kernels as rk


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median and the quartiles over the rounds."""

    median: float
    low: float
    high: float

    def json(self) -> dict[str, float]:
        return asdict(self)


def interleave(
    calls: Mapping[str, Callable[[int], object]], *, seconds: float, least: int = 7, most: int = 200
) -> dict[str, Timing]:
    """Time every call in turn, round after round, for about ``seconds`` in all.

    Each call gets the number of the round, to choose its inputs by. Two rounds go before the measured ones. What a call
    returns is dropped inside the timing: giving memory back is part of the cost. Raises ValueError without calls.
    """
    if not calls:
        raise ValueError("calls is empty, expected at least one implementation")
    for warm_up in range(2):
        for call in calls.values():
            call(warm_up)
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        number = 0
        while number < least or (number < most and time.perf_counter() - begin < seconds):
            for name, call in calls.items():
                start = time.perf_counter()
                call(number)
                times[name].append(time.perf_counter() - start)
            number += 1
    finally:
        gc.enable()
    return {name: timing(values) for name, values in times.items()}


def timing(values: list[float]) -> Timing:
    """The median and quartiles of some seconds."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(median, low, high)


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of some ratios."""
    return statistics.geometric_mean(values)


def environment() -> dict[str, Any]:
    """What a result depends on: processor, threads, versions and the commit."""
    from red_kernels.backends import native

    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": None if native.load_error() else native.instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "red_kernels": rk.__version__,
        "commit": commit or None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()
