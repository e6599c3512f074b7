"""Build, on a machine without a GPU, all files for a machine with one: `make gpu-kit`.

    python -m benchmarks.gpu.kit [FOLDER] [--variant NAME=REVISION ...] [--python312 PATH] [--minutes N]

FOLDER (gpu-kit) is made completely or not at all. It contains both libraries, CUDA's for sm_90, with the hash of their
sources; a cache of Triton's programs; peers as wheels; and, for other revisions of this repository, the package with
its CUDA library, to be measured side by side. The size of each part is printed. Programs without time are compiled on
the other machine, and listed here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import contents
from .contents import LIBRARIES, PACKED_CACHE, PACKED_LIBRARIES, ROOT, VARIANTS, WHEELS, KitError

PYTHON, TRITON, ARCHITECTURE = "3.12", "3.6.0", "90"
PEERS = ("liger-kernel==0.8.5",)
LIMIT = 56 << 20  # bytes of the kit and the repository together
BUILD = ROOT / "build" / "gpu-kit"  # results that the next kit reuses


@dataclass(frozen=True)
class Wanted:
    """The options of a kit.

    Attributes:
        folder: of the kit.
        variants: name to a revision known to git.
        python: a Python of the version `PYTHON`; None to search for one.
        minutes: no Triton program is compiled after this time.
        tests: whether the programs of the tests are compiled too, after the timed ones.
        limit: the most bytes.
    """

    folder: Path
    variants: tuple[tuple[str, str], ...] = ()
    python: str | None = None
    minutes: float = 30.0
    tests: bool = True
    limit: int = LIMIT


def make(wanted: Wanted, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make a kit in a folder next to its place, and move it there; returns its manifest.

    Raises KitError, with the remedy, before the kit is in place.
    """
    folder = wanted.folder.resolve()
    if folder.exists() and not (folder / contents.MANIFEST).is_file():
        raise KitError(f"FOLDER is {folder}, which exists and is no kit; remedy: another folder, or remove it")
    nvcc = _nvcc()
    if shutil.which("strip") is None:
        raise KitError("strip was not found; remedy: install binutils")
    python = find_python(wanted.python)
    revisions = {name: _revision(revision) for name, revision in wanted.variants}
    contents.repository_size()  # it raises outside a checkout
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        said: dict[str, Any] = {"schema": contents.SCHEMA, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        say(f"libraries, by {nvcc}")
        said |= {"sources": contents.sources(), "architecture": f"sm_{ARCHITECTURE}"}
        add_libraries(ROOT, made, BUILD / "objects")
        say(f"Triton's programs, by {python}")
        said["triton"] = add_cache(python, made, wanted, say)
        said["wheels"] = add_wheels(made, say)
        said["variants"] = {}
        for name, revision in revisions.items():
            say(f"the variant {name}, {revision[:12]}")
            add_variant(name, revision, made)
            said["variants"][name] = revision
        said["files"] = contents.digests(made)
        (made / contents.MANIFEST).write_text(json.dumps(said, indent=1) + "\n")
        check_size(made, folder, wanted.limit, say)
        made.chmod(0o755)
        _put(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return said


def check_size(made: Path, folder: Path, limit: int, say: Callable[[str], None]) -> None:
    """Print the size of each part. Raises KitError if the total with the repository exceeds the limit."""
    parts = {path.name: contents.size(path) for path in sorted(made.iterdir())}
    parts["the repository"] = contents.repository_size(without=folder)
    for name, count in (parts | {"together": sum(parts.values())}).items():
        say(f"{count / 2**20:8.1f} MiB  {name}")
    if sum(parts.values()) > limit:
        largest = max(parts, key=lambda name: parts[name])
        raise KitError(
            f"together {sum(parts.values()) / 2**20:.1f} MiB, above the {limit / 2**20:.0f} MiB that travel; "
            f"remedy: fewer variants or --no-tests; the largest part is {largest}"
        )


def add_libraries(root: Path, made: Path, objects: Path) -> None:
    """Build both libraries of a checkout, stripped, into an archive."""
    with tempfile.TemporaryDirectory() as place:
        for name in LIBRARIES:
            build_library(root, name, Path(place) / name, objects)
        contents.pack(Path(place), made / PACKED_LIBRARIES)


def build_library(root: Path, name: str, target: Path, objects: Path) -> None:
    """Build a library of a checkout and strip it. Raises KitError with the build's last message."""
    kind = name.removeprefix("libred_kernels_").removesuffix(".so")
    variables = {"RED_KERNELS_ARCHS": ARCHITECTURE, "RED_KERNELS_LINEINFO": "1"}
    command = [sys.executable, "csrc/build.py", kind, "--output", str(target), "--objects", str(objects / kind)]
    _run(command, f"the build of {name}", cwd=root, env=os.environ | variables)
    _run(["strip", str(target)], f"strip on {name}")


def add_cache(python: str, made: Path, wanted: Wanted, say: Callable[[str], None]) -> dict[str, Any]:
    """Compile Triton's programs by the other machine's Python, and pack them; returns the facts about the cache.

    Raises KitError if all fail.
    """
    from . import programs

    lines = programs.of_benchmarks()
    if wanted.tests:
        lines = list(dict.fromkeys([*lines, *programs.of_tests()]))
    site = BUILD / f"triton-{TRITON}-{PYTHON}"
    if not (site / "triton").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(site)]
        command += ["--only-binary=:all:", f"--python-version={PYTHON}", f"triton=={TRITON}"]
        _run(command, f"the installation of Triton {TRITON} for Python {PYTHON}")
    # Programs of other sources have other names, and would be useless freight.
    cache = BUILD / f"cache-{contents.sources(folder='red_kernels/backends/triton')}"
    for old in BUILD.glob("cache-*"):
        if old != cache:
            shutil.rmtree(old)
    cache.mkdir(parents=True, exist_ok=True)
    listed = BUILD / "programs"
    listed.write_text("".join(line + "\n" for line in lines))
    command = [python, "-m", "benchmarks.gpu.triton_cache", str(listed), str(cache)]
    command += ["--seconds", str(60 * wanted.minutes)]
    path = os.pathsep.join([str(ROOT), str(site)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONNOUSERSITE": "1"}
    done = _run(command, "compiling for Triton", shown=True, env=environment)
    said: dict[str, Any] = json.loads(done.splitlines()[-1])
    if said["triton"] != TRITON or not said["python"].startswith(PYTHON + "."):
        raise KitError(
            f"compiled by Python {said['python']} and Triton {said['triton']}, expected {PYTHON} and {TRITON}"
        )
    if said["failed"]:
        error = " ".join(said["errors"][0].split())[:300]
        if not said["programs"]:
            raise KitError(f"none of Triton's {said['failed']} programs compiles: {error}")
        say(f"{said['failed']} programs do not compile, here or there: {error}")
    say(f"{said['programs']} programs" + (f"; {said['left']} are left to the other machine" if said["left"] else ""))
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "cache"
        shutil.copytree(cache, copy)
        contents.leave_sources(copy)
        contents.pack(copy, made / PACKED_CACHE)
    return {name: said[name] for name in ("python", "triton", "programs", "failed", "left")}


def add_wheels(made: Path, say: Callable[[str], None]) -> list[str]:
    """Download the peers; a missing one is named, and not measured then."""
    (made / WHEELS).mkdir()
    for peer in PEERS:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [f"--python-version={PYTHON}", "--dest", str(made / WHEELS), peer]
        if subprocess.run(command, capture_output=True).returncode:
            say(f"{peer} cannot be downloaded: it is measured only if the other machine has it")
    return sorted(path.name for path in (made / WHEELS).iterdir())


def add_variant(name: str, revision: str, made: Path) -> None:
    """Build the package of another revision, with its CUDA library."""
    objects = BUILD / "variants" / name
    with tempfile.TemporaryDirectory() as place:
        root, found = Path(place) / "checkout", Path(place) / "found"
        root.mkdir()
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", revision, "red_kernels", "csrc"], capture_output=True
        )
        if archive.returncode or subprocess.run(["tar", "-x", "-C", str(root)], input=archive.stdout).returncode:
            raise KitError(f"git archive failed on the variant {name}; remedy: see 'git archive {revision}'")
        build_library(root, LIBRARIES[0], root / "red_kernels/lib" / LIBRARIES[0], objects)
        shutil.copytree(root / "red_kernels", found / "red_kernels")
        (made / VARIANTS).mkdir(exist_ok=True)
        contents.pack(found, made / VARIANTS / f"{name}.tar.xz")


def find_python(given: str | None) -> str:
    """A Python of the other machine's version: the given one, or the first one found. Raises KitError."""
    candidates = [given] if given else [f"python{PYTHON}", sys.executable]
    if not given:
        candidates += map(str, sorted(Path.home().glob(f".pyenv/versions/{PYTHON}.*/bin/python{PYTHON}"), reverse=True))
    for candidate in candidates:
        command = [candidate, "-c", "import platform; print(platform.python_version())"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError:
            continue
        if done.returncode == 0 and done.stdout.startswith(PYTHON + "."):
            return candidate
    what = f"PYTHON312 is {given!r}, which is not Python {PYTHON}" if given else f"no Python {PYTHON} was found"
    raise KitError(
        f"{what}, but Triton's cache is valid only for the Python that fills it; remedy: install python{PYTHON}, or "
        f"make gpu-kit PYTHON312=PATH"
    )


def _nvcc() -> str:
    spec = importlib.util.spec_from_file_location("red_kernels_build", ROOT / "csrc/build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = build  # its dataclasses need it there
    spec.loader.exec_module(build)
    try:
        found: str = build.find_nvcc()
    except build.BuildError as error:
        raise KitError(str(error).replace("then install red-kernels again", "then make gpu-kit again")) from error
    return found


def _revision(given: str) -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", given + "^{commit}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KitError(f"VARIANTS: got the revision {given!r}, which git does not know; remedy: one of 'git log'")
    return done.stdout.strip()


def _run(command: Sequence[str], what: str, shown: bool = False, **options: Any) -> str:
    """Run a command; returns its output. `shown`: its progress, on the standard error, goes to this program's."""
    try:
        errors = None if shown else subprocess.PIPE
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, **options)
    except OSError as error:
        raise KitError(f"{what} failed: {error}") from error
    if done.returncode:
        last = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
        raise KitError(f"{what} failed: {last}")
    return done.stdout


def _put(made: Path, folder: Path) -> None:
    """Replace a kit by another; a run interrupted in between leaves one of them."""
    old = made.with_name(made.name + ".old")
    if folder.exists():
        folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _variant(text: str) -> tuple[str, str]:
    name, _, revision = text.partition("=")
    if not (re.fullmatch(r"[A-Za-z0-9_-]{1,30}", name) and revision):
        raise KitError(f"VARIANTS: got {text!r}, expected NAME=REVISION, with a NAME of letters, digits, - and _")
    return name, revision


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kit", description=str(__doc__).split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "gpu-kit")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=REVISION", help="measured beside this")
    parser.add_argument("--python312", help=f"a Python {PYTHON} (default: the first one found)")
    parser.add_argument("--minutes", type=float, default=30.0, help="compile no Triton program after this time")
    parser.add_argument("--no-tests", action="store_true", help="compile only the timed programs")
    given = parser.parse_args(arguments)
    try:
        variants = tuple(_variant(text) for text in given.variant)
        if not given.minutes > 0:
            raise KitError(f"--minutes: got {given.minutes}, expected more than 0")
        make(Wanted(given.folder, variants, given.python312 or None, given.minutes, not given.no_tests))
    except KitError as error:
        print(f"gpu-kit: {error}", file=sys.stderr)
        return 1
    print(given.folder.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
