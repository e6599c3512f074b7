"""The search for launch rules on the device at hand: `red-kernels bench --tune`.

``workloads`` says what is run, ``candidates`` which tiles are tried, ``clocks`` how times are taken, ``search`` which
tile wins, ``matmul`` where the fused matmul does; ``job`` is the command.
"""

from __future__ import annotations

import os

import torch

from ... import available_backends


def require_gpu() -> None:
    """Raise RuntimeError, naming what is missing, where the Triton kernels cannot be measured on a GPU."""
    purpose = "red-kernels bench --tune measures the Triton kernels on a GPU"
    if not torch.cuda.is_available():
        raise RuntimeError(f"{purpose}, and torch {torch.__version__} finds none here")
    reason = available_backends()["triton"]
    if reason is not None:
        raise RuntimeError(f"{purpose}: {reason}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError(f"{purpose}, and TRITON_INTERPRET=1 runs them on the CPU; remedy: unset it")
