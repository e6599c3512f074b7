"""The dtype of a base model: `auto` is bf16 if the processor or GPU multiplies it natively, else fp32.

torch is queried first. If it does not report, a small matrix product is timed in both dtypes, forward and backward. The
same product gives the factor in the warning about an explicit choice.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["ASKED", "AUTO", "DTYPES", "BaseDtype", "choose_dtype", "resolve_dtype", "slowdown", "told"]

AUTO = "auto"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # fp16 would need loss scaling
ASKED = (AUTO, *DTYPES)
CRAWLS = 2.0  # times fp32's time; measured: native bf16 0.5 to 1.7, emulated with AVX-512 2.5 to 14, AVX2 26 to 56

_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SIZES = {"cpu": (128, 256, 256), "cuda": (1024, 1024, 1024)}  # rows, inputs, outputs
_ROUNDS = 9
_SECONDS = 0.25  # no round starts after this time
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # oneDNN's variables that limit its instructions


@dataclass(frozen=True)
class BaseDtype:
    """A dtype for base models, and the reason for it.

    Attributes:
        name: `"fp32"` or `"bf16"`.
        asked: `"auto"`, or the requested dtype.
        reason: the reason, in words.
        slower: a product's time over its time in fp32, if it was measured.
        warning: that the dtype is slow here, with that factor and a remedy; None if it is not.
    """

    name: str
    asked: str
    reason: str
    slower: float | None = None
    warning: str | None = None

    def json(self) -> dict[str, Any]:
        """The entry in files of results: all attributes by name."""
        return asdict(self)


def told(device: torch.device) -> tuple[bool | None, str]:
    """Whether torch reports that a device multiplies bf16 natively, and the reason in words; None if it does not
    report.

    Args:
        device: of type `"cpu"` or `"cuda"`.

    Raises:
        ValueError: another type of device.
    """
    _size(device)
    return _told_of_gpu(device) if device.type == "cuda" else _told_of_processor()


def _told_of_gpu(device: torch.device) -> tuple[bool | None, str]:
    name = torch.cuda.get_device_name(device)

    def ask() -> object:
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)

    native = _asked(ask)
    if native is None:
        return None, f"torch does not report whether {name} multiplies bf16 natively"
    return native, f"{name} {'multiplies' if native else 'does not multiply'} bf16 natively"


def _told_of_processor() -> tuple[bool | None, str]:
    mkldnn: Any = torch.backends.mkldnn
    if not mkldnn.is_available() or not getattr(mkldnn, "enabled", True):
        return None, "this torch has no oneDNN and does not report native dtypes"
    takes = _asked(lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if takes is None:
        return None, "this torch does not report whether oneDNN multiplies bf16"
    limit = next((f"{name}={os.environ[name]}" for name in _LIMITS if os.environ.get(name)), None)
    if not takes:  # this answer respects the limit; those below are of the processor alone
        where = f"within {limit}" if limit else f"on this processor ({torch.backends.cpu.get_cpu_capability()})"
        return False, f"torch's oneDNN does not multiply bf16 {where}"
    if limit is not None:
        return None, f"torch does not report native dtypes within {limit}"
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):  # oneDNN accepts bf16 there only with native instructions
        return True, "this processor multiplies bf16 natively"
    if machine not in ("x86_64", "amd64"):
        return None, f"torch does not report whether {machine or 'this processor'} multiplies bf16 natively"
    cpu: Any = torch.cpu
    native = _asked(lambda: cpu._is_avx512_bf16_supported())
    if native is None:
        native = _asked(lambda: cpu.get_capabilities()["avx512_bf16"])
    if native is None:
        return None, "this torch does not report whether the processor has AVX512_BF16"
    if native:
        return True, "this processor multiplies bf16 natively (AVX512_BF16)"
    return False, "this processor has no AVX512_BF16, so oneDNN emulates bf16"


def _asked(question: Callable[[], object]) -> bool | None:
    """The answer; None if this torch has no such function, or if it fails."""
    try:
        answer = question()
    except Exception:  # private functions of torch may be renamed, change arguments, or fail
        return None
    return answer if isinstance(answer, bool) else None


def choose_dtype(device: torch.device) -> BaseDtype:
    """The dtype of `auto` on a device.

    Raises:
        ValueError: its type is neither `"cpu"` nor `"cuda"`.
    """
    native, reason = told(device)
    if native is None:
        factor = slowdown("bf16", device)
        native = factor <= 1
        reason += f"; measured, a product in bf16 takes {factor:.2g} times as long as in fp32"
    return BaseDtype("bf16" if native else "fp32", AUTO, reason)


def resolve_dtype(asked: str, device: torch.device, kept: str | None = None) -> BaseDtype:
    """The dtype to use.

    Args:
        asked: `"auto"`, `"fp32"` or `"bf16"`.
        device: where the model will run.
        kept: the dtype at the start of a resumed run; `auto` keeps it, on any machine.

    Raises:
        ValueError: an unknown dtype, or a device whose type is neither `"cpu"` nor `"cuda"`.
    """
    for name, value, known in (("dtype", asked, ASKED), ("kept", kept, (None, *DTYPES))):
        if value not in known:
            expected = ", ".join(repr(one) for one in known if one is not None)
            raise ValueError(f"{name}: got {value!r}, expected one of {expected}")
    if asked == AUTO and kept is None:
        return choose_dtype(device)
    if asked == AUTO:
        here = choose_dtype(device)
        name, reason = str(kept), "kept by --resume: the run started with it"
        remedy = "start over by --overwrite, or resume on the machine of the first start"
        if here.name != kept:
            reason += f"; a new run would take {here.name} here: {here.reason}"
    else:
        name, reason = asked, "asked for"
        remedy = "--dtype fp32, or --dtype auto, which selects a native dtype"
    if name not in _HALVES:  # fp32 is the reference of the others
        return BaseDtype(name, asked, reason)
    slower = slowdown(name, device)
    warning = None
    if not slower < CRAWLS:
        rows, inputs, outputs = _size(device)
        warning = (
            f"{name} is slow here: a matrix product of {rows} x {inputs} x {outputs}, forward and backward, takes "
            f"{slower:.2g} times as long as in fp32; remedy: {remedy}"
        )
    return BaseDtype(name, asked, reason, slower, warning)


def slowdown(name: str, device: torch.device) -> float:
    """The time of a matrix product in a half precision over that in fp32, forward and backward.

    Both are timed in turn for at most a quarter of a second, after an untimed first call of each. The result is the
    median over the rounds of the ratio within a round. On a CPU one thread is used: on a busy machine two threads wait
    for each other longer than the product takes.

    Args:
        name: `"bf16"` or `"fp16"`.
        device: of type `"cpu"` or `"cuda"`.

    Raises:
        ValueError: another dtype, or another type of device.
    """
    if name not in _HALVES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(map(repr, _HALVES))}")
    rows, inputs, outputs = _size(device)
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers are unchanged

    def draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    tensors = {
        dtype: (draw(dtype, rows, inputs).requires_grad_(), draw(dtype, outputs, inputs), draw(dtype, rows, outputs))
        for dtype in (torch.float32, _HALVES[name])
    }
    threads = torch.get_num_threads()
    ratios: list[float] = []
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        begun = time.perf_counter()
        for own in tensors.values():
            _seconds(own)
        while not ratios or (len(ratios) < _ROUNDS and time.perf_counter() - begun < _SECONDS):
            full, half = (_seconds(own) for own in tensors.values())
            ratios.append(half / full if full > 0 else math.inf)
    finally:
        if device.type == "cpu":
            torch.set_num_threads(threads)
    return statistics.median(ratios)


def _size(device: torch.device) -> tuple[int, int, int]:
    if device.type not in _SIZES:
        raise ValueError(f"device: got {str(device)!r}, expected one of type 'cpu' or 'cuda'")
    return _SIZES[device.type]


def _seconds(tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> float:
    if tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)
    start = time.perf_counter()
    _product(*tensors)
    if tensors[0].is_cuda:
        torch.cuda.synchronize(tensors[0].device)
    return time.perf_counter() - start


def _product(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor) -> None:
    """The product of a frozen linear layer, and the gradient of its input."""
    with torch.enable_grad():
        torch.autograd.grad(torch.nn.functional.linear(x, weight), x, upstream)
