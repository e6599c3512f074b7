"""The first seconds on a GPU: its properties, one call of each backend, and the bandwidth of copies.

    python -m benchmarks.gpu.first [--device cuda]

Exits with 1 if torch sees no GPU, or if neither backend agrees with the reference.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time

import torch

import red_kernels as rk
from red_kernels.support.clocks import graph_clock, interleaved, wall_clock

PACKAGES = ("triton", "transformers", "peft", "liger-kernel", "quack-kernels", "pytest", "pytest-xdist", "hypothesis")
TOLERANCE = 0.02  # of the norm of bf16 results: a rough check before the tests


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.first")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device: str = parser.parse_args(arguments).device
    print(sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
    for name in PACKAGES:
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "is missing")
    if device == "cuda":
        if not torch.cuda.is_available():
            print("torch sees no GPU here")
            return 1
        print(torch.cuda.get_device_properties(0))
    wrong = [name for name in (("cuda", "triton") if device == "cuda" else ("cpu",)) if not right(name, device)]
    count = 1 << (29 if device == "cuda" else 16)
    for name, rate in copies(count, device).items():
        print(f"copy, {name}: {rate / 1e9:.0f} GB/s")
    return int(len(wrong) == (2 if device == "cuda" else 1))


def right(backend: str, device: str) -> bool:
    """One call of a backend, forward and backward, compared with the reference; printed."""
    begun = time.perf_counter()
    try:
        found, expected = (_gradients(one, device) for one in (backend, "reference"))
    except Exception as error:
        print(f"{backend}: {type(error).__name__}: {error}")
        return False
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True))
    said = "right" if worst < TOLERANCE else "WRONG"
    print(f"{backend}: {said}, {worst:.1e} from the reference, {time.perf_counter() - begun:.1f} s including loading")
    return worst < TOLERANCE


def _gradients(backend: str, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, residual, dy = (torch.randn(64, 4096, generator=generator).to(device, torch.bfloat16) for _ in range(3))
    scale, bias, weight = (torch.randn(4096, generator=generator).to(device) for _ in range(3))
    asking = [t.requires_grad_() for t in (x, residual, scale, bias)]
    weight = weight.to(x.dtype)
    with rk.backend(backend):
        y, z = rk.edit_add_rms_norm(x, residual, scale, bias, weight)
        assert z is not None
        return [y.detach(), z.detach(), *torch.autograd.grad([y, z], asking, [dy, dy])]


def copies(count: int, device: str) -> dict[str, float]:
    """Bytes per second, read and written, of a copy of this size, by torch's copy and by a kernel."""
    source, target = (torch.zeros(count // 2, dtype=torch.bfloat16, device=device) for _ in range(2))
    ways = {"memcpy": lambda: target.copy_(source), "by a kernel": lambda: torch.neg(source, out=target)}
    clock = graph_clock if device == "cuda" else wall_clock
    for call in ways.values():
        call()
    seconds = interleaved({name: clock([call]) for name, call in ways.items()}, 5)
    return {name: 2 * count / min(values) for name, values in seconds.items()}


if __name__ == "__main__":
    sys.exit(main())
