"""The content of a kit, and how its parts are packed, checked and installed. It imports no torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "kit.json"
SCHEMA = 1
LIBRARIES = ("libred_kernels_cuda.so", "libred_kernels_cpu.so")
PACKED_LIBRARIES, PACKED_CACHE, WHEELS, VARIANTS = "libraries.tar.xz", "triton.tar.xz", "wheels", "variants"
GROUP = "__grp__"  # of Triton's cache: a file with the absolute paths of a program's files
_SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h")


class KitError(Exception):
    """Why a kit cannot be made or used, with the remedy, in one line."""


def sources(root: Path = ROOT, folder: str = "csrc") -> str:
    """A short hash of a folder's sources."""
    found = hashlib.sha256()
    for path in sorted((root / folder).rglob("*")):
        if path.suffix in _SOURCES and path.is_file() and "__pycache__" not in path.parts:
            found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    return sum(one.stat().st_size for one in [path, *path.rglob("*")] if one.is_file() and not one.is_symlink())


def repository_size(root: Path = ROOT, without: Path | None = None) -> int:
    """The size in bytes of the files that git would copy: tracked files, and others that it does not ignore.

    Raises KitError outside a checkout.
    """
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise KitError(f"git does not run ({error}); remedy: install git") from error
    if done.returncode:
        raise KitError(f"{root} is no git checkout; remedy: make the kit in a checkout")
    paths = {root / name for name in done.stdout.split("\0") if name}
    return sum(p.stat().st_size for p in paths if p.is_file() and (without is None or without not in p.parents))


def pack(folder: Path, archive: Path, wanted: Callable[[Path], bool] = lambda path: True) -> None:
    """Pack a folder; equal files give an equal order."""
    with tarfile.open(archive, "w:xz", preset=6) as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and wanted(path):
                packed.add(path, str(path.relative_to(folder)))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack into a folder. Raises KitError for a damaged archive."""
    try:
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())
        raise KitError(f"{archive} cannot be unpacked ({reason}); remedy: copy the kit again") from error


def groups(cache: Path) -> Iterator[Path]:
    """The files of Triton's cache that name others."""
    return cache.glob(f"*/{GROUP}*.json")


def leave_sources(cache: Path) -> None:
    """Reduce Triton's cache to the files that a launch reads: no intermediate code."""
    for group in groups(cache):
        paths = json.loads(group.read_text())["child_paths"]
        kept = {name: path for name, path in paths.items() if name.endswith((".json", ".cubin"))}
        group.write_text(json.dumps({"child_paths": kept}))
    for path in cache.glob("*/*"):
        if path.name == "lock" or path.suffix not in (".json", ".cubin", ".so"):
            path.unlink() if path.is_file() else None


def settle(cache: Path) -> int:
    """Rewrite the paths in a moved cache; returns the number of its programs."""
    count = 0
    for group in groups(cache):
        paths = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in paths}}))
        count += 1
    return count


def digests(kit: Path) -> dict[str, str]:
    """The names of a kit's files, except its manifest, to the hashes of their contents."""
    paths = [path for path in sorted(kit.rglob("*")) if path.is_file() and path.name != MANIFEST]
    return {str(path.relative_to(kit)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def read_manifest(kit: Path) -> dict[str, Any]:
    """A kit's manifest. Raises KitError if there is none, it has another form, or a file is damaged."""
    path = kit / MANIFEST
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise KitError(f"{kit} is no kit ({error}); remedy: make gpu-kit, and copy its folder here") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise KitError(f"{path} is of another form; remedy: make gpu-kit again with these sources")
    here = digests(kit)
    damaged = [name for name, digest in found["files"].items() if here.get(name) != digest]
    if damaged:
        raise KitError(f"{kit / damaged[0]} is missing or damaged; remedy: copy the kit again")
    return found
