"""Liger's kernels under a patched model; started by test_stacks_liger.py, with TRITON_INTERPRET=1 for the CPU.

Liger changes transformers for the whole process: hence one of its own for each order. Arguments: "before", "after" or
"class", which is when Liger comes, or for "class" that the model is made of Liger's own modules; the device.
"""

from __future__ import annotations

import sys

import model_zoo as zoo
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from patch_helpers import watching
from stack_helpers import hold_vectors, training
from triton.runtime import interpreter

import red_kernels as rk

DEVICE = sys.argv[2]


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


def mend() -> None:
    """What the interpreter lacks for Liger's kernels: scalars as tensors, and libdevice's rsqrt."""
    import liger_kernel.ops.rms_norm as norms

    convert = interpreter._implicit_cvt

    def with_numbers(argument):
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    interpreter._implicit_cvt = with_numbers
    norms.rsqrt = rsqrt


def few_rows(seed):
    """Triton's interpreter runs each row by itself."""
    return zoo.inputs("llama", seed=seed, batch=1, length=5)


def steps_of(model, optimizer):
    model.train()
    losses = []
    for step in range(3):
        batch = {key: value.to(DEVICE) for key, value in few_rows(step).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(order: str) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama, rms_norm

    base = zoo.tiny("llama").to(DEVICE)
    values = {
        site: {part: value.to(DEVICE) for part, value in parts.items()}
        for site, parts in zoo.vectors(zoo.sites("llama")).items()
    }
    truth = zoo.exact(base, values)
    exact = steps_of(truth.model, training(truth.vectors))  # without Liger
    model = base
    if order == "class":
        apply_liger_kernel_to_llama()
        model = zoo.tiny("llama").to(DEVICE)
        model.load_state_dict(base.state_dict())
    unfused = zoo.Unfused(model, values)
    if order != "class":
        apply_liger_kernel_to_llama(model=unfused.model)
    plain = steps_of(unfused.model, training(unfused.vectors))

    ran = []
    forward = rms_norm.LigerRMSNorm.forward
    rms_norm.LigerRMSNorm.forward = lambda self, hidden: (ran.append(self), forward(self, hidden))[1]
    watch = watching(pytest.MonkeyPatch())

    if order == "before":
        apply_liger_kernel_to_llama(model=model)
    report = rk.patch(model)
    zoo.fill(rk.edit_parameters(model), values)
    if order == "after":
        apply_liger_kernel_to_llama(model=model)
    ran.clear()  # the patch has tried them
    losses = steps_of(model, training(rk.edit_parameters(model)))
    zoo.assert_as_exact(
        "losses", torch.tensor(losses), torch.tensor(plain), torch.tensor(exact).double(), torch.float32
    )
    hold_vectors(rk.edit_parameters(model), unfused.vectors, truth.vectors)
    assert all(site.fused == "residual add" for site in report.sites), report
    assert len(ran) == 3 * (2 * zoo.LAYERS + 1), "Liger's norms ran, each of them once in each step"
    assert not watch.left, "a note for a norm that is Liger's now"
    rk.unpatch(model)
    with torch.no_grad():
        model(**{key: value.to(DEVICE) for key, value in few_rows(0).items()})


if __name__ == "__main__":
    if DEVICE == "cpu":
        mend()
    main(sys.argv[1])
