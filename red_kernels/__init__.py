"""Fused kernels for RED, the training of representation edits (arXiv 2402.15179)."""

from . import functional, reference
from ._version import __version__
from .backends import available_backends, backend
from .functional import (
    edit,
    edit_add,
    edit_add_layer_norm,
    edit_add_rms_norm,
    layer_norm_edit,
    linear_edit,
    rms_norm_edit,
)

__all__ = [
    "__version__",
    "available_backends",
    "backend",
    "edit",
    "edit_add",
    "edit_add_layer_norm",
    "edit_add_rms_norm",
    "functional",
    "layer_norm_edit",
    "linear_edit",
    "reference",
    "rms_norm_edit",
]
