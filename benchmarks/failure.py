"""A failure in words, without references to its objects."""

from __future__ import annotations

import traceback


def in_words(error: BaseException, most: int = 200) -> str:
    """The error's type and message in one line, cut to ``most`` characters; its frames are cleared.

    A kept error, as in torch's compiler, keeps the tensors in its frames.
    """
    let_go(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most] or 'without a message'}"


def let_go(error: BaseException) -> None:
    """Clear the frames of an error and of all its causes."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [one.__cause__, one.__context__]
