"""Names in pickles of models that earlier releases patched: their layers had their own forwards.

Such a model now runs the library's forwards, and the hooks of its sites apply the edits. `rk.unpatch` undoes it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["INSIDE", "LEFT", "NextNorm", "Step", "refuse_inside"]

INSIDE = "_red_kernels_inside"  # of a layer whose forward applied an edit without a hook: the path of that site
LEFT = (INSIDE, "_red_kernels_next")  # attributes that no code reads now


class NextNorm:
    """The destination of a layer's output."""


class Step(NamedTuple):
    """A module on that path."""

    path: tuple[str, ...]
    known: tuple[str, ...]


def refuse_inside(layer: Any) -> None:
    """Raise RuntimeError for a layer whose forward no longer applies its edit."""
    site = ".".join(layer.__dict__[INSIDE])
    raise RuntimeError(
        f"model: an earlier release patched this {type(layer).__name__}; this release cannot apply its edit of the "
        f"stream behind {site}; call rk.save_edits(model, folder), rk.unpatch(model), rk.patch(model, config) with the "
        "same config, and rk.load_edits(model, folder)"
    )
