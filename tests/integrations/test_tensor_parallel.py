"""Processes that share a model's weights, or the rows of a batch, train the vectors as one process does."""

from __future__ import annotations

import pytest
import torch.distributed
from two_processes import run_pair

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
WORKER = "tensor_parallel_worker.py"


def test_kinds_and_positions(tmp_path):
    """Every kind, where its site is split and where it is whole; what cannot be split; what is drawn at random."""
    run_pair(WORKER, "kinds,refusals,random_starts", str(tmp_path))


def test_several_edits_and_other_sites(tmp_path):
    run_pair(WORKER, "several,sites", str(tmp_path))


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    run_pair(WORKER, "trainer", str(tmp_path))


def test_parts_of_the_rows(tmp_path):
    """Context parallelism by `rk.sum_gradients_over`, and torch's styles of sequence parallelism."""
    run_pair(WORKER, "rows,sequence", str(tmp_path))


def test_expert_parallelism(tmp_path):
    run_pair(WORKER, "experts", str(tmp_path))


def test_with_fsdp(tmp_path):
    """Tensor parallelism and FSDP2, two processes each way."""
    run_pair(WORKER, "mesh", str(tmp_path), count=4)
