"""What all tests share: one random seed, the implementations that operations are tested on, and which cases run.

With RED_KERNELS_TEST_ON (see ``op_cases.py``) only tests of implementations run: those that take the fixture
``implementation`` or are marked ``implementations``; all others are the same whatever the variable says.

Triton's interpreter needs a millisecond and more for each program of a kernel. There a test with several parameters
runs on as few of its cases as have every pair of values of two parameters (every operation with every dtype, every
shape with every operation, ...), without those marked ``nightly``. ``make test-nightly`` runs all but those marked
``not_interpreted``.
The emulator of the CUDA kernels is quicker: all cases run there, but of tests marked ``pairs`` the same few.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator

import process_state
import pytest
import torch
from hypothesis import settings
from op_cases import EMULATED, IMPLEMENTATIONS, INTERPRETED, TEST_ALL, TEST_ON, Implementation

if INTERPRETED:
    import interpreter

    interpreter.mend()

pytest_plugins = ["served"]  # fixtures

# The same examples in every run: a failure is there again when it is looked for.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "implementations: the test goes through the implementations by itself")
    config.addinivalue_line("markers", "not_interpreted: large only for what other implementations do with much memory")
    config.addinivalue_line(
        "markers", "pairs: in the emulator of the CUDA kernels only cases with a new pair of values"
    )
    config.addinivalue_line("markers", "nightly: too slow in Triton's interpreter for a run of each change")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = list(items)
    if TEST_ON is not None:
        kept = [item for item in kept if _of_implementations(item)]
    if INTERPRETED:
        kept = [item for item in kept if item.get_closest_marker("not_interpreted") is None]
    if EMULATED:
        kept = [item for item in kept if item.get_closest_marker("not_interpreted") is None or not _emulated(item)]
    if INTERPRETED and not TEST_ALL:
        kept = _pairs(item for item in kept if item.get_closest_marker("nightly") is None)
    if EMULATED and not TEST_ALL:
        pairs = set(_pairs(item for item in kept if item.get_closest_marker("pairs") is not None))
        kept = [item for item in kept if item in pairs or item.get_closest_marker("pairs") is None]
    left = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """What libraries and the collection made is there to stay: collecting garbage passes over it, in every test."""
    gc.collect()
    gc.freeze()


def _of_implementations(item: pytest.Item) -> bool:
    return (
        "implementation" in getattr(item, "fixturenames", ()) or item.get_closest_marker("implementations") is not None
    )


def _emulated(item: pytest.Item) -> bool:
    """Whether the CUDA kernels run in it, in the emulator."""
    call = getattr(item, "callspec", None)
    implementation = None if call is None else call.params.get("implementation")
    return TEST_ON == "cuda" or getattr(implementation, "backend", None) == "cuda"


def _pairs(items: Iterator[pytest.Item]) -> list[pytest.Item]:
    """Those items, in their order, that have a pair of values of their test's parameters which none before them had."""
    seen: dict[object, set[object]] = {}
    kept = []
    for item in items:
        call = getattr(item, "callspec", None)
        values = [(name, repr(value)) for name, value in sorted(call.params.items())] if call is not None else []
        pairs = set(itertools.combinations(values, 2)) or {tuple(values)}
        before = seen.setdefault((item.path, getattr(item, "originalname", item.name)), set())
        if not pairs <= before:
            kept.append(item)
            before |= pairs
    return kept


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """No test depends on what ran before it in its process."""
    before = process_state.state()
    process_state.seed()
    yield
    process_state.forget_compiled()
    changed = process_state.changes(before, process_state.state())
    assert not changed, f"the test left the process changed: {'; '.join(changed)}"


@pytest.fixture(params=IMPLEMENTATIONS, ids=str)
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """Every backend available here, the compiled one with each instruction set, in use during the test."""
    with request.param.in_use():
        yield request.param


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """torch fills what it allocates with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture
def families() -> Iterator[None]:
    """Whatever families the test registers are forgotten behind it."""
    from red_kernels import models

    before = list(models.FAMILIES), dict(models.LAYOUTS), dict(models._BY_LAYER)
    yield
    models.FAMILIES[:] = before[0]
    for registry, kept in ((models.LAYOUTS, before[1]), (models._BY_LAYER, before[2])):
        registry.clear()
        registry.update(kept)
