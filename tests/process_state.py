"""What tests of one process share: each finds it as the first did, or the one that changed it fails."""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import numpy as np
import torch

from red_kernels import backends, models
from red_kernels.backends import cpu
from red_kernels.edits.kinds import KINDS

# On a loaded machine the hub's stand-in may take longer than the ten seconds after which its client takes what it has.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "300")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "300")

SEED = 0


def seed() -> None:
    """Every test draws the same numbers, whatever drew before it in the process."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


def forget_compiled() -> None:
    """Forget what torch.compile made of functions: how often they may be compiled again, and which sizes vary."""
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()


def state() -> dict[str, Any]:
    """Settings of the process by name: a test that needs others puts them back."""
    found: dict[str, Any] = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's number of threads": torch.get_num_threads(),
        "whether gradients are on": torch.is_grad_enabled(),
        "whether inference mode is on": torch.is_inference_mode_enabled(),
        "whether autocast is on": torch.is_autocast_enabled("cpu"),
        "whether torch is deterministic": torch.are_deterministic_algorithms_enabled(),
        "the backend asked for": backends.forced_backend(),
        "the instruction set": cpu.instruction_set() if cpu.load_error() is None else None,
        "the families": len(models.FAMILIES),
        "the kinds of edit": tuple(KINDS),
        "the backends": tuple(record.name for record in backends.records()),
        "the working directory": os.getcwd(),
    }
    # pytest says here which test runs; libraries say once for a process what all of it is to know.
    passing = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "TORCH_COMPILE_", "KINETO_")
    found |= {f"the variable {n}": value for n, value in os.environ.items() if not n.startswith(passing)}
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name}: it was {before.get(name)!r} and is {after.get(name)!r}" for name in names]
