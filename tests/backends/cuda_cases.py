"""What tests of the CUDA kernels share: devices for the emulator, widths for all layouts, calls and their errors.

On a GPU there is the one device that it is, and tests that name others are not run.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mix_cases
import torch
from op_cases import (
    ARGUMENTS,
    CUDA,
    EMULATED,
    Results,
    Tensors,
    assert_as_good_as,
    drawn_factor,
    eager,
    exact,
    fused,
    outputs_of,
    run,
)
from torch import Tensor


class Device(NamedTuple):
    """What the rules ask of a GPU: 10 * major + minor of its compute capability, multiprocessors, and the bytes of
    shared memory that a block may have."""

    capability: int
    multiprocessors: int
    shared: int


A100, H200 = Device(80, 108, 163 << 10), Device(90, 132, 227 << 10)
# With one multiprocessor few workers take many rows each, and a block has all the groups of its layout.
DEVICES: dict[str, Device | None] = (
    {"sm_80": A100._replace(multiprocessors=1), "sm_90": H200._replace(multiprocessors=1)}
    if EMULATED
    else {"this GPU": None}
)
CLUSTERS = DEVICES.get("sm_90")  # the device with clusters

# Widths that meet many numbers of vectors and warps, groups, and clusters of 2, 4 and 8; the halves have twice as many
# elements in a vector. On a device without clusters the last are all alike.
WIDTHS = (
    36, 132, 256, 260, 388, 516, 644, 772, 900, 1028, 1156, 1284, 1540, 1924, 2052, 2692, 3076, 4096, 4612, 5380, 6148,
    8192, 9220, 12292, 16384, 20484, 28676, 36868, 45060, 57348, 65536,
)  # fmt: skip
MOST_WITHOUT_CLUSTERS = 9220
ODD_WIDTHS = (3, 33, 257, 769, 4099)  # of the wide kernels


def widths(dtype: torch.dtype, device: str) -> tuple[int, ...]:
    """WIDTHS for activations of a dtype on one of DEVICES, up to 65,536."""
    vectors = 1 if dtype == torch.float32 else 2
    most = MOST_WITHOUT_CLUSTERS * vectors if device == "sm_80" else 65536
    return tuple(vectors * d for d in WIDTHS if vectors * d <= most)


def rows_of(d: int) -> int:
    """Enough for a worker to take several. Not more: its sums are lines of fp32, which lose more than eager's."""
    return 67 if d <= 512 else 15


@contextmanager
def emulating(device: Device | None) -> Iterator[None]:
    """The emulator as another device, an H200 again behind it; None: on whatever there is."""
    if device is None:
        yield
        return
    emulate = ctypes.CDLL(os.environ["RED_KERNELS_CUDA_EMULATED"]).red_kernels_cuda_emulate
    emulate(*device)
    try:
        yield
    finally:
        emulate(*H200)


def run_cuda(
    operation: str,
    tensors: Tensors,
    grads: tuple[Tensor, ...],
    asking: tuple[str, ...] | None = None,
    **options: Any,
) -> Results:
    """Results of the CUDA kernels, and the gradients of what asks for them (without: of all), as ``op_cases.run``."""
    given = {
        name: t.detach().clone().requires_grad_() if t is not None and (asking is None or name in asking) else t
        for name, t in tensors.items()
    }
    with CUDA[0].in_use():
        results = outputs_of(fused(operation, given, **options))
        torch.autograd.backward(results, grads[: len(results)])
    found = {name: t.detach() for name, t in zip(("y", "z"), results, strict=False)}
    return found | {f"d {name}": t.grad for name, t in given.items() if t is not None and t.grad is not None}


def held(
    operation: str,
    tensors: Tensors,
    grads: tuple[Tensor, ...],
    asking: tuple[str, ...] | None = None,
    p: float = 0.0,
    **options: Any,
) -> Results:
    """What the kernels find, with an error of at most eager's and a step. ``p`` is that of dropout."""
    drawn: dict[str, Any] = {}
    mask: dict[str, Any] = {}
    if p:
        drawn = {"dropout_p": p, "training": True}
        with CUDA[0].in_use():
            mask = {"factor": drawn_factor(5, p, tensors["x"].shape)}
    found = run_cuda(operation, tensors, grads, asking, **drawn, **options)
    wanted = {name for name in ARGUMENTS[operation] if tensors[name] is not None and (asking is None or name in asking)}
    assert {name[2:] for name in found if name.startswith("d ")} == wanted
    peer = run(eager, operation, tensors, grads, **mask, **options)
    expected = exact(operation, tensors, grads, **mask, **options)
    assert_as_good_as(found, *({name: of[name] for name in found} for of in (peer, expected)))
    return found


def held_mix(operation: str, tensors: Tensors, grads: tuple[Tensor, ...], p: float = 0.0, **options: Any) -> Results:
    """:func:`held` for the operations of ``mix_cases``, with all gradients."""
    mask: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    with CUDA[0].in_use():
        if p:
            mask, drawn = {"factor": drawn_factor(5, p, tensors["x"].shape)}, {"dropout_p": p, "training": True}
            torch.manual_seed(5)
        found = mix_cases.run(mix_cases.fused, operation, tensors, grads, **drawn, **options)
    peer = mix_cases.run(mix_cases.eager, operation, tensors, grads, **mask, **options)
    assert_as_good_as(found, peer, mix_cases.exact(operation, tensors, grads, **mask, **options))
    return found
