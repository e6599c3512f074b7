"""Inputs of the cases: the hidden sizes and rows of real models, and tensors larger than the last-level cache."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .operations import Arguments, Operation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_CACHE_BYTES = 64 << 20  # for a CPU that reports none, or less


def cache_bytes(device: torch.device) -> int:
    """More than the last-level cache: twice that of a CPU, four times that of a GPU."""
    if device.type == "cpu":
        return max(LEAST_CACHE_BYTES, 2 * _last_cache())
    return 4 * int(torch.cuda.get_device_properties(device).L2_cache_size)


def _last_cache() -> int:
    """Bytes of this CPU's last-level cache; 0 if the system does not report it."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size.rstrip("KM")) << {"K": 10, "M": 20}.get(size[-1:], 0)
    except (OSError, ValueError):
        return 0


class Inputs:
    """Sets of activations and gradients, and their shared vectors.

    Args:
        operation: the operation of the inputs.
        rows, width: of the activations.
        dtype: of activations and norm weights; edits are fp32.
        fresh: as many sets as exceed the cache, at least two; else one.
    """

    def __init__(
        self, operation: Operation, rows: int, width: int, dtype: torch.dtype, fresh: bool, device: torch.device
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        self.operation = operation
        bytes_of_set = (2 + operation.outputs) * rows * width * dtype.itemsize
        count = max(2, -(-cache_bytes(device) // bytes_of_set)) if fresh else 1
        scale = (1 + 0.1 * draw(width)).requires_grad_()
        bias = (0.1 * draw(width)).requires_grad_()
        weight, norm_bias = (1 + 0.1 * draw(width)).to(dtype), (0.1 * draw(width)).to(dtype)
        self.sets: list[tuple[Arguments, list[Tensor]]] = []
        for _ in range(count):
            x, residual = (draw(rows, width).to(dtype).requires_grad_() for _ in range(2))
            upstream = [draw(rows, width).to(dtype) for _ in range(operation.outputs)]
            self.sets.append((Arguments(x, residual, scale, bias, weight, norm_bias), upstream))

    def __getitem__(self, number: int) -> tuple[Arguments, list[Tensor]]:
        """The arguments of a round, and the gradients of the results."""
        return self.sets[number % len(self.sets)]


class Copies:
    """The floor: plain copies of as many bytes as an operation moves, a read and a write for each activation copied,
    from the same sets: forward of the inputs first, backward of the gradients first.

    On a GPU a kernel copies (with negated values): a graph's own copies may be implemented differently. The targets
    rotate like the sources, since a target that is written repeatedly may never leave the cache.
    """

    def __init__(self, inputs: Inputs) -> None:
        residual = inputs.operation.residual
        self._sources = [
            [arguments.x.detach(), *([arguments.residual.detach()] if residual else []), *upstream]
            for arguments, upstream in inputs.sets
        ]
        most = -(-(inputs.operation.forward + inputs.operation.backward) // 2)
        one = self._sources[0][0]
        self._kernel = one.is_cuda
        # On a CPU one set of targets, as in all results so far.
        count = len(self._sources) if self._kernel else 1
        self._targets = [[torch.empty_like(one) for _ in range(most)] for _ in range(count)]

    def copy(self, activations: int, number: int, backward: bool = False) -> None:
        """Read and write this number of `activations` in all."""
        sources = self._sources[number % len(self._sources)]
        targets = self._targets[number % len(self._targets)]
        for place, target in enumerate(targets[: -(-activations // 2)]):
            source = sources[(-1 - place if backward else place) % len(sources)]
            if place == activations // 2:  # an odd one at the end: half of it is read, half written
                half = len(source) // 2
                source, target = source[:half], target[:half]
            if self._kernel:
                torch.neg(source, out=target)
            else:
                target.copy_(source)
