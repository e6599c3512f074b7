"""The state of the running thread that decides how a model computes, as one number.

Facts about a site stay valid while the number is the same. torch answers for all bits at the price of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from ..backends import nodes

__all__ = ["GRAD", "INFERENCE", "PLAIN", "QUIET", "TANGENTS", "ambient", "saved_tensor_hooks"]

# torch has no public query for hooks on saved tensors (activation checkpointing).
saved_tensor_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: "unknown"
)

GRAD = 1  # gradients are recorded
INFERENCE = 2
AUTOCAST = 4 + 8  # on the CPU, on CUDA devices
SAVED = 16  # saved tensors go through hooks, as under activation checkpointing
BACKWARD = 32  # a backward pass is running
TRANSFORMED = 64  # by torch.func
TRACED = 128  # by torch.jit.trace
TANGENTS = 256  # a level of forward-mode derivatives is open
QUIET = GRAD + INFERENCE + AUTOCAST  # with only these, facts about a site stay valid
PLAIN = TRANSFORMED + TRACED  # plain PyTorch must run


def _asked() -> int:
    return (
        GRAD * torch.is_grad_enabled()
        + INFERENCE * torch.is_inference_mode_enabled()
        + 4 * torch.is_autocast_enabled("cpu")
        + 8 * torch.is_autocast_enabled("cuda")
        + SAVED * (saved_tensor_hooks(True) is not None)
        + BACKWARD * (torch._C._current_graph_task_id() != -1)
        + TRANSFORMED * torch._C._are_functorch_transforms_active()
        + TRACED * (torch._C._get_tracing_state() is not None)
        + TANGENTS * (forward_ad._current_level >= 0)
    )


ambient: Callable[[], int] = nodes.ambient or _asked
