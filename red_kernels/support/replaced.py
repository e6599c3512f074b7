"""An output folder that is written elsewhere and moved into place in one step; it replaces only folders of its kind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from .files import leftovers, locked, made_folder, remove_leftovers, sync_folder, temporary
from .swap import exchange, rename_new
from .text import listed

__all__ = ["MARKER", "OutputFolder", "refuse_overlap"]

MARKER = "red_merge.json"  # in a folder written here: its files, and the SHA-256 of each
_FORMAT = "red_kernels merged model"


@dataclass(frozen=True)
class _Former:
    """A folder that may be replaced: its identity, its files, and whether all its files exist."""

    identity: tuple[int, int, bytes, tuple[tuple[str, int, int], ...]]
    files: tuple[str, ...]
    whole: bool = False


class OutputFolder:
    """The place of an output folder.

    Args:
        output: the path; a link is followed.
        overwrite: replace a folder that was written here, is unchanged, and has no other files.

    Raises:
        FileExistsError: the path exists and may not be replaced.
    """

    def __init__(self, output: str | Path, overwrite: bool) -> None:
        self.path = Path(os.path.realpath(output))
        self._overwrite = overwrite
        self.notes: list[str] = []
        if self.path.parent.is_dir():
            with locked(self.path.parent):
                self._recover()
        self._former = self._look()

    @contextlib.contextmanager
    def written(self) -> Iterator[Path]:
        """A new folder for the block to write into; it is moved into place when the block ends without an error.

        Raises:
            FileExistsError: another process has created the path in the meantime.
            OSError: it cannot be written; the former output stays, and no file of this process is left.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(made_folder(self.path.parent))
            remove_leftovers(self.path.parent, self.path.name)
            staging = stack.enter_context(temporary(self.path))
            os.mkdir(staging)
            made = os.stat(staging)
            try:
                yield staging
                _finish(staging)
                with locked(self.path.parent):
                    self._check_unchanged()
                    if self._former is None:
                        self._place(staging)
                    else:
                        self._replace(staging, self._former)
            finally:
                # After an exchange this name is that of the former folder.
                if os.path.lexists(staging) and os.path.samestat(made, os.lstat(staging)):
                    shutil.rmtree(staging, ignore_errors=True)

    def _look(self, former: _Former | None = None) -> _Former | None:
        """The present content; None for nothing. Only files that differ from `former` are read."""
        if not os.path.lexists(self.path):
            return None
        if not self._overwrite:
            raise FileExistsError(f"output: {str(self.path)!r} exists already; pass --overwrite to replace it")
        return _replaceable(self.path, former)

    def _check_unchanged(self) -> None:
        now = self._look(self._former)
        if (now and now.identity) != (self._former and self._former.identity):
            raise FileExistsError(
                f"output: {str(self.path)!r} was changed by another process in the meantime; nothing was replaced"
            )

    def _place(self, staging: Path) -> None:
        try:
            rename_new(staging, self.path)
        except FileExistsError:
            raise FileExistsError(
                f"output: {str(self.path)!r} was created by another process in the meantime; nothing was replaced"
            ) from None
        sync_folder(self.path.parent)

    def _replace(self, staging: Path, former: _Former) -> None:
        """Put the new folder in place of the former one, and delete the former."""
        if exchange(staging, self.path):
            aside = staging
            try:
                same = _replaceable(aside, former).identity == former.identity
            except FileExistsError:
                same = False
            if not same:  # another file came in at the last moment
                exchange(staging, self.path)
                raise FileExistsError(
                    f"output: {str(self.path)!r} was changed by another process in the meantime; nothing was replaced"
                )
        else:
            with temporary(self.path, "old") as aside:
                os.rename(self.path, aside)
                try:
                    rename_new(staging, self.path)
                except BaseException:
                    os.rename(aside, self.path)
                    raise
        sync_folder(self.path.parent)
        self._delete(aside, former.files)

    def _recover(self) -> None:
        """Restore a former output that a killed process has moved aside without putting the new one in its place."""
        for path in sorted(leftovers(self.path.parent, self.path.name, "old"), key=_changed, reverse=True):
            try:
                former = _replaceable(path)
            except FileExistsError:
                if not any(files for _, _, files in os.walk(path)):
                    self._delete(path, ())  # the process was killed while it removed the folders
                continue
            if former.whole and not os.path.lexists(self.path):
                os.rename(path, self.path)
                self.notes.append(f"restored {str(self.path)!r}, which a killed process had moved aside")
            else:
                self._delete(path, former.files)

    def _delete(self, folder: Path, files: tuple[str, ...]) -> None:
        """Delete the files written here, and then the empty folders."""
        for name in (*files, MARKER):
            with contextlib.suppress(OSError):
                (folder / name).unlink()
        for root, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(root)
        if os.path.lexists(folder):
            self.notes.append(f"the former output could not be deleted: {str(folder)!r}")


