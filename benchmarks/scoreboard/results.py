"""A run in the form of the scoreboard's tables."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

from red_kernels.support.files import write_files

from .data import JUDGED, TRAINED
from .settings import Settings
from .training import Trained

SUCCESS, CANCELED = "success", "canceled"
_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch", "red_kernels")


def result(
    name: str,
    settings: Settings,
    config: dict[str, Any],
    trained: Trained,
    *,
    created: str,
    seconds: float,
    size: int | None,
    parameters: tuple[int, int],
    before: int,
    device: torch.device,
    error: str = "",
) -> dict[str, Any]:
    """The content of a file of results.

    Args:
        name: of the experiment, `"method/variant"`.
        settings: the settings.
        config: of the adapter, as in its `adapter_config.json`.
        trained: the measurements.
        created: the start of the run, in ISO 8601.
        seconds: of the whole run.
        size: bytes of the saved adapter; None if it was not saved.
        parameters: the numbers of trained and of all parameters.
        before: bytes in the allocator before the model was loaded.
        device: the device.
        error: the reason of a stopped run.
    """
    reserved = [own - before for own in trained.reserved]
    gpu = device.type == "cuda"
    return {
        "run_info": {
            "created_at": created,
            "total_time": seconds,
            "experiment_name": name,
            "peft_branch": f"release {importlib.metadata.version('peft')}",
            "train_config": settings.said(),
            "peft_config": config,
            "error_msg": error,
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(statistics.fmean(reserved)) if reserved else None,
            "accelerator_memory_max": torch.cuda.max_memory_reserved(device) - before if gpu else None,
            "accelerator_memory_reserved_99th": _percentile(reserved, 0.99) if reserved else None,
            "train_time": trained.seconds,
            "file_size": size,
            "num_trainable_params": parameters[0],
            "num_total_params": parameters[1],
            "status": CANCELED if error else SUCCESS,
            "metrics": trained.metrics,
        },
        "meta_info": {
            "model_info": _origin(settings.model_id, "model_info"),
            "dataset_info": {"metamath": _origin(TRAINED, "dataset_info"), "gsm8k": _origin(JUDGED, "dataset_info")},
            "package_info": _packages(),
            "system_info": {
                **{
                    part: getattr(platform, part)() for part in ("system", "release", "version", "machine", "processor")
                },
                "accelerator": torch.cuda.get_device_name(device) if gpu else device.type,
            },
            "pytorch_info": torch.__config__.show(),
        },
    }


def plain(config: Any) -> dict[str, Any]:
    """A config of PEFT for JSON: a set as a sorted list, a member of an enumeration as its text."""
    values = config.to_dict()
    found: dict[str, Any] = json.loads(json.dumps(values, default=lambda own: sorted(own) if _many(own) else str(own)))
    return found


def file_of(folder: Path, name: str) -> Path:
    """The path of an experiment's results."""
    return folder / f"{name.replace('/', '--')}.json"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file of results. Raises OSError."""
    write_files(path.parent, {path.name: (json.dumps(content, indent=2) + "\n").encode()})


def _many(value: object) -> bool:
    return isinstance(value, (set, frozenset))


def _percentile(values: list[int], share: float) -> int:
    """The interpolated quantile, as in numpy."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return int(low + (high - low) * (place - math.floor(place)))


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[f"{name}-version"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[f"{name}-version"] = None
        found[f"{name}-commit-hash"] = None
    return found


def _origin(name: str, kind: str) -> dict[str, str | None]:
    """The commit and the date of a repository of the hub; None for both if they are unavailable."""
    import huggingface_hub

    try:
        info: Any = getattr(huggingface_hub.HfApi(), kind)(name, timeout=10)
        return {"sha": info.sha, "created_at": info.created_at.isoformat()}
    except Exception:  # a folder, no network, no such repository: the scoreboard has empty entries then too
        return {"sha": None, "created_at": None}
