"""Linear layers of libraries, by the fingerprint of their `forward`."""

from __future__ import annotations

__all__ = ["COLUMNS"]

# Linear layers whose output is `W x + b` and nothing else: whether the weight is (in, out), not (out, in).
COLUMNS = {
    "12817d3c8dae2c62": True,  # transformers' Conv1D
    "02de280511999245": False,  # Falcon
}
