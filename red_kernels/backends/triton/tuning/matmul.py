"""The sizes at which the fused matmul of `linear_edit` beats the composed form: torch's linear layer and an edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....support.clocks import interleaved, quartiles
from ...arguments import affine_edit
from .. import linear, operations, tuned
from .search import Bench, Case, difference, poison
from .workloads import DTYPES, Result, input_sets, record

OPERATION = "linear_edit"
# Input widths of edited layers, the last of an FFN, by their output widths: of widely used models.
DEPTHS = {
    768: (3072,),
    1024: (4096,),
    2048: (8192,),
    3072: (8192,),
    4096: (11008, 14336),
    5120: (13824,),
    8192: (28672,),
}
TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Product:
    """A linear layer with its edit, a :class:`.workloads.Workload`. The dtype 'tf32' is float32 multiplied as TF32."""

    dtype: str
    rows: int
    width: int
    depth: int
    residual: bool = True

    def __str__(self) -> str:
        return f"{self.operation}, {self.rows} x {self.depth} to {self.width}, {self.dtype}"

    @property
    def operation(self) -> str:
        return OPERATION if self.residual else f"{OPERATION} without residual"

    @property
    def terms(self) -> int:
        return self.depth

    @property
    def place(self) -> tuple[str, int, int, int]:
        """The key of a table's entry: dtype, m, n and k."""
        dtype = "tf32" if self.dtype == "tf32" else str(DTYPES[self.dtype]).removeprefix("torch.")
        return dtype, tuned.bucket(self.rows), self.width, self.depth

    def probe(self) -> Product:
        """The whole size: this rule depends on the rows."""
        return self

    def tensors(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        draw = torch.Generator(device).manual_seed(seed)
        dtype = torch.float32 if self.dtype == "tf32" else DTYPES[self.dtype]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, device=device)

        found = {"x": normal(self.rows, self.depth), "weight": normal(self.width, self.depth) / self.depth**0.5}
        if self.residual:
            found["residual"] = normal(self.rows, self.width)
        found = {name: t.to(dtype) for name, t in found.items()}
        return found | {"scale": 1 + 0.1 * normal(self.width), "bias": 0.1 * normal(self.width)}

    def call(self, tensors: Mapping[str, Tensor]) -> Result:
        t = tensors
        with self._precision():
            return (linear.run(t["x"], t["weight"], None, t.get("residual"), affine_edit(t["scale"], t["bias"])),)

    def composed(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The same without the fused matmul."""
        t = tensors
        with self._precision(), tuned.forcing({}):
            h = F.linear(t["x"], t["weight"])
            return operations.edit_forward(h, t.get("residual"), affine_edit(t["scale"], t["bias"]))

    @contextmanager
    def _precision(self) -> Iterator[None]:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32" if self.dtype == "tf32" else "ieee"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def products(widths: Sequence[int], rows: Sequence[int], dtypes: Sequence[str], bench: Bench) -> list[Product]:
    """Each width with the depths of models, or four times itself; each number of rows and three quarters of it, for all
    that it covers; with and without a residual. fp32 is measured as TF32 too if the device has that."""
    names = [*dtypes, "tf32"] if "fp32" in dtypes and not bench.architecture.name.startswith("gfx") else list(dtypes)
    sizes = dict.fromkeys(size for m in map(tuned.bucket, rows) for size in (m, max(m // 2 + 1, 3 * m // 4)))
    return [
        Product(dtype, m, width, depth, residual)
        for dtype in names
        for width in widths
        for depth in DEPTHS.get(width, (4 * width,))
        for m in sizes
        for residual in (True, False)
    ]


def compare(products: Sequence[Product], tile: Any, bench: Bench) -> tuple[Case, ...]:
    """The times of the fused matmul with a tile, and of the composed form as the default.

    Raises ValueError if the two results differ.
    """
    cases = []
    for product in products:
        runs = [_one_pass(product, tile, bench) for _ in range(bench.passes)]
        fused, composed = (quartiles([run[form] for run in runs]) for form in ("fused", "composed"))
        cases.append(Case(product, fused, composed))
    return tuple(cases)


def _one_pass(product: Product, tile: Any, bench: Bench) -> dict[str, list[float]]:
    sets = input_sets(product, bench.device, bench.cache_bytes)
    fused = [record(partial(product.call, tensors), {"linear": tile})[0] for tensors in sets]
    poison(fused[0].results)
    for launches in fused:
        launches.run()
    results = [product.composed(tensors) for tensors in sets]
    bench.synchronize()
    # The composed form rounds between its two steps, and each form rounds to TF32 separately.
    eps = TF32_EPS if product.dtype == "tf32" else torch.finfo(results[0].dtype).eps
    wrong = difference(fused[0].results, (results[0],), product.terms, eps)
    if wrong is not None:
        raise ValueError(f"{product}: the fused matmul and the composed form differ: {wrong}")
    measures = {
        "fused": bench.clock([launches.run for launches in fused]),
        "composed": bench.clock([partial(product.composed, tensors) for tensors in sets]),
    }
    return interleaved(measures, bench.confirming_rounds)


def wins(cases: Sequence[Case]) -> bool:
    """Whether the fused matmul beats the composed form by more than the noise in every case."""
    return bool(cases) and all(case.tile.beats(case.default) for case in cases)
