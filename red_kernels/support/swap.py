"""Exchanging two folders in one step, if the system can, and finding both again if it cannot."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["exchange", "rename_new"]

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
_NO_REPLACE, _EXCHANGE = 1, 2
# Errors of a kernel or a file system without this kind of renaming.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM)


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False, without changes, if the system cannot. Raises OSError."""
    return _renameat2(first, second, _EXCHANGE)


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a free name. Raises FileExistsError if it is taken, OSError otherwise."""
    if _renameat2(source, target, _NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)  # it replaces only an empty folder created at this moment


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    library: Any = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "renameat2"):  # glibc before 2.28
        return False
    function = library.renameat2
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if function(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))
