"""Writing files so that a reader, or a crash, never meets half of one."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Write several small files into `folder`, all of them or none.

    Every file is written and synced under a temporary name first; only when all of them are on the disk are they
    renamed, in the order given. The folder is made if it is missing.

    Args:
        folder: where the files go.
        contents: file name to file content.

    Raises:
        OSError: the folder cannot be made or written to (read-only, full, a file in its place); of the subclass that
            belongs to the cause, with the folder's name in the message. No temporary file is left.
    """
    target = Path(folder)
    made = not target.exists()
    written: list[tuple[Path, Path]] = []
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            temporary = target / f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
            written.append((temporary, target / name))
            _write_synced(temporary, content)
        for temporary, final in written:
            os.replace(temporary, final)
        _sync_folder(target)
    except BaseException as error:
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if made:
            with contextlib.suppress(OSError):
                target.rmdir()  # goes only if it is empty
        if isinstance(error, OSError):
            raise OSError(
                error.errno, f"cannot write to the folder {str(target)!r}: {error.strerror or error}"
            ) from error
        raise


def json_by_line(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of a list, for people who compare two files."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write_synced(path: Path, content: bytes) -> None:
    # os.open and not tempfile: the file gets the permissions of the user's umask, not 0600.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Makes the renames last through a power cut where the system can do it; elsewhere they are still atomic.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
