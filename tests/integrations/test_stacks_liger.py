"""Liger's kernels and the patch in one model, whichever comes first; on a GPU, and in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from old_releases import needs_interpreter
from patience import HANGS
from places import python_path

pytest.importorskip("liger_kernel")
pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
with_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=with_gpu)])
@pytest.mark.parametrize(
    "order", [pytest.param("before", marks=pytest.mark.long), pytest.param("after", marks=pytest.mark.long), "class"]
)
@needs_interpreter
def test_liger(order, device):
    """Losses and vectors of three steps as without Liger, its norms in use and none of ours in their place."""
    environment = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = str(int(device == "cpu"))
    command = [sys.executable, str(HERE / "liger_worker.py"), order, device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
