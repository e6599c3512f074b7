"""DeepSpeed's ZeRO on two gloo processes."""

from __future__ import annotations

import importlib.util

import pytest
from two_processes import run_pair

# Not imported here: in the processes that run the other tests it would change what Trainer does.
installed = importlib.util.find_spec("deepspeed") is not None
pytestmark = pytest.mark.skipif(not installed, reason="deepspeed is not installed")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(stage, tmp_path):
    """As one process, saved and resumed half-way; with stage 3 each process holds a part of each vector."""
    run_pair("deepspeed_worker.py", str(stage), str(tmp_path))
