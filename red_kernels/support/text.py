"""Names in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["listed"]

_SHOWN = 6  # how many names a message lists


def listed(names: Sequence[str]) -> str:
    """Names for a message, not more than can be read; "nothing" if there are none."""
    if not names:
        return "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
