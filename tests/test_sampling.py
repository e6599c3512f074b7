"""Which cases are left of a grid: all combinations that count, in few cases, the same ones in every run."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sampling
from patience import HANGS


class Case(SimpleNamespace):
    __hash__ = object.__hash__


def cases(*parameters: tuple[Any, ...], name: str = "test") -> list[Any]:
    return [
        Case(path="a", name=name, originalname=name, callspec=SimpleNamespace(params=dict(enumerate(values))))
        for values in itertools.product(*parameters)
    ]


def combinations(chosen: list[Any], number: int) -> set[Any]:
    return {pair for item in chosen for pair in itertools.combinations(sorted(item.callspec.params.items()), number)}


@pytest.mark.parametrize(
    ("sizes", "number", "expected"),
    [((4, 5), 1, 5), ((2, 2, 3), 2, 6), ((4, 5), 2, 20), ((3, 3, 3, 3), 2, 16), ((7,), 2, 7), ((7,), 1, 7)],
)
def test_every_combination_is_there_in_few_cases(sizes: tuple[int, ...], number: int, expected: int) -> None:
    grid = cases(*(tuple(range(size)) for size in sizes))
    chosen = list(sampling.sampled(dict.fromkeys(grid, number)))
    number = min(number, len(sizes))
    assert combinations(chosen, number) == combinations(grid, number)
    assert len(chosen) == len(set(map(id, chosen))) <= expected
    assert [item.callspec.params for item in sampling.sampled(dict.fromkeys(grid, number))] == [
        item.callspec.params for item in chosen
    ]


def test_tests_are_sampled_by_themselves() -> None:
    one, other = cases((1, 2), (1, 2), name="one"), cases((1, 2), (1, 2), name="other")
    alone = cases(name="alone")
    assert len(alone) == 1
    numbers = dict.fromkeys([*one, *other], 1) | dict.fromkeys(alone, 2)
    assert len(list(sampling.sampled(numbers))) == 5


@pytest.mark.parametrize(("pairs", "number"), [(False, 3), (True, 2)])
def test_tests_of_implementations_sample_by_pairs_where_asked(
    pairs: bool, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with little time; those of anything else run whole, and a test's own mark is what counts."""
    for name, value in (("PAIRS", pairs), ("INTERPRETED", False), ("EMULATED", False)):
        monkeypatch.setattr(sampling, name, value)
    marks = {"own": SimpleNamespace(args=(1,)), None: None}

    def item(fixtures: tuple[str, ...], mark: str | None = None) -> Any:
        return Case(fixturenames=fixtures, get_closest_marker=lambda name: marks[mark] if name == "sampled" else None)

    assert sampling._number(item(("implementation",))) == number
    assert sampling._number(item(("implementation",), "own")) == 1
    assert sampling._number(item(())) is None


def test_tests_of_implementations_are_where_they_are_looked_for() -> None:
    def item(folder: str) -> Any:
        return Case(path=Path(folder) / "test_x.py", nodeid="x", name="x", fixturenames=("implementation",),
                    get_closest_marker=lambda name: None)  # fmt: skip

    assert len(sampling.chosen([item("tests/ops"), item("tests/backends")])) == 2
    with pytest.raises(pytest.UsageError, match="x is a test of implementations; expected it in one of"):
        sampling.chosen([item("tests/patching")])


def test_a_group_has_one_worker(tmp_path: Path) -> None:
    """Which makes what takes a minute once: releases of pytest and pytest-xdist that do not fit pass over it."""
    (tmp_path / "test_group.py").write_text(
        "import os, pathlib, pytest\n"
        "pytestmark = pytest.mark.xdist_group('one')\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "def test_it(number): pathlib.Path(f'{os.environ[\"PYTEST_XDIST_WORKER\"]}-{number}').touch()\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        ".",
        "-n",
        "2",
        "--dist",
        "loadgroup",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [path.name.split("-") for path in tmp_path.glob("gw*-*")]
    assert len(ran) == 4
    assert len({worker for worker, _ in ran}) == 1
