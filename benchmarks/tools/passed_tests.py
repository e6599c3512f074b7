"""A pytest plugin for runs that are cut off: the names of tests that passed or were skipped go into a file at once.

    PASSED_TESTS=FILE python -m pytest -p benchmarks.tools.passed_tests

The tests named in the file already are left out, so the next run goes on where this one ended.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

VARIABLE = "PASSED_TESTS"


def _file() -> Path:
    name = os.environ.get(VARIABLE)
    if not name:
        raise pytest.UsageError(f"{VARIABLE} is not set, expected the file for names of passed tests")
    return Path(name)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that gives xdist's workers their tests hears of them too
        config.pluginmanager.register(_Writer())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = _file()
    passed = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
    left_out = [item for item in items if item.nodeid in passed]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid not in passed]


class _Writer:
    def __init__(self) -> None:
        self._outcomes: dict[str, list[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Iterator[None]:
        yield
        self._outcomes.setdefault(report.nodeid, []).append(report.outcome)
        if report.when == "teardown" and "failed" not in self._outcomes.pop(report.nodeid):
            with _file().open("a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")
