"""Installing a kit on the machine with the GPU: libraries, Triton's programs, wheels. It imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import contents
from .contents import LIBRARIES, PACKED_CACHE, PACKED_LIBRARIES, ROOT, WHEELS, KitError

_ASKED = """
import importlib.metadata as m, json, platform
found = {"python": platform.python_version()}
for name in ("torch", "triton"):
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: found[name] = None
print(json.dumps(found))
"""


@dataclass
class Placed:
    """The state after the installation.

    Attributes:
        build: whether the libraries must still be built.
        variables: for all commands.
        said: remarks for the user, a line each.
    """

    build: bool
    variables: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def place(kit: Path, work: Path, python: str, root: Path = ROOT, rehearsal: bool = False) -> Placed:
    """Install the parts of a kit: the libraries where the package looks for them, all others under `work`.

    A part that does not fit these sources or this machine is skipped, with the reason. Without a kit the libraries are
    built, and Triton's programs compiled when they are needed. A rehearsal keeps the present libraries.

    Raises:
        KitError: the kit is damaged.
    """
    cache = work / "triton"
    cache.mkdir(parents=True, exist_ok=True)
    variables = {"TRITON_CACHE_DIR": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor")}
    if not kit.exists():
        why = f"{kit} does not exist: the libraries are built here; remedy: make gpu-kit first"
        return Placed(not rehearsal, variables, [f"{kit} does not exist" if rehearsal else why])
    said = contents.read_manifest(kit)
    placed = Placed(False, variables)
    if said["sources"] == contents.sources(root):
        _libraries(kit, work / "lib" if rehearsal else root / "red_kernels/lib")
        placed.said.append(f"libraries of the kit, for {said['architecture']}" + (", not used" if rehearsal else ""))
    else:
        placed.build = not rehearsal
        placed.said.append(
            "the kit's libraries are of other sources, so they are built here; remedy: make gpu-kit again"
        )
    here, made = versions(python), said["triton"]
    if here["triton"] == made["triton"] and _minor(here["python"]) == _minor(made["python"]):
        contents.unpack(kit / PACKED_CACHE, cache)
        count = contents.settle(cache)
        placed.said.append(
            f"{count} Triton programs of the kit" + (f"; {made['left']} are left" if made["left"] else "")
        )
    else:
        placed.said.append(
            f"the kit's Triton programs are for Python {_minor(made['python'])} and Triton {made['triton']}, but this "
            f"is Python {here['python']} and Triton {here['triton']}: programs are compiled when they are needed"
        )
    wheels = sorted((kit / WHEELS).glob("*.whl"))
    if wheels:
        placed.said.append(_wheels(python, wheels, work / "site"))
        variables["PYTHONPATH"] = str(work / "site")
    return placed


def programs_in(cache: Path) -> int:
    """The number of programs in Triton's cache."""
    return sum(1 for _ in contents.groups(cache))


def versions(python: str) -> dict[str, str | None]:
    """The versions of a Python, its torch and its Triton. Raises KitError if it does not run."""
    try:
        done = subprocess.run([python, "-c", _ASKED], capture_output=True, text=True)
    except OSError as error:
        raise KitError(f"PYTHON is {python!r}, which does not run ({error}); remedy: the path of a Python") from error
    if done.returncode:
        raise KitError(f"PYTHON is {python!r}, which does not run: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def _minor(version: str | None) -> str:
    return ".".join(str(version).split(".")[:2])


def _libraries(kit: Path, target: Path) -> None:
    """Replace the present libraries, each completely."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as folder:
        contents.unpack(kit / PACKED_LIBRARIES, Path(folder))
        for name in LIBRARIES:
            if not (Path(folder) / name).is_file():
                raise KitError(f"{kit / PACKED_LIBRARIES} lacks {name}; remedy: make gpu-kit again")
        for name in LIBRARIES:
            (Path(folder) / name).replace(target / name)


def _wheels(python: str, wheels: Sequence[Path], site: Path) -> str:
    command = [python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    command += ["--upgrade", "--target", str(site), *map(str, wheels)]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    names = ", ".join(path.name.split("-")[0] for path in wheels)
    if done.returncode:
        return f"{names}: not installed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    return f"{names}: installed from the kit"
