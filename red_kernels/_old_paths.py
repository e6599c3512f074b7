"""Modules by the names that they had: for imports of old code, and for pickles."""

from __future__ import annotations

import sys
from importlib import import_module

# What documents or pickles name, or have named.
_MODULES = {
    "red_kernels.functional": "red_kernels.ops.functional",
    "red_kernels.reference": "red_kernels.backends.reference",
    "red_kernels.backends.native": "red_kernels.backends.cpu",
}


def keep() -> None:
    """Have the old names stand for the modules of now."""
    for old, new in _MODULES.items():
        module = import_module(new)
        package, _, name = old.rpartition(".")
        sys.modules[old] = module
        setattr(sys.modules[package], name, module)
