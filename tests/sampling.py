"""Which cases run: all of them in `make test-nightly`, in `make test` as few as still try every rule.

With RED_KERNELS_TEST_ON (see ``op_cases.py``) only tests of implementations run: those that take the fixture
``implementation`` or are marked ``implementations``; all others are the same whatever the variable says.

A test marked ``sampled`` takes its time. It runs on as few of its cases as have every pair of values of two parameters
(every model with every dtype, ...); one marked ``sampled(1)`` on as few as have every value of every parameter.

Tests of implementations are sampled by threes: every kernel that is compiled by itself, which is one of an operation, a
dtype and an instruction set. Triton's interpreter and the emulator of the CUDA kernels, which have one implementation
each, sample by pairs, or by what RED_KERNELS_TEST_COMBINED says. With RED_KERNELS_TEST_PAIRS=1 all tests of
implementations do, also on a GPU, where the time is short. The interpreter needs a millisecond and more for each
program of a kernel: tests marked ``nightly`` do not run there. Neither runs what is marked ``not_interpreted``.

The choice depends on nothing but the order in which the cases are written down.
"""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterator

import pytest
from op_cases import EMULATED, INTERPRETED, TEST_ALL, TEST_ON

PAIRS = os.environ.get("RED_KERNELS_TEST_PAIRS") == "1"
COMBINED = int(os.environ.get("RED_KERNELS_TEST_COMBINED", "2"))
MARKERS = (
    "implementations: the test goes through the implementations by itself",
    "not_interpreted: large only for what other implementations do with much memory",
    "sampled(number=2): only cases with a new combination of so many values, but in `make test-nightly`",
    "nightly: too slow in Triton's interpreter for a run of each change",
    "long: takes ten seconds or more for what quicker tests try in part: in `make test-nightly` only",
)


FOLDERS = ("ops", "backends")  # of tests of implementations; the Makefile names them too


def chosen(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those that run, in their order. Raises UsageError for a test of implementations in another folder."""
    kept = list(items)
    for item in kept:
        if _of_implementations(item) and item.path.parent.name not in FOLDERS:
            raise pytest.UsageError(f"{item.nodeid} is a test of implementations; expected it in one of {FOLDERS}")
    if TEST_ON is not None:
        kept = [item for item in kept if _of_implementations(item)]
    if INTERPRETED:
        kept = [item for item in kept if not _marked(item, "not_interpreted")]
    if EMULATED:
        kept = [item for item in kept if not _marked(item, "not_interpreted") or not _emulated(item)]
    if TEST_ALL:
        return kept
    kept = [item for item in kept if not _marked(item, "long")]
    if INTERPRETED:
        kept = [item for item in kept if not _marked(item, "nightly")]
    numbers = {item: number for item in kept if (number := _number(item)) is not None}
    few = set(sampled(numbers))
    return [item for item in kept if item not in numbers or item in few]


def _number(item: pytest.Item) -> int | None:
    """How many values a case must combine anew, or None for all cases."""
    marker = item.get_closest_marker("sampled")
    if marker is not None:
        return marker.args[0] if marker.args else 2
    if INTERPRETED or EMULATED:
        return COMBINED
    if PAIRS and _of_implementations(item):
        return 2
    return 3 if _of_implementations(item) else None


def sampled(numbers: dict[pytest.Item, int]) -> Iterator[pytest.Item]:
    """As few cases of each test as have all combinations of so many values that any of its cases has.

    Whichever case has most combinations that none before it had comes next, of several the one written down first.
    """
    tests: dict[object, list[tuple[pytest.Item, set[object]]]] = {}
    for item, number in numbers.items():
        call = getattr(item, "callspec", None)
        values = [(name, repr(value)) for name, value in sorted(call.params.items())] if call is not None else []
        combined = set(itertools.combinations(values, min(number, len(values))))
        tests.setdefault((item.path, getattr(item, "originalname", item.name)), []).append((item, combined))
    for cases in tests.values():
        left = [(-len(combined), place) for place, (_, combined) in enumerate(cases)]
        seen: set[object] = set()
        while left:
            most, place = heapq.heappop(left)
            item, combined = cases[place]
            new = len(combined - seen)
            if new == -most:
                seen |= combined
                yield item
            elif new:
                heapq.heappush(left, (-new, place))  # what is new in a case only becomes less


def _marked(item: pytest.Item, name: str) -> bool:
    return item.get_closest_marker(name) is not None


def _of_implementations(item: pytest.Item) -> bool:
    return "implementation" in getattr(item, "fixturenames", ()) or _marked(item, "implementations")


def _emulated(item: pytest.Item) -> bool:
    """Whether the CUDA kernels run in it, in the emulator."""
    call = getattr(item, "callspec", None)
    implementation = None if call is None else call.params.get("implementation")
    return TEST_ON == "cuda" or getattr(implementation, "backend", None) == "cuda"
