"""What all tests share: one random seed, and the implementations that operations are tested on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from op_cases import IMPLEMENTATIONS, Implementation

# The same examples in every run: a failure is there again when it is looked for.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=IMPLEMENTATIONS, ids=str)
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """Every backend available here, the compiled one with each instruction set, in use during the test."""
    with request.param.in_use():
        yield request.param
