"""What tests of the build share: csrc/build.py as a module, small programs, the symbols of a library."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

LIBRARY = "red_kernels/lib/libred_kernels_cpu.so"
CUDA_LIBRARY = "red_kernels/lib/libred_kernels_cuda.so"
NODES_LIBRARY = "red_kernels/lib/libred_kernels_nodes.so"


def _load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("red_kernels_build", ROOT / "csrc/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = _load_build()


def why_missing(library: str) -> str | None:
    """Why a library was not built here, None if it was."""
    if (ROOT / library).is_file():
        return None
    missing = (ROOT / library).with_name(re.sub(r".*_(\w+)\.so", r"\1.missing", library))
    return missing.read_text() if missing.is_file() else "it was never built"


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def dynamic_symbols(library: str, *options: str) -> list[str]:
    """What nm lists of a library; the test is skipped, with the reason, where there is none."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("nm (binutils) is not installed")
    if (reason := why_missing(library)) is not None:
        pytest.skip(f"no {library}: {reason}")
    listed = subprocess.run([tool, "-D", *options, str(ROOT / library)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in listed.stdout.splitlines()]
