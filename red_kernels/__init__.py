"""Fused kernels for RED, the training of representation edits (arXiv 2402.15179)."""

from . import _old_paths
from ._version import __version__
from .backends import available_backends, backend, reference, register_backend
from .checkpoints.authors import export_authors
from .checkpoints.card import write_model_card
from .checkpoints.checkpoint import load_edits, save_edits, saved_config
from .checkpoints.push import push_edits
from .checkpoints.whole import from_pretrained, load_base_model, load_tokenizer
from .edits.config import RedConfig
from .edits.find import edit_parameters
from .edits.kinds import register_kind
from .edits.named import (
    active_edit,
    add_edit,
    combine_edits,
    delete_edit,
    disable_edits,
    edit_names,
    switch_edit,
    use_edits,
)
from .edits.rows import sum_gradients_over
from .merging.merge import MergeReport, merge, unmerge
from .models import register_family
from .ops import functional
from .ops.functional import (
    edit,
    edit_add,
    edit_add_layer_norm,
    edit_add_rms_norm,
    layer_norm_edit,
    linear_edit,
    rms_norm_edit,
)
from .ops.mixing import mix, mix_add, mix_add_layer_norm, mix_add_rms_norm
from .patching.patch import patch, unpatch
from .patching.report import PatchReport

_old_paths.keep()

__all__ = [
    "MergeReport",
    "PatchReport",
    "RedConfig",
    "__version__",
    "active_edit",
    "add_edit",
    "available_backends",
    "backend",
    "combine_edits",
    "delete_edit",
    "disable_edits",
    "edit",
    "edit_add",
    "edit_add_layer_norm",
    "edit_add_rms_norm",
    "edit_names",
    "edit_parameters",
    "export_authors",
    "from_pretrained",
    "functional",
    "layer_norm_edit",
    "linear_edit",
    "load_base_model",
    "load_edits",
    "load_tokenizer",
    "merge",
    "mix",
    "mix_add",
    "mix_add_layer_norm",
    "mix_add_rms_norm",
    "patch",
    "push_edits",
    "reference",
    "register_backend",
    "register_family",
    "register_kind",
    "rms_norm_edit",
    "save_edits",
    "saved_config",
    "sum_gradients_over",
    "switch_edit",
    "unmerge",
    "unpatch",
    "use_edits",
    "write_model_card",
]
