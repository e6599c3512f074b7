"""What failed, in words; of the failure itself nothing is kept."""

from __future__ import annotations

import traceback


def in_words(error: BaseException, most: int = 200) -> str:
    """The error's type and message in one line, cut to ``most`` characters; its frames are cleared.

    Whoever keeps an error, as torch's compiler does, keeps with its frames the tensors that these had.
    """
    let_go(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:most] or 'without a message'}"


def let_go(error: BaseException) -> None:
    """Clear the frames of an error and of all errors that it came from."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [one.__cause__, one.__context__]
