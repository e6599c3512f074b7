"""PEFT's own tests, run on RED: they are fetched from the source archive of the PEFT that is installed, by pip.

Their lists of cases are filled with ours before pytest collects them, and in the place of models from a hub there are
tiny ones made here. Nothing of theirs is kept in this project.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import transformers

PACKAGE = "tests_of_peft"
_VERSION = importlib.metadata.version("peft")
_FOLDER = Path(tempfile.gettempdir()) / f"red-kernels-peft-{_VERSION}-{getpass.getuser()}"


def fetched() -> Path:
    """The folder with PEFT's tests as a package; skips where pip cannot fetch them."""
    if not (_FOLDER / PACKAGE).is_dir():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER) as fresh:
            options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet", "--dest", fresh]
            command = [sys.executable, "-m", "pip", "download", *options, f"peft=={_VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            archives = list(Path(fresh).glob("*.tar.gz"))
            if not archives:
                reason = f"pip cannot fetch the source of peft {_VERSION}: {done.stderr.strip()[-200:]}"
                pytest.skip(reason, allow_module_level=True)
            with tarfile.open(archives[0]) as archive:
                archive.extractall(fresh, filter="data")
            tests = next(Path(fresh).glob("peft-*/tests"))
            try:
                os.replace(tests, _FOLDER / PACKAGE)
            except OSError:  # another process was quicker
                assert (_FOLDER / PACKAGE).is_dir()
    return _FOLDER


def module(name: str) -> types.ModuleType:
    """One of PEFT's test modules. Skips where it cannot be fetched, or needs a package that is not there."""
    folder = str(fetched())
    if folder not in sys.path:
        sys.path.append(folder)
    stand_ins = [_stand_in("diffusers", "StableDiffusionPipeline")]
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    except ModuleNotFoundError as error:
        pytest.skip(f"the tests of peft {_VERSION} need {error.name}", allow_module_level=True)
    finally:
        for name_of_stand_in in filter(None, stand_ins):
            del sys.modules[name_of_stand_in]


def _stand_in(package: str, *names: str) -> str | None:
    """A package that PEFT's tests import and these do not use, where it is missing; its name, to take it out again."""
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        return None
    made = types.ModuleType(package)
    made.__spec__ = importlib.machinery.ModuleSpec(package, None)
    for name in names:
        setattr(made, name, type(name, (), {}))
    sys.modules[package] = made
    return package


def fill(cases: list[Any], ours: Iterable[Any]) -> list[Any]:
    """Put our cases in the place of PEFT's in a list that its tests are parametrised by; the list itself."""
    cases[:] = ours
    return cases


def only(kind: type, lists: Iterable[list[Any]], without: Iterable[str] = ()) -> type:
    """A class of PEFT's tests, with those alone that are parametrised by one of the lists that were filled."""
    filled = {id(cases) for cases in lists}
    members: dict[str, Any] = {}
    for name in dir(kind):
        if name.startswith("test"):
            marks = getattr(getattr(kind, name), "pytestmark", [])
            ours = any(id(argument) in filled for mark in marks for argument in mark.args)
            if not ours or name in without:
                members[name] = None
    return type(kind.__name__, (kind,), members)


def tiny_folder(name: str, model: str, head: str, seed: int = 0) -> str:
    """A folder with a tiny random model of the zoo for PEFT's tests to load; for `"AutoModel"` one without a head."""
    folder = _FOLDER / name
    if not folder.is_dir():
        made = zoo.tiny(model, seed=seed)
        if head == "AutoModel":  # not a part of the other, which has no pooler
            made = transformers.AutoModel.from_config(made.config)
        with tempfile.TemporaryDirectory(dir=_FOLDER) as fresh:
            made.save_pretrained(f"{fresh}/{name}")
            with contextlib.suppress(OSError):  # another process was quicker
                os.replace(f"{fresh}/{name}", folder)
    return str(folder)
