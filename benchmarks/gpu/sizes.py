"""The measured sizes on a GPU, for the plan, which needs no torch, and for its preparations."""

from __future__ import annotations

WIDTHS = (768, 1024, 2048, 4096, 5120, 8192, 16384)
ELEMENTS = (1 << 26, 1 << 24)  # of an activation: 64M, bound by bandwidth, and 16M
OPERATION_TESTS = ("tests/ops", "tests/backends")  # all tests that run with RED_KERNELS_TEST_ON
NORMS = ("edit_add_rms_norm", "edit_add_layer_norm")
