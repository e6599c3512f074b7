"""A few small calls that reach every CUDA kernel, forward and backward, for compute-sanitizer (see the Makefile).

Each is also held to the composition in fp64. Which kernels a call takes is in its name.
"""

from __future__ import annotations

from typing import Any

import mix_cases
import pytest
import torch
from op_cases import CUDA, arguments, fused, outputs_of, upstream
from torch import Tensor

from red_kernels.backends import cuda

if not CUDA:
    pytest.skip(
        f"no CUDA kernels here, neither on a GPU nor in the emulator: {cuda.load_error()}", allow_module_level=True
    )

from cuda_cases import held, held_mix

pytestmark = pytest.mark.implementations

EDIT_VECTORS = ("x", "residual", "scale", "bias")
# Operation, dtype, rows and width; options. `edits`: how many, dealt to rows at random.
CALLS: dict[str, tuple[str, torch.dtype, tuple[int, int], dict[str, Any]]] = {
    "edit_forward, slab_backward, add_lines": ("edit", torch.bfloat16, (150, 72), {}),
    "the same of odd rows, with dropout": ("edit_add", torch.float32, (150, 33), {"p": 0.25}),
    "slab_backward sorted, add_edits": ("edit_add", torch.float16, (150, 70), {"edits": 5}),
    "norm_backward plain": ("edit_add_layer_norm", torch.float32, (40, 256), {"asking": EDIT_VECTORS}),
    "plain, several warps": ("edit_add_rms_norm", torch.bfloat16, (20, 4096), {"asking": EDIT_VECTORS}),
    "with dropout": ("edit_add_rms_norm", torch.float32, (40, 516), {"asking": EDIT_VECTORS, "p": 0.5}),
    "sorted": ("edit_add_layer_norm", torch.bfloat16, (150, 520), {"asking": EDIT_VECTORS, "edits": 7}),
    "z made again": ("edit_add_layer_norm", torch.float16, (40, 2304), {"asking": EDIT_VECTORS, "need_z": False}),
    "all of it": ("edit_add_rms_norm", torch.float32, (70, 72), {"need_z": False, "p": 0.25, "edits": 3}),
    "full": ("edit_add_layer_norm", torch.bfloat16, (300, 264), {}),
    "full, several warps": ("edit_add_layer_norm", torch.float32, (20, 2052), {}),
    "an edit behind the norm": ("rms_norm_edit", torch.float16, (40, 768), {}),
    "an edit behind the norm, sorted": ("layer_norm_edit", torch.float32, (150, 132), {"edits": 5}),
    "wide": ("edit_add_layer_norm", torch.bfloat16, (20, 769), {}),
    "wide, sorted, z made again": ("edit_add_rms_norm", torch.float32, (150, 33), {"need_z": False, "edits": 4}),
    "wide, an edit behind the norm": ("layer_norm_edit", torch.float16, (20, 257), {}),
    "clusters of 2": ("edit_add_layer_norm", torch.float32, (5, 9220), {"asking": EDIT_VECTORS}),
    "clusters of 4, full": ("edit_add_rms_norm", torch.bfloat16, (5, 14344), {}),
    "clusters of 8": ("edit_add_rms_norm", torch.float32, (3, 36868), {"asking": EDIT_VECTORS, "need_z": False}),
    "clusters, an edit behind the norm": ("layer_norm_edit", torch.bfloat16, (5, 16392), {}),
}

# The same with the blocks of columns of a mix.
MIXES: dict[str, tuple[str, torch.dtype, tuple[int, int], int, dict[str, Any]]] = {
    "a rotation": ("mix_add_rms_norm", torch.bfloat16, (40, 768), 0, {}),
    "a rotation, several warps, dropout": ("mix_add_layer_norm", torch.float32, (20, 2112), 0, {"p": 0.25}),
    "reflections of a warp's parts": ("mix_add", torch.float16, (150, 768), 32, {"edits": 5}),
    "reflections of several warps": ("mix_add_layer_norm", torch.bfloat16, (20, 4096), 2, {}),
    "wide reflections": ("mix_add_rms_norm", torch.float32, (20, 1300), 2, {"p": 0.25}),
    "wide reflections, sorted": ("mix_add_layer_norm", torch.bfloat16, (150, 33), 3, {"edits": 5}),
    "a wide rotation": ("mix_add_rms_norm", torch.float16, (3, 16448), 0, {}),
}


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("which", MIXES)
def test_every_kernel_of_mixes(which: str) -> None:
    operation, dtype, shape, blocks, given = MIXES[which]
    options = dict(given)
    edits = options.pop("edits", None)
    if edits is not None:
        options["edit_ids"] = torch.randint(0, edits, shape[:1])
    tensors = mix_cases.arguments(operation, shape, dtype, blocks=blocks, edits=edits)
    held_mix(operation, tensors, upstream(shape, dtype), blocks=blocks, **options)


@pytest.mark.usefixtures("empty_is_nan")
@pytest.mark.parametrize("which", CALLS)
def test_every_kernel(which: str) -> None:
    operation, dtype, shape, given = CALLS[which]
    options = dict(given)
    edits = options.pop("edits", None)
    if edits is not None:
        options["edit_ids"] = torch.randint(0, edits, shape[:1])
    grads = upstream(shape, dtype, number=1 if "need_z" in options else 2)
    held(operation, arguments(operation, shape, dtype, edits=edits), grads, **options)


@pytest.mark.parametrize("d", [72, 33])
def test_odd_addresses(d: int) -> None:
    """Inputs that begin on no 16 bytes, in memory that ends with them."""

    def odd(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    tensors = arguments("edit_add_layer_norm", (9, d), torch.bfloat16)
    found = []
    for place in (odd, Tensor.clone):
        asking = {name: place(t).requires_grad_() for name, t in tensors.items()}
        with CUDA[0].in_use():
            results = outputs_of(fused("edit_add_layer_norm", asking))
            grads = tuple(place(g) for g in upstream((9, d), torch.bfloat16))
            found.append((*results, *torch.autograd.grad(results, list(asking.values()), grads)))
    assert all(torch.equal(ours, expected) for ours, expected in zip(*found, strict=True))
