"""Checks that a folder can be written to before hours of work."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import one_line

__all__ = ["check_output", "writing"]

_ROOM = 1 << 20  # bytes that must fit at least


def check_output(output: str | os.PathLike[str], name: str = "--output") -> None:
    """Check that a folder can be created, or written to if it exists; no file is left behind.

    Args:
        output: the folder.
        name: of the argument, for messages.

    Raises:
        ValueError: an empty path, or one with a NUL character.
        OSError: it is a file, is inside one, has too long a name, or is not writable: no permission, a read-only or a
            full disk. It is of the subclass of the cause.
    """
    target = Path(output)
    if not str(output) or "\0" in str(output):
        raise ValueError(f"{name}: got {str(output)!r}, expected the path of a folder")
    try:
        place = target
        while not _is_there(place):
            place = place.parent
        if not place.is_dir():
            what = "is a file" if place.exists() else "is a broken link"
            where = (
                f"{str(target)!r} {what}" if place == target else f"{str(place)!r} {what}, and {str(target)!r} in it"
            )
            raise NotADirectoryError(f"{name}: {where}; expected a folder")
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(_ROOM))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, f"{name}: cannot write to {str(target)!r}: {error.strerror or error}") from error


def _is_there(path: Path) -> bool:
    """Whether the path exists, broken links included; too long a name is an OSError."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextlib.contextmanager
def writing(output: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors of foreign code that writes into a folder into an OSError that names it.

    Libraries have their own errors for a full disk: safetensors a SafetensorError, torch a RuntimeError.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"cannot write to {str(output)!r}: {one_line(error)}") from error
