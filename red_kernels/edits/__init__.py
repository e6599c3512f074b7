"""Edits: their kinds (:mod:`red_kernels.edits.kinds`), and several named edits of one model (``named.py``)."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    # The names of `named.py`, imported late to avoid a circle: operations need the kinds, named edits need operations.
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is None:
        named = importlib.import_module(f"{__name__}.named")
        if name in named.__all__:
            return getattr(named, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
