"""Norms and linear layers of libraries, by the fingerprint of their `forward`."""

from __future__ import annotations

from ..fusion.norms import NormSpec

__all__ = ["COLUMNS", "NORMS"]

# The rounding of the normed value before the weight is the only difference to ours.
NORMS = {
    "78ed4555aca3957b": NormSpec(False, "variance_epsilon", 0.0),  # Llama, Mistral, Qwen2, Qwen3, Phi-3
    "8d6c6d8edf142c35": NormSpec(False, "variance_epsilon", 0.0),  # T5
    "a8b9757d188ce3aa": NormSpec(False, "eps", 1.0),  # Gemma 2 and 3
    "ddff79d9bb15672b": NormSpec(True, "variance_epsilon", 0.0),  # DeBERTa
}
# Linear layers whose output is `W x + b` and nothing else: whether the weight is (in, out), not (out, in).
COLUMNS = {
    "12817d3c8dae2c62": True,  # transformers' Conv1D
    "02de280511999245": False,  # Falcon
}
