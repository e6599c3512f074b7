"""Errors as one line, for the command."""

from __future__ import annotations

import pickle
import struct
import tarfile
import zipfile
import zlib

__all__ = ["explained", "one_line"]

# Reported to the user as they are: errors of this package (ValueError, TypeError, RuntimeError), of the system, memory
# and packages, and errors of file readers for damaged files.
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
_BY_NAME = "SafetensorError"  # it derives from Exception, and its module's name differs by version


def explained(error: BaseException) -> bool:
    """Whether a setting, a file or the system may cause an error of this type; otherwise it is a fault in the code.

    A TypeError or RuntimeError may be either; this package raises them for arguments.
    """
    return isinstance(error, _EXPLAINED) or type(error).__name__ == _BY_NAME


def one_line(error: BaseException) -> str:
    """The message of an error, without line ends and control characters; its type if it has no message."""
    text = " ".join(str(error).split())
    text = "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
    return text or type(error).__name__
