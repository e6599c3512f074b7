"""Launching a kernel with little host work.

Triton's own launch examines all arguments at each call, more than 20. Here a kernel is found by its constants and the
dtypes of its tensors, and started with plain addresses. Triton's further specialisations are fixed: numbers are never
specialised, and every address is a multiple of 16 bytes; otherwise Triton's own launch is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

from .rules import Architecture

INTERPRETED = bool(triton.knobs.runtime.interpret)

Grid = tuple[int, int, int]
# Called with the arguments of a kernel's call, the kernel first: see Kernel.__call__.
Recorder = Callable[
    ["Kernel", Grid, tuple[Tensor | None, ...], tuple[Any, ...], tuple[Any, ...], int, int | None], None
]

_recorder: Recorder | None = None


class Kernel:
    """A Triton kernel whose parameters are tensors, then numbers, then constants.

    A call with a grid, tensors (None if absent), numbers, constants and the number of warps runs it on the device and
    the current stream of the first tensor. ``stages`` is the depth of its pipelined loop, if it has one. All tensors
    must be contiguous and on one device.

    ``registers`` for each thread are allowed on NVIDIA, if given. By default the assembler spills some if one more
    program then fits on a multiprocessor.
    """

    def __init__(self, function: Any, registers: int | None = None) -> None:
        self.function = function
        self.registers = registers
        self._compiled: dict[tuple[Any, ...], Any] = {}

    @property
    def name(self) -> str:
        """The name of the kernel's function."""
        return self.function.fn.__name__

    def __call__(
        self,
        grid: Grid,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[Any, ...],
        constants: tuple[Any, ...],
        warps: int,
        stages: int | None = None,
    ) -> None:
        if _recorder is not None:
            _recorder(self, grid, tensors, numbers, constants, warps, stages)
            return
        first = tensors[0]
        assert first is not None
        device = first.get_device()
        if device != _current_device():
            with torch.cuda.device(device):
                self(grid, tensors, numbers, constants, warps, stages)
            return
        addresses = [None if t is None else t.data_ptr() for t in tensors]
        types = [None if t is None else t.dtype for t in tensors]
        together = 0
        for address in addresses:
            if address:
                together |= address
        # Triton compiles for AMD depending on whether every offset fits into 32 bits; only kernels for those that do
        # are kept.
        if _amd and any(t is not None and t.untyped_storage().nbytes() >= 2**31 for t in tensors):
            together |= 1
        key = (device, constants, warps, stages, *types)
        compiled = None if together & 15 else self._compiled.get(key)
        if compiled is None or not _direct or _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls:
            compiled = self.function[grid](*tensors, *numbers, *constants, **self.options(warps, stages, _amd))
            if not together & 15 and compiled is not None:
                self._compiled[key] = compiled
            return
        compiled.run(
            *grid, _current_stream(device), compiled.function, compiled.packed_metadata, None, None, None,
            *addresses, *numbers, *constants,
        )  # fmt: skip

    def options(self, warps: int, stages: int | None, amd: bool) -> dict[str, Any]:
        """The arguments of Triton's compiler for the kernel."""
        # Multiply-adds are contracted, explicitly because Triton 3.9 warns otherwise.
        found: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
        if stages is not None:
            found["num_stages"] = stages
        if self.registers is not None and not amd:
            found["maxnreg"] = min(self.registers, 65536 // (32 * warps))
        return found

    def compiled(
        self, tensors: tuple[Tensor | None, ...], constants: tuple[Any, ...], warps: int, stages: int | None = None
    ) -> Any:
        """The kernel of calls with tensors of this alignment and these constants, to read its spills; None before the
        first call, and in the interpreter."""
        first = tensors[0]
        assert first is not None
        types = [None if t is None else t.dtype for t in tensors]
        return self._compiled.get((first.get_device(), constants, warps, stages, *types))


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Pass every launch in a ``with`` block to ``recorder`` instead of running it: to compile it for other devices."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def architecture(x: Tensor) -> Architecture:
    """The facts about the device of ``x`` for the launch rules."""
    device = x.get_device()
    found = _architectures.get(device)
    if found is None:
        found = _architectures[device] = _architecture(device)
    return found


def unusable(device: int) -> str | None:
    """Why Triton cannot run on a GPU, or None. Checked once for each GPU; not while torch.compile traces."""
    if device not in _unusable and not torch.compiler.is_compiling():
        _unusable[device] = _why_unusable(device)
    return _unusable.get(device)


@contextmanager
def pretending(pretended: Architecture) -> Iterator[None]:
    """Use another architecture's rules for CPU tensors in a ``with`` block, to compile for it or to test them."""
    before = _architectures.get(-1)
    _architectures[-1] = pretended
    try:
        yield
    finally:
        _architectures.pop(-1)
        if before is not None:
            _architectures[-1] = before


def _why_unusable(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if not _amd and capability < _LEAST_CAPABILITY:
        return f"its compute capability is {capability}, and Triton needs {_LEAST_CAPABILITY}"
    try:
        triton.runtime.driver.active.get_current_target()  # it builds its driver with a C compiler, the first time
    except Exception as error:
        return f"Triton does not start there ({type(error).__name__}: {error}); remedy: install a C compiler"
    return None


def _architecture(device: int) -> Architecture:
    if device < 0:  # the interpreter: few programs, so each has several tiles
        return Architecture("interpreter", 32, 2)
    properties = torch.cuda.get_device_properties(device)
    amd = properties.gcnArchName.split(":")[0] if torch.version.hip else None
    name = amd or f"sm_{properties.major}{properties.minor}"
    return Architecture(name, properties.warp_size, properties.multi_processor_count)


def _no_device() -> int:
    return -1


def _no_stream(device: int) -> int:
    return 0


_runtime = triton.knobs.runtime
# `CompiledKernel.run` takes the same arguments in all of these; with a later Triton its own launch is used.
_direct = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 10)
_architectures: dict[int, Architecture] = {}
_unusable: dict[int, str | None] = {}
_LEAST_CAPABILITY = (7, 5)
_amd = torch.version.hip is not None
_on_gpu = (torch.version.cuda or torch.version.hip) is not None and not INTERPRETED
_current_device: Callable[[], int] = torch._C._cuda_getDevice if _on_gpu else _no_device
_current_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream if _on_gpu else _no_stream
