"""Writing files so that a reader, a second writer or a crash never sees a partial one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows has none: there two writers are not kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "json_by_line",
    "leftovers",
    "locked",
    "made_folder",
    "remove_leftovers",
    "sync_folder",
    "temporary",
    "write_files",
]

_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.red-(?P<host>.+)-(?P<pid>[0-9]{1,9})-(?P<token>[0-9a-f]{16})\.(?P<end>tmp|old)"
)
_FORMER_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9]+-[0-9a-f]{8}\.tmp")  # of earlier versions, without a host
_OLD = 86_400.0  # seconds after which any temporary file is left over: no save takes a day
_PATIENCE = 60.0  # seconds to wait for another writer of the same folder
_LONGEST = 100  # bytes of a name that a temporary name contains unchanged

_active: set[Path] = set()  # this process's temporary names in use


def write_files(folder: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Write several small files into `folder`.

    Every file is first written and synced under a temporary name. When all of them are on the disk, they are renamed,
    in the given order. A reader sees each file complete, the former or the new one. A process killed between two
    renames leaves the first of the new files: if files must agree, the last one decides. A missing folder is created.
    Temporary files that killed processes left in it are removed.

    Args:
        folder: where the files go.
        contents: file name to file content.

    Raises:
        OSError: the folder cannot be created or written to (read-only, full, a file in its place); it is of the
            subclass of the cause, with the folder's name in the message. No temporary file, no new file, and no newly
            created folder is left.
    """
    target = Path(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(made_folder(target))
        remove_leftovers(target)
        # The names stay reserved until the end: another thread's save must not take these files for left over.
        written = [(stack.enter_context(temporary(target / name)), target / name) for name in contents]
        new: list[Path] = []
        complete = False
        try:
            for (path, _), content in zip(written, contents.values(), strict=True):
                _write_synced(path, content)
            complete = True
            for path, final in written:
                there = os.path.lexists(final)
                os.replace(path, final)
                if not there:
                    new.append(final)
        except BaseException:
            if complete and not os.path.lexists(written[-1][0]):  # interrupted after the last rename: complete
                new.clear()
            for path in [*(path for path, _ in written), *new]:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        sync_folder(target)


@contextlib.contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Create a folder and its missing parents for the block; if it raises, remove those of them that are empty.

    Raises:
        OSError: the folder cannot be created; or an error of the block, with the folder's name in the message.
    """
    made: list[Path] = []
    try:
        missing = []
        path = folder
        while not os.path.lexists(path):
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                path.mkdir()
                made.append(path)
        folder.mkdir(exist_ok=True)  # raises if a file has its name
        for path in made:
            sync_folder(path.parent)
        yield
    except BaseException as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()  # removed only if it is empty
        # An error without a number is a message already; a folder that is named already is not named again.
        if isinstance(error, OSError) and error.errno is not None and not hasattr(error, "red_folder"):
            text = f"cannot write to the folder {str(folder)!r}: {error.strerror or error}"
            named: Any = OSError(error.errno, text)
            named.red_folder = str(folder)
            raise named from error
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other writers out of a folder for the block, in other threads and processes.

    The system releases the lock of a process that ends. On a file system without locks, the block runs without one.

    Raises:
        TimeoutError: another process has held the lock for a minute.
    """
    descriptor = None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
    if descriptor is None:
        yield
        return
    try:
        held = _lock(descriptor, folder)
        try:
            yield
        finally:
            if held:
                # A child forked in the meantime has a copy of the descriptor: closing it here would not suffice.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> bool:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                text = f"another process has held the lock of the folder {str(folder)!r} for {_PATIENCE:.0f} seconds"
                raise TimeoutError(errno.ETIMEDOUT, text) from None
            time.sleep(0.005)
        except OSError:  # the file system has no locks
            return False


@contextlib.contextmanager
def temporary(final: Path, end: str = "tmp") -> Iterator[Path]:
    """A unique temporary name next to `final`; during the block it is not taken for left over."""
    name = _stem(final.name)
    path = final.with_name(f".{name}.red-{_host()}-{os.getpid()}-{secrets.token_hex(8)}.{end}")
    _active.add(path)
    try:
        yield path
    finally:
        _active.discard(path)


def leftovers(folder: Path, name: str | None = None, end: str = "tmp") -> list[Path]:
    """The temporary files and folders in `folder` whose process is dead; of other machines those older than a day.

    Args:
        folder: the folder to search.
        name: their final name; None for any.
        end: as in `temporary`.
    """
    found = []
    with contextlib.suppress(OSError):
        for path in map(Path, sorted(os.scandir(folder), key=lambda entry: entry.name)):
            match = _TEMPORARY.fullmatch(path.name)
            former = _FORMER_TEMPORARY.fullmatch(path.name) if match is None and end == "tmp" else None
            named = match or former
            if named is None or (name is not None and named["name"] != _stem(name)):
                continue
            if match is not None and match["end"] != end:
                continue
            if _is_old(path) or (match is not None and match["host"] == _host() and not _is_used(path, match["pid"])):
                found.append(path)
    return found


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the files that killed processes left in a folder, where possible. Arguments as in `leftovers`."""
    for path in leftovers(folder, name):
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                if name is not None:
                    shutil.rmtree(path)
            else:
                path.unlink()


def sync_folder(folder: Path) -> None:
    """Sync the renames in a folder to the disk, if the system can; they are atomic in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def json_by_line(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of a list, to compare files by eye."""
    lines = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _write_synced(path: Path, content: bytes) -> None:
    # os.open instead of tempfile: the file gets the permissions of the user's umask, not 0600.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _stem(name: str) -> str:
    """A final name for temporary names: a long one would not fit."""
    return name if len(os.fsencode(name)) <= _LONGEST else hashlib.sha256(os.fsencode(name)).hexdigest()


def _host() -> str:
    """This machine, and the namespace of its process numbers: each container has its own."""
    host = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:40] or "host"
    try:
        return f"{host}_{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return host


def _is_used(path: Path, pid: str) -> bool:
    number = int(pid)
    if number == os.getpid():  # a former process may have had this number
        return path in _active
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _is_old(path: Path) -> bool:
    try:
        found = path.lstat()
        return time.time() - max(found.st_mtime, found.st_ctime) > _OLD  # a renamed folder keeps its former time
    except OSError:
        return False
