"""What a GPU has to confirm: the operations on CUDA tensors. Run by `make test-gpu`; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import red_kernels as rk

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [768, 4096])
def test_fused_norm_on_the_gpu_equals_the_cpu(dtype: torch.dtype, width: int) -> None:
    """Same numbers as on the CPU in fp64, to a rounding of the dtype, values and gradients."""
    torch.manual_seed(0)
    wide = [torch.randn(199, width, dtype=torch.float64).to(dtype).double() for _ in range(4)]
    vectors = [torch.randn(width, dtype=torch.float64).float().double() for _ in range(3)]
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        x, residual = (t.to(device, kind).requires_grad_() for t in wide[:2])
        scale, bias, weight = (
            v.to(device, torch.float64 if kind == torch.float64 else torch.float32).requires_grad_() for v in vectors
        )
        y, z = rk.edit_add_rms_norm(x, residual, scale, bias, weight)
        torch.autograd.backward((y, z), [t.to(device, kind) for t in wide[2:]])
        results.append([y, z, x.grad, residual.grad, scale.grad, bias.grad, weight.grad])
    for exact, found in zip(*results, strict=True):
        error = (found.cpu().double() - exact).norm() / exact.norm()
        assert error <= 2 * torch.finfo(dtype).eps


def test_dropout_mask_on_the_gpu_is_that_of_the_cpu() -> None:
    """The words depend on the seed and the place only, not on the device."""
    seed = torch.tensor([0x0123456789ABCDEF])
    expected = rk.reference.philox_words(seed, 33, 130)
    assert torch.equal(rk.reference.philox_words(seed.cuda(), 33, 130).cpu(), expected)


def test_operations_run_on_the_device_of_the_tensor() -> None:
    """Also where it is not the current device."""
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    x = torch.ones(3, 8, device=last)
    assert rk.edit(x, torch.full((8,), 2.0, device=last)).device == last
