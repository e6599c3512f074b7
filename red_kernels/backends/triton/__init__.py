"""The Triton kernels: the backend of CUDA tensors."""

from __future__ import annotations

from .operations import (
    edit_backward,
    edit_forward,
    edit_norm_backward,
    edit_norm_forward,
    norm_edit_backward,
    norm_edit_forward,
)

NAME = "triton"
