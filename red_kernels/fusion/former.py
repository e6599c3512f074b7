"""What pickles name of models that earlier releases patched: their layers had forwards of their own.

Such a model runs the library's forwards now, and the hooks of its sites apply the edits. `rk.unpatch` takes it back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["INSIDE", "LEFT", "NextNorm", "Step", "refuse_inside"]

INSIDE = "_red_kernels_inside"  # of a layer whose forward applied an edit that no hook did: the path of that site
LEFT = (INSIDE, "_red_kernels_next")  # attributes that nothing reads any more


class NextNorm:
    """Of a layer: where its output went."""


class Step(NamedTuple):
    """Of that way: a module."""

    path: tuple[str, ...]
    known: tuple[str, ...]


def refuse_inside(layer: Any) -> None:
    """Raise RuntimeError for a layer whose forward no longer applies the edit that it had to."""
    site = ".".join(layer.__dict__[INSIDE])
    raise RuntimeError(
        f"model: an earlier release patched this {type(layer).__name__}; this release cannot apply its edit of the "
        f"stream behind {site}; call rk.save_edits(model, folder), rk.unpatch(model), rk.patch(model, config) with the "
        "same config, and rk.load_edits(model, folder)"
    )