def refuse_overlap(output: str | Path, others: Mapping[str, Path]) -> None:
    """Refuse an output that equals, contains or is inside one of other files or folders; links are followed.

    Args:
        output: the path of the output.
        others: a description of each path, and the path.

    Raises:
        ValueError: names the path and the relation.
    """
    target = Path(os.path.realpath(output))
    for what, path in others.items():
        if not path.exists():
            continue
        other = Path(os.path.realpath(path))
        relation = ""
        if _same(target, other):
            relation = "is"
        elif any(_same(target, parent) for parent in other.parents):
            relation = "contains"
        elif any(_same(other, parent) for parent in target.parents):
            relation = "is inside of"
        if relation:
            raise ValueError(f"output: {str(output)!r} {relation} {what}, {str(path)!r}; choose another place")


def _same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except OSError:
        return first == second


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_ctime
    except OSError:
        return 0.0


def _replaceable(folder: Path, former: _Former | None = None) -> _Former:
    """The replaceable folder at a path; one with the identity of `former` is not read again.

    Raises:
        FileExistsError: it is not an unchanged folder written here without other files; with the reason.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(f"output: {str(folder)!r} is a file, expected a folder")
    found = os.stat(folder)
    there = _entries(folder)
    if not there:
        return _Former((found.st_dev, found.st_ino, b"", ()), ())
    advice = "choose another place, or move the files to keep and remove the folder"
    try:
        content = (folder / MARKER).read_bytes()
        said = json.loads(content)
        if said["format"] != _FORMAT:
            raise ValueError("of another program")
        own = {os.path.normpath(name): digest for name, digest in said["files"].items()}
    except FileNotFoundError:
        raise FileExistsError(
            f"output: {str(folder)!r} is not a merged model of this command ({MARKER} is missing); {advice}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileExistsError(
            f"output: {str(folder)!r} is not a merged model of this command ({MARKER}: {error}); {advice}"
        ) from error
    parents = {str(parent) for name in own for parent in Path(name).parents}  # empty if the deletion was interrupted
    foreign = sorted(there - own.keys() - parents - {MARKER})
    if foreign:
        raise FileExistsError(
            f"output: {str(folder)!r} holds files that the merge did not write: {listed(foreign)}; {advice}"
        )
    files = sorted(there & own.keys())
    state = tuple((name, stat.st_size, stat.st_mtime_ns) for name in files for stat in [os.lstat(folder / name)])
    identity = found.st_dev, found.st_ino, content, state
    if former is None or identity != former.identity:
        changed = [name for name in files if _digest(folder / name) != own[name]]
        if changed:
            raise FileExistsError(
                f"output: {str(folder)!r} holds files that were changed after the merge: {listed(changed)}; {advice}"
            )
    return _Former(identity, tuple(files), own.keys() <= there)


def _digest(path: Path) -> str:
    """The SHA-256 of a file; empty for other paths, for example a folder or a link."""
    if path.is_symlink() or not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _entries(folder: Path) -> set[str]:
    """All paths in a folder except non-empty folders, relative to it."""
    found = set()
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found |= {os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)}
        if not folders and not files and Path(root) != folder:
            found.add(os.path.relpath(root, folder))
    return found


def _finish(folder: Path) -> None:
    """Record the content of a folder, and sync all of it to the disk."""
    said: dict[str, Any] = {
        "format": _FORMAT,
        "red_kernels_version": __version__,
        "token": secrets.token_hex(8),  # two merges of the same files are told apart
        "files": {name: _digest(folder / name) for name in sorted(_entries(folder))},
    }
    (folder / MARKER).write_text(json.dumps(said, indent=2) + "\n")
    for root, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(root, name), "r+b") as file:
                try:
                    os.fsync(file.fileno())
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
                        raise
        sync_folder(Path(root))
