"""Errors as the command shows them: one line each."""

from __future__ import annotations

import pickle
import struct
import tarfile
import zipfile
import zlib

__all__ = ["explained", "one_line"]

# What is said to the user by this package (ValueError, TypeError, RuntimeError), what the system says of files, memory
# and packages, and what the readers of files raise for damaged ones.
_EXPLAINED = (
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    ImportError,
    MemoryError,
    EOFError,
    pickle.PickleError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)
_BY_NAME = "SafetensorError"  # its base is Exception, its module's name differs by version


def explained(error: BaseException) -> bool:
    """Whether an error is one that a setting, a file or the system can cause, and not a fault in the code.

    A TypeError or RuntimeError may be either; this package raises them for arguments.
    """
    return isinstance(error, _EXPLAINED) or type(error).__name__ == _BY_NAME


def one_line(error: BaseException) -> str:
    """What an error says, without line ends and control characters; its kind where it says nothing."""
    text = " ".join(str(error).split())
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text or type(error).__name__
