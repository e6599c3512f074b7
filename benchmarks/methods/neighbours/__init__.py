"""RED's neighbours: other methods with few trained parameters, each after its paper, for comparison.

If PEFT has a method its implementation is used: RoAd, VeRA and HRA (`adapters.py`), SHiRA for the sparse ones
(`sparse.py`). LoRTA, LoRETTA and MELoRA are written here, from their papers' formulas. docs/benchmarks.md has them in
one table, with their omissions.
"""

from __future__ import annotations

from . import adapters, loretta, lorta, melora, sparse

METHODS = (*adapters.METHODS, *sparse.METHODS, lorta.METHOD, *loretta.METHODS, melora.METHOD)
