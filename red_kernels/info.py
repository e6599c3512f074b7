"""`red-kernels info`: the capabilities of this installation on this machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch
import transformers
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ._version import __version__
from .backends import available_backends, choice, choose, forced_backend, nodes, records
from .backends.schemas import KERNEL_DTYPES
from .edits.config import RedConfig
from .finetune.base_dtype import choose_dtype, slowdown
from .patching.patch import patch
from .support.base_models import described_base, named_class, quietly
from .support.errors import one_line

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "gguf", "peft", "datasets", "matplotlib")


def show_info(console: Console) -> None:
    """Print the backends with their state or the reason for their absence, the choice per device, settings, versions.

    An invalid setting is shown with the reason, not raised.
    """
    backends = Table(title="Backends")
    for heading in ("backend", "state"):
        backends.add_column(heading, overflow="fold")
    for record in records():
        state = record.missing()
        if state is None:
            state = "; ".join(filter(None, ("available", record.state())))
        backends.add_row(record.name, escape(state))
    backends.add_row("autograd's nodes", escape(nodes.load_error() or "in C++, for the backends cpu and cuda"))
    console.print(backends)

    chosen = Table(title="Chosen for")
    for heading in ("device", "backend"):
        chosen.add_column(heading, overflow="fold")
    for device, label in _devices():
        chosen.add_row(label, _chosen(device))
    console.print(chosen)

    dtypes = Table(title="Base models (--dtype auto)")
    for heading in ("device", "dtype", "reason", "products in bf16, fp16 take"):
        dtypes.add_column(heading, overflow="fold")
    for _, label in _devices():
        dtypes.add_row(label, *_base_dtype(torch.device(label.partition(" ")[0])))
    console.print(dtypes)

    if _settings():
        settings = Table(title="Settings")
        for heading in ("environment variable", "value"):
            settings.add_column(heading, overflow="fold")
        for name, value in _settings():
            settings.add_row(name, repr(value))
        console.print(settings)

    versions = Table(title="Versions")
    for heading in ("package", "version"):
        versions.add_column(heading, overflow="fold")
    versions.add_row("red_kernels", __version__)
    versions.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        versions.add_row(package, _version(package))
    console.print(versions)


def show_model(console: Console, name: str, position: str = "ffn", kind: str = "all") -> None:
    """Print the sites that `rk.patch` would edit in a model, and the fusion of each edit; no weights are loaded.

    Args:
        console: to print on.
        name: a folder, a `.gguf` file, a hub id or the name of a packaged model.
        position, kind: as in `RedConfig`.

    Raises:
        OSError: the model cannot be found or read.
        ValueError: its configuration is of no known model, or it has no site to edit.
    """
    config = RedConfig(position=position, kind=kind)
    described = described_base(name)
    made = named_class(described) or transformers.AutoModelForCausalLM.from_config  # GGUF files name no class
    with torch.device("meta"), quietly():
        model = made(described)
    console.print(escape(str(patch(model, config))), soft_wrap=True)


def _chosen(device: str) -> str:
    dtypes: dict[str, list[str]] = {}  # by the backend that takes them
    try:
        for dtype in KERNEL_DTYPES:
            name = choose(torch.empty(1, dtype=dtype, device=device), "edit").name
            dtypes.setdefault(name, []).append(str(dtype).removeprefix("torch."))
        asked = forced_backend() is not None
    except (ValueError, RuntimeError) as error:  # the setting, and the reason why it is invalid
        return f"none: {error}"
    there = [other for other in ("cuda", "triton") if available_backends()[other] is None]
    if device == "cpu" or asked or len(there) < 2 or not set(dtypes) <= {"cuda", "triton"}:
        return "\n".join(name if len(dtypes) == 1 else f"{name}: {', '.join(dtypes[name])}" for name in dtypes)
    return "\n".join(f"{row.backend}: {row.where}" for row in choice.TABLE) + "\n(the first match)"


def _base_dtype(device: torch.device) -> tuple[str, str, str]:
    """The dtype of `auto`, the reason, and the time of half-precision products; a failed product is shown."""
    try:
        chosen = choose_dtype(device)
        slower = ", ".join(f"{slowdown(name, device):.2g}" for name in ("bf16", "fp16"))
    except RuntimeError as error:
        return "unknown", f"a product failed: {escape(one_line(error))}", ""
    return chosen.name, chosen.reason, f"{slower} times as long as in fp32"


def _settings() -> list[tuple[str, str]]:
    return [(name, value) for name, value in sorted(os.environ.items()) if name.startswith("RED_KERNELS_")]


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
