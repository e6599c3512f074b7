"""What all tests share: how each finds its process, which cases run, and the implementations of the operations."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import process_state
import pytest
import sampling
import torch
from hypothesis import settings
from op_cases import IMPLEMENTATIONS, INTERPRETED, Implementation

if INTERPRETED:
    import interpreter

    interpreter.mend()

pytest_plugins = ["served"]  # fixtures

# The same examples in every run: a failure is there again when it is looked for.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("fixed")


def pytest_configure(config: pytest.Config) -> None:
    for marker in sampling.MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = sampling.chosen(items)
    left = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """What libraries and the collection made is there to stay: collecting garbage passes over it, in every test."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The files that took longest: what a long part of `make test` spends its time on."""
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if sum(seconds.values()) < 60:
        return
    terminalreporter.section("files that took longest")
    for name, taken in seconds.most_common(20):
        terminalreporter.write_line(f"{taken:7.1f} s  {name}")


@pytest.fixture(scope="session", autouse=True)
def _unhurried() -> None:
    """What a report foresees does not depend on how busy this machine is."""
    from red_kernels.patching import expect

    expect._MOST = 60.0


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

    before = list(models.FAMILIES), list(models._REGISTERED), dict(models._BY_LAYER)
    yield
    models.FAMILIES[:] = before[0]
    models._REGISTERED[:] = before[1]
    models._BY_LAYER.clear()
    models._BY_LAYER.update(before[2])


@pytest.fixture
def known_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever backends the test registers are forgotten behind it."""
    from red_kernels import backends

    monkeypatch.setattr(backends, "_known", backends._Known(backends._TABLE))


@pytest.fixture
def kinds() -> Iterator[None]:
    """Whatever kinds of edit the test registers are forgotten behind it."""
    from red_kernels.edits.kinds import registry

    before = [(held, dict(held)) for held in (registry._KINDS, registry._PARTS)]
    yield
    for held, kept in before:
        held.clear()
        held.update(kept)
