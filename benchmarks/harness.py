"""Timing of several implementations of one thing: interleaved round robin in one process, medians with quartiles."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import os
import platform
import random
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
    """Time every call once in a round, in a new order each time, for about ``seconds`` in all.

    Each call gets the number of the round, to choose its inputs. Two untimed rounds come first. The result of a call is
    dropped inside the timing: freeing memory is part of the cost. Raises ValueError without calls.
    """
    if not calls:
        raise ValueError("calls is empty, expected at least one implementation")
    for warm_up in range(2):
        for call in calls.values():
            call(warm_up)
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        number = 0
        while number < least or (number < most and time.perf_counter() - begin < seconds):
            for name in order.sample(list(calls), len(calls)):
                start = time.perf_counter()
                calls[name](number)
                times[name].append(time.perf_counter() - start)
            number += 1
    finally:
        gc.enable()
    return {name: timing(values) for name, values in times.items()}


def timing(values: list[float]) -> Timing:
    """The median and quartiles of some seconds."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return Timing(median, low, high)


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of some ratios."""
    return statistics.geometric_mean(values)


_SOURCES = (".py", ".json", ".cpp", ".cu", ".cuh", ".h")
PEERS = ("triton", "transformers", "peft", "liger-kernel", "quack-kernels", "flash-attn", "apex")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The conditions of a result: device, clocks, threads, versions and the commit."""
    from red_kernels.backends import cpu

    device = torch.device(device)
    processor = _processor()
    return {
        "device": _held(processor) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "gpu": None if device.type == "cpu" else _gpu(device),
        "processor": processor,
        "processor_mhz": _processor_clocks(),
        "threads": torch.get_num_threads(),
        "instruction_set": None if cpu.load_error() else cpu.instruction_set(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "red_kernels": rk.__version__,
        "versions": {name: version for name in PEERS if (version := _version(name)) is not None},
        "commit": _commit(),
        "sources": _sources(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _held(processor: str) -> str:
    """A processor's name, with the instruction set that the kernels are limited to, if it was set."""
    name = os.environ.get("RED_KERNELS_CPU")
    return f"{processor}, held to {name}" if name else processor


def _commit() -> str | None:
    """The commit of the checkout; followed by a plus if tracked files were changed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # the repository around an installed package is a foreign one
        ours = subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True)
        if ours.returncode:
            return None
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        changed = subprocess.run(
            [
                *git,
                "status",
                "--porcelain",
                "--untracked-files=no",
                "--",
                ":/red_kernels",
                ":/csrc",
                ":/benchmarks/*.py",
            ],
            capture_output=True,
            text=True,
        ).stdout.strip()
    except OSError:  # no git
        return None
    return commit + ("+" if changed else "")


def _sources() -> str:
    """A short hash of the measured and the measuring code: the package, its tables, its kernels, this folder.

    The kernels' sources represent the libraries, whose compilation is not reproducible. Without sources, as in an
    installed package, the libraries themselves are hashed.
    """
    found = hashlib.sha256()
    package = Path(rk.__file__).parent
    kernels = package.parent / "csrc"
    for folder in (package, Path(__file__).parent, kernels):
        for path in sorted(folder.rglob("*")):
            kinds = _SOURCES if folder == kernels or kernels.is_dir() else (*_SOURCES, ".so")
            parts = path.relative_to(folder).parts
            if path.suffix in kinds and not {"report", "results"} & set(parts) and path.is_file():
                found.update(str(path.relative_to(folder)).encode())
                found.update(path.read_bytes())
    return found.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    """Memory, driver, and the present and maximum clocks, in MHz, from nvidia-smi."""
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": torch.cuda.get_device_name(device),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
    }
    return found | _asked(device, "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")


def clocks(device: torch.device) -> dict[str, Any]:
    """The present clocks in MHz; of a GPU also the temperature and the reasons of throttling."""
    if device.type == "cpu":
        return {"processor_mhz": _processor_clocks()}
    return _asked(device, "clocks.sm", "clocks.mem", "temperature.gpu", "clocks_event_reasons.active")


def _asked(device: torch.device, *names: str) -> dict[str, str]:
    """nvidia-smi's report on a GPU; empty without one."""
    properties = torch.cuda.get_device_properties(device)
    # torch's numbers differ from nvidia-smi's under CUDA_VISIBLE_DEVICES.
    which = f"--id=GPU-{properties.uuid}"
    command = ["nvidia-smi", which, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, line.split(", "), strict=False))


def _processor() -> str:
    names = _of_processors("model name")
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()


def _processor_clocks() -> list[float]:
    """Of each core, from Linux; a virtual machine usually reports the nominal clock."""
    return [float(clock) for clock in _of_processors("cpu MHz")]


def _of_processors(field: str) -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(field)]
