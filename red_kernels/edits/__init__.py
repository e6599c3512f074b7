"""Edits: the kinds there are (:mod:`red_kernels.edits.kinds`), and several named ones in a model (``named.py``)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .named import (
        active_edit,
        add_edit,
        combine_edits,
        delete_edit,
        disable_edits,
        edit_names,
        switch_edit,
        use_edits,
    )

__all__ = [
    "active_edit",
    "add_edit",
    "combine_edits",
    "delete_edit",
    "disable_edits",
    "edit_names",
    "switch_edit",
    "use_edits",
]


def __getattr__(name: str) -> Any:
    # At the first use: operations are made of kinds, and named edits of operations.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.named"), name)
