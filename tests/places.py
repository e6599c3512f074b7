"""Where the repository and the folders of its tests are, also for scripts that run in processes of their own."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FOLDERS = (TESTS, *sorted(path for path in TESTS.iterdir() if any(path.glob("*.py"))))  # as in pyproject.toml


def python_path() -> str:
    """A PYTHONPATH by which a script finds the package, the benchmarks and all helpers of the tests."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *map(str, FOLDERS), *([inherited] if inherited else [])])
