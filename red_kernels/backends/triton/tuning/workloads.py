"""The measured calls: each operation's forward and backward as in a patched model, as lists of kernel launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ...arguments import Norm, Statistics, affine_edit
from .. import launch, operations, tuned
from ..tuned import Key

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPERATIONS = ("edit", "edit_add", "edit_add_rms_norm", "edit_add_layer_norm", "rms_norm_edit", "layer_norm_edit")
MOST_SETS = 256
EPS = 1e-6
_FINISHING = {"finish": "add_lines"}  # rules of a small kernel behind the one that takes the time

Result = tuple[Tensor | None, ...]


class Workload(Protocol):
    """A call of the kernels, at one size."""

    @property
    def operation(self) -> str:
        """Its readable name."""

    @property
    def dtype(self) -> str:
        """Of the activations, as on the command line."""

    @property
    def rows(self) -> int:
        """Of the activations."""

    @property
    def terms(self) -> int:
        """The number of terms of its longest sums."""

    def probe(self) -> Workload:
        """The same, as small as possible without using another rule."""

    def tensors(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Random inputs."""

    def call(self, tensors: Mapping[str, Tensor]) -> Result:
        """Run it; its results, as a tuple."""


@dataclass(frozen=True)
class Pass:
    """One direction of an operation, a :class:`Workload`. ``sums`` of a backward's gradients are those of vectors: as
    many of scale, bias, weight and norm_bias, in this order."""

    name: str
    backward: bool
    dtype: str
    rows: int
    width: int
    sums: int = 0

    def __str__(self) -> str:
        return f"{self.operation}, {self.rows} x {self.width}, {self.dtype}"

    @property
    def operation(self) -> str:
        return f"{self.name} {'backward' if self.backward else 'forward'}"

    @property
    def terms(self) -> int:
        return max(self.rows, self.width)

    def probe(self) -> Pass:
        return replace(self, rows=1)

    def tensors(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """Tensors from a forward need not be consistent: no kernel checks that."""
        draw = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[self.dtype]

        def activation() -> Tensor:
            return torch.randn(self.rows, self.width, generator=draw, device=device).to(dtype)

        def vector(around: float) -> Tensor:
            return around + 0.1 * torch.randn(self.width, generator=draw, device=device)

        found = {name: activation() for name in self._activations()}
        found |= {"scale": vector(1.0), "bias": vector(0.0)}
        found |= {"weight": vector(1.0).to(dtype), "norm_bias": vector(0.0).to(dtype)}
        if self.backward:
            found["rstd"] = 0.5 + torch.rand(self.rows, generator=draw, device=device)
            found["mean"] = 0.1 * torch.randn(self.rows, generator=draw, device=device)
        return found

    def call(self, tensors: Mapping[str, Tensor]) -> Result:
        t, centered = tensors, "layer_norm" in self.name
        edit = affine_edit(t["scale"], t["bias"])
        norm = Norm(t["weight"], t["norm_bias"] if centered else None, EPS, 0.0, centered)
        found: Any
        if not self.backward:
            if self._kind == "edit":
                found = operations.edit_forward(t["x"], t.get("residual"), edit)
            elif self._kind == "edit_norm":
                found = operations.edit_norm_forward(t["x"], t["residual"], edit, norm, True)
            else:
                found = operations.norm_edit_forward(t["x"], norm, edit)
            return found if isinstance(found, tuple) else (found,)
        for_scale, for_bias, for_weight, for_norm_bias = (self.sums > place for place in range(4))
        statistics = Statistics(t["mean"] if centered else None, t["rstd"])
        edit = affine_edit(t["scale"])  # a backward does not use the bias
        x = t["x"] if for_scale else None
        if self._kind == "edit":
            found = operations.edit_backward(t["dy"], x, edit, 1, (True, for_scale, for_bias))
        elif self._kind == "edit_norm":
            found = operations.edit_norm_backward(
                t["dy"], t["dz"], t["z"], x, None, edit, norm, statistics, 1,
                (True, True, for_scale, for_bias, for_weight, for_norm_bias),
            )  # fmt: skip
        else:
            needs = (True, for_weight, for_norm_bias, for_scale, for_bias)
            found = operations.norm_edit_backward(t["dy"], t["x"], norm, edit, statistics, 1, needs)
        return tuple(found)

    def _activations(self) -> tuple[str, ...]:
        if not self.backward:
            return ("x",) if self.name == "edit" or self._kind == "norm_edit" else ("x", "residual")
        return ("dy", "dz", "z", "x") if self._kind == "edit_norm" else ("dy", "x")

    @property
    def _kind(self) -> str:
        if "norm" not in self.name:
            return "edit"
        return "edit_norm" if self.name.startswith("edit") else "norm_edit"


def most_sums(operation: str) -> int:
    """The number of vectors of an operation that can have gradients."""
    if "norm" not in operation:
        return 2
    return 4 if "layer_norm" in operation else 3


@dataclass
class Launches:
    """The kernels of a call, ready to be started again, and their result tensors."""

    kernels: list[tuple[launch.Kernel, tuple[Any, ...]]]
    results: Result

    def run(self, only: str | None = None) -> None:
        """Start all kernels, or only those of one name."""
        for kernel, arguments in self.kernels:
            if only is None or kernel.name == only:
                kernel(*arguments)

    def runner(self, rule: str) -> Callable[[], None]:
        """The timed part for a rule: the whole pass, or only the rule's small kernel."""
        only = _FINISHING.get(rule)
        return lambda: self.run(only)

    def shapes(self) -> list[tuple[Any, ...]]:
        """The effects of a tile: for each kernel its name, grid, constants, warps and stages."""
        return [(kernel.name, arguments[0], *arguments[3:]) for kernel, arguments in self.kernels]

    def write_into(self, results: Result) -> None:
        """Use other tensors for the results, so that many tiles share one set of them."""
        others = {id(own): other for own, other in zip(self.results, results, strict=True) if own is not None}
        self.kernels = [
            (kernel, (grid, tuple(others.get(id(t), t) for t in tensors), *rest))
            for kernel, (grid, tensors, *rest) in self.kernels
        ]
        self.results = results

    def spilling(self) -> str | None:
        """The kernel that spills registers, after a run on a GPU; None if none does."""
        for kernel, (_, tensors, _, *rest) in self.kernels:
            compiled = kernel.compiled(tensors, *rest)
            if compiled is not None and compiled.n_spills:
                return f"{kernel.name} spills {compiled.n_spills} registers"
        return None


def record(call: Callable[[], Result], tiles: Mapping[str, Any]) -> tuple[Launches, list[Key]]:
    """The launches of a call with some rules' tiles replaced, and the rules that it uses. Nothing is launched."""
    kernels: list[tuple[launch.Kernel, tuple[Any, ...]]] = []
    with tuned.forcing(tiles) as asked, launch.recording(lambda kernel, *rest: kernels.append((kernel, rest))):
        results = call()
    return Launches(kernels, results), asked


def input_sets(workload: Workload, device: torch.device, cache_bytes: int) -> list[dict[str, Tensor]]:
    """Sets of inputs to take in turn, enough to exceed ``cache_bytes`` together; at least two."""
    first = workload.tensors(device, 0)
    size = sum(t.numel() * t.element_size() for t in first.values())
    count = min(MOST_SETS, max(2, -(-cache_bytes // size)))
    return [first, *(workload.tensors(device, seed) for seed in range(1, count))]
