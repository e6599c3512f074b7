"""A backward by another backend than its forward: what is saved is the same for all of them."""

from __future__ import annotations

import pytest
import torch

import red_kernels as rk
from red_kernels import backends
from red_kernels.ops import passes


@pytest.mark.parametrize("forward", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("backward", ["reference", "cpu", "cuda"])
@pytest.mark.parametrize("need_z", [True, False])
def test_backends_save_the_same(forward: str, backward: str, need_z: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one's forward saves, another's backward takes."""
    if any(rk.available_backends()[name] is not None for name in (forward, backward)):
        pytest.skip(f"{forward} or {backward} is missing here")
    torch.manual_seed(3)
    given = [torch.randn(9, 96), torch.randn(9, 96), torch.randn(96), torch.randn(96), torch.rand(96), torch.randn(96)]
    results = []
    for other in (forward, backward):
        leaves = [t.clone().requires_grad_() for t in given]
        with rk.backend(forward), monkeypatch.context() as patch:
            patch.setattr(passes, "choose_backward", lambda x, operation, of, other=other: backends.by_name(other))
            y, z = rk.functional.EditAddLayerNormFunction.apply(*leaves, None, None, 0.0, 1e-5, need_z)
            total = y.square().sum() + (z.square().sum() if need_z else 0.0)
            results.append(torch.autograd.grad(total, leaves))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
