"""`red-kernels info`: what this installation can do on this machine."""

from __future__ import annotations

import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table

from .._version import __version__
from ..backends import automatic_backend, available_backends, forced_backend, native

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "gguf", "peft", "datasets", "matplotlib")


def show_info(console: Console) -> None:
    """Print the backends with the reason a missing one is missing, the automatic choice per device, and versions."""
    backends = Table(title="Backends")
    for heading in ("backend", "state"):
        backends.add_column(heading, overflow="fold")
    for name, reason in available_backends().items():
        state = "available" if reason is None else reason
        if name == "cpu" and reason is None:
            state += f"; instruction set {native.instruction_set()} of {', '.join(native.instruction_sets())}"
        backends.add_row(name, state)
    console.print(backends)

    choice = Table(title="Chosen for")
    for heading in ("device", "backend"):
        choice.add_column(heading, overflow="fold")
    forced = forced_backend()
    for device, label in _devices():
        choice.add_row(label, automatic_backend(device) if forced is None else f"{forced} (asked for)")
    console.print(choice)

    versions = Table(title="Versions")
    for heading in ("package", "version"):
        versions.add_column(heading, overflow="fold")
    versions.add_row("red_kernels", __version__)
    versions.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        versions.add_row(package, _version(package))
    console.print(versions)


def _devices() -> list[tuple[str, str]]:
    devices = [("cpu", f"cpu ({torch.get_num_threads()} threads)")]
    devices += [
        ("cuda", f"cuda:{index} ({torch.cuda.get_device_name(index)})") for index in range(torch.cuda.device_count())
    ]
    return devices


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
