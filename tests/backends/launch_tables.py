"""A table of launch rules, written by hand, for the tests of tables and of what shows them."""

from __future__ import annotations

from typing import Any

QUARTILES = {"low": 1.0, "median": 2, "high": 3.0}
MEASURED = {
    "operation": "edit_add forward", "dtype": "bf16", "rows": 512, "ratio": 1.1,
    "microseconds": QUARTILES, "default_microseconds": QUARTILES,
}  # fmt: skip
WHOLE = {"rows": 2, "chunk": 256, "chunks": 3, "warps": 2, "programs": 0}
STEADY = {**WHOLE, "programs": 5}
SLAB = {"rows": 8, "chunk": 128, "warps": 2, "programs": 3}
TABLE: dict[str, Any] = {
    "format": 1,
    "architecture": "sm_90",
    "warp": 32,
    "device": "a GPU",
    "multiprocessors": 132,
    "versions": {"torch": "2.11", "triton": "3.6", "red_kernels": "0.1", "commit": None},
    "date": "2026-01-01T00:00:00Z",
    "measuring": "by hand",
    "entries": [
        {"rule": "norm_forward", "width": 768, "itemsize": 2, "tile": WHOLE, "default": WHOLE},
        {"rule": "norm_forward", "width": 4096, "itemsize": 2, "tile": None, "default": WHOLE},
        {"rule": "norm_backward", "width": 768, "itemsize": 2, "sums": 2, "tile": STEADY, "default": None},
        {"rule": "edit_backward", "width": 768, "itemsize": 4, "tile": SLAB, "default": SLAB},
        {"rule": "wide_norm", "width": 768, "itemsize": 2, "tile": {**WHOLE, "rows": 1}, "default": WHOLE},
    ],
    "linear_wins": [{"dtype": "bfloat16", "m": 1024, "n": 4096, "k": 11008, "ratio": 1.2, "measured": [MEASURED]}],
}  # fmt: skip
for _entry in TABLE["entries"]:
    _entry |= {"ratio": 1.25, "measured": [MEASURED]}
