"""Names in a sentence."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["listed"]

_SHOWN = 6  # most names in a message


def listed(names: Sequence[str]) -> str:
    """Names for a message, at most a few; "nothing" if there are none."""
    if not names:
        return "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
