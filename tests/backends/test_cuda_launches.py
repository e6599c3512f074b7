"""Launches of the CUDA kernels: errors of them, and calls between a forward and its backward."""

from __future__ import annotations

import pytest
import torch
from op_cases import CUDA, EMULATED, arguments, leaves, same_bits, upstream

import red_kernels as rk
from red_kernels.backends import cuda

if not CUDA:
    pytest.skip(
        f"no CUDA kernels here, neither on a GPU nor in the emulator: {cuda.load_error()}", allow_module_level=True
    )

from cuda_cases import A100, CLUSTERS, emulating, run_cuda

pytestmark = pytest.mark.implementations
emulated_only = pytest.mark.skipif(not EMULATED, reason="needs the emulator: RED_KERNELS_CUDA_EMULATED")

# Errors of launches: a device with too little shared memory for what each kernel asks for.
ERRORS = {
    "edit_forward": ("edit", torch.float16, (5, 72), "block 256 x 1", "grid 1 x 1 x 1", "0 bytes", -1),
    "slab_backward": ("edit", torch.bfloat16, (5, 72), "block 256 x 1", "grid 1 x 1 x 1", "8192 bytes", 8191),
    "norm_forward": ("rms_norm_edit", torch.float32, (5, 2304), "block 96 x 1", "grid 5 x 1 x 1", "2064 bytes", 2063),
    "wide_forward": ("rms_norm_edit", torch.float32, (5, 70), "block 32 x 1", "grid 5 x 1 x 1", "2064 bytes", 2063),
    "slab_backward with a norm": (
        "rms_norm_edit", torch.bfloat16, (5, 70), "block 256 x 1", "grid 1 x 1 x 1", "8192 bytes", 8191
    ),
}  # fmt: skip


@emulated_only
@pytest.mark.parametrize("kernel", ERRORS)
def test_errors_of_launches(kernel: str) -> None:
    """They name the kernel, dtype, rows x d, device and all of the launch; and the next call works."""
    operation, dtype, shape, block, grid, shared, there = ERRORS[kernel]
    tensors, grads = arguments(operation, shape, dtype), upstream(shape, dtype)
    expected = run_cuda(operation, tensors, grads)
    with (
        emulating(A100._replace(multiprocessors=1, shared=there)),
        pytest.raises(RuntimeError, match="red_kernels: ") as raised,
    ):
        run_cuda(operation, tensors, grads)
    name = str(dtype).removeprefix("torch.")
    said = (
        f"red_kernels: {kernel} of {name} {shape[0]} x {shape[1]} failed on device 0 (compute capability 8.0), {grid}, "
        f"{block}, cluster 1, {shared} of shared memory: the device cannot run it"
    )
    assert said in str(raised.value)
    assert same_bits(run_cuda(operation, tensors, grads), expected)


@pytest.mark.skipif(CLUSTERS is None, reason="needs the emulator, for a device with clusters")
def test_another_call_between_forward_and_backward() -> None:
    """Nothing of a call is kept in the library: each backward is that of its own forward."""
    first, second = (leaves(arguments("edit_add_layer_norm", (9, d), seed=d)) for d in (72, 8448))
    with emulating(CLUSTERS), CUDA[0].in_use():
        alone = [rk.edit_add_layer_norm(*given.values()) for given in (first, second)]
        for given, (y, z) in zip((second, first), reversed(alone), strict=True):
            (y.sum() + z.sum()).backward()
            asking = {name: t.detach() for name, t in given.items()}
            found = run_cuda("edit_add_layer_norm", asking, (torch.ones_like(y), torch.ones_like(z)))
            assert all(torch.equal(given[name].grad, found[f"d {name}"]) for name in given)
