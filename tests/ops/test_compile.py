"""Registered operators, torch.compile, fake and meta tensors, autocast."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_cases import (
    ARGUMENTS,
    DTYPES,
    IMPLEMENTATIONS,
    OPERATIONS,
    WITH_DROPOUT,
    WITH_NORM_BEHIND,
    arguments,
    device_of,
    fused,
    leaves,
    outputs_of,
    run,
    same_bits,
    upstream,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import red_kernels as rk
from red_kernels.backends import cpu, cuda
from red_kernels.backends.arguments import flattened
from red_kernels.backends.schemas import SCHEMAS, flags

compiled_only = pytest.mark.skipif(cpu.load_error() is not None, reason=f"no CPU kernels: {cpu.load_error()}")
BACKENDS = list(dict.fromkeys(implementation.backend for implementation in IMPLEMENTATIONS))
# of the operators of a backend
NAMESPACES = {"cpu": cpu.NAMESPACE, "triton": "red_kernels_triton", "cuda": cuda.NAMESPACE}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _samples(name: str) -> list[tuple[Any, ...]]:
    """Arguments of a registered operator: with all, without what may be absent, with edit_ids, with other needs."""
    d, seed = 37, torch.tensor([5])
    x, other, third = (torch.randn(5, d) for _ in range(3))
    vectors = [torch.randn(d) for _ in range(4)]
    sets = [torch.randn(3, d) for _ in range(2)]
    ids = torch.tensor([0, 2, 2, 0, 0])
    mean, rstd = torch.randn(5), torch.rand(5)
    half, half_residual = x.bfloat16(), other.bfloat16()
    return {
        "edit_forward": [
            (x, other, *vectors[:2], None, None, 0.0),
            (half, half_residual, *sets, ids, seed, 0.5),
            (x.t().contiguous().t(), None, None, None, None, None, 0.0),
        ],
        "edit_backward": [
            *((x, other, vectors[0], None, None, 0.0, 1, needs) for needs in range(8)),
            (half, half_residual, sets[0], ids, seed, 0.5, 3, 7),
            (x, None, None, None, None, 0.0, 1, 5),
        ],
        "edit_norm_forward": [
            (x, other, *vectors, None, None, 0.0, 1e-5, 0.0, centered, keep)
            for centered, keep in itertools.product([False, True], repeat=2)
        ] + [(half, half_residual, *sets, None, None, ids, seed, 0.5, 1e-5, 0.0, False, True)],
        "edit_norm_backward": [
            (x, third, x, other, None, *vectors[:3], None, None, mean, rstd, 0.0, 0.0, 1, needs)
            for needs in (0, 1, 2, 4, 8, 16, 32, 63)
        ] + [
            (x, None, None, other, third, *vectors[:3], None, None, None, rstd, 0.0, 1.0, 1, 31),
            (half, None, half_residual, half, None, *sets, None, ids, seed, None, rstd, 0.5, 0.0, 3, 15),
        ],
        "norm_edit_forward": [
            (x, *vectors, None, 1e-5, 0.0, True),
            (half, None, None, *sets, ids, 1e-5, 0.0, False),
        ],
        "norm_edit_backward": [
            *((x, other, *vectors[:3], None, mean, rstd, 0.0, 1, needs) for needs in (0, 1, 2, 4, 8, 16, 31)),
            (half, half_residual, None, None, sets[0], ids, None, rstd, 0.0, 3, 25),
        ],
    }[name]  # fmt: skip


OPERATORS = [f"{what}_{way}" for what in ("edit", "edit_norm", "norm_edit") for way in ("forward", "backward")]


with_operators = pytest.mark.parametrize("backend", [name for name in BACKENDS if name in NAMESPACES])


def _operator(backend: str, name: str) -> tuple[Any, list[tuple[Any, ...]]]:
    """A registered operator and its samples, on the backend's device."""
    device = device_of(backend)
    samples = [tuple(t.to(device) if isinstance(t, Tensor) else t for t in sample) for sample in _samples(name)]
    return getattr(getattr(torch.ops, NAMESPACES[backend]), name).default, samples


@pytest.mark.implementations
@with_operators
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, backend: str) -> None:
    """Schemas tell the truth about writing and sharing, fake implementations about shapes, dtypes and strides."""
    operator, samples = _operator(backend, name)
    for number, sample in enumerate(samples):
        # The dynamic trace takes most of the time and differs only in what is absent.
        utils = ["test_schema", "test_faketensor", "test_autograd_registration"]
        if number in (0, len(samples) - 1):
            utils.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, sample, test_utils=utils)


@pytest.mark.implementations
@with_operators
@pytest.mark.parametrize("name", OPERATORS)
def test_schemas_are_those_in_python(name: str, backend: str) -> None:
    """Those of the compiled library too, which are written down once more, in C++."""
    (written,) = (schema for schema in SCHEMAS if schema.startswith(f"{name}("))
    operator, _ = _operator(backend, name)
    assert operator._schema == torch._C.parse_schema(f"{NAMESPACES[backend]}::{written}")


@pytest.mark.implementations
@with_operators
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_the_reference(name: str, backend: str) -> None:
    """Each result and None of an operator is that of the reference's function, so their arguments have one order."""
    operator, samples = _operator(backend, name)
    defined = flattened(rk.reference, flags)[name]
    for sample in samples:
        expected = defined(*sample)
        results, others = ((r,) if isinstance(r, Tensor) else tuple(r) for r in (operator(*sample), expected))
        assert [t is None for t in results] == [t is None for t in others]
        for t, other in zip(results, others, strict=True):
            if t is not None:
                # An argument in another's place changes numbers by their own size; other tests say how exact they are.
                close = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7}[t.dtype]
                assert bool(((t - other).abs() <= close * (1 + other.abs())).all())


@pytest.mark.implementations
@with_operators
@pytest.mark.parametrize("name", OPERATORS)
def test_results_not_asked_for_are_none(name: str, backend: str) -> None:
    operator, samples = _operator(backend, name)
    for sample in samples:
        real = operator(*sample)
        meta = operator(*(t.to("meta") if isinstance(t, Tensor) else t for t in sample))
        real, meta = ((r,) if isinstance(r, Tensor) else r for r in (real, meta))
        assert [None if t is None else (t.shape, t.dtype, t.stride()) for t in real] == [
            None if t is None else (t.shape, t.dtype, t.stride()) for t in meta
        ]


def _trial(
    operation: str, backend: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Tensors of an operation and gradients from above on the device of a backend: a trace is of one device."""
    device = device_of(backend)
    tensors = {name: t.to(device) for name, t in arguments(operation, (6, 37), dtype, **options).items()}
    return tensors, tuple(g.to(device) for g in upstream((6, 37), dtype))


@pytest.mark.implementations
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_forward_and_backward(operation: str, backend: str) -> None:
    tensors, grads = _trial(operation, backend, torch.bfloat16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(name: str, given: dict[str, Tensor], **options: Any) -> Any:
        return fused(name, given, **options)

    with rk.backend(backend):
        assert same_bits(run(compiled, operation, tensors, grads), run(fused, operation, tensors, grads))


@compiled_only
@pytest.mark.parametrize("operation", ["edit_add_rms_norm", "layer_norm_edit"])
def test_compiled_by_inductor(operation: str) -> None:
    """Between operations of PyTorch's own, which Inductor takes."""
    tensors, grads = arguments(operation, (6, 37)), upstream((6, 37), torch.float32)

    def doubled(name: str, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(t * 2 for t in outputs_of(fused(name, given | {"x": given["x"] * 2})))

    compiled = torch.compile(doubled, fullgraph=True)
    with rk.backend("cpu"):
        assert same_bits(run(compiled, operation, tensors, grads), run(doubled, operation, tensors, grads))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_once_for_any_number_of_rows(operation: str) -> None:
    counter = CompileCounter()
    compiled = torch.compile(fused, fullgraph=True, backend=counter, dynamic=None)
    for rows in (6, 7, 30, 511, 4000):
        tensors = leaves(arguments(operation, (rows, 37)))
        results = outputs_of(compiled(operation, tensors))
        assert all(map(torch.equal, results, outputs_of(fused(operation, tensors))))
    assert counter.frame_count <= 2  # once as first seen, once for any number
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for rows in (6, 7, 30):
        tensors = arguments(operation, (rows, 37))
        for name in ("x", "residual"):
            if name in tensors:
                torch._dynamo.mark_dynamic(tensors[name], 0)
        compiled(operation, tensors)
    assert counter.frame_count == 1


@pytest.mark.implementations
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_with_edit_ids(operation: str, backend: str) -> None:
    tensors, grads = _trial(operation, backend, edits=3)
    ids = torch.tensor([2, 0, 0, 2, 2, 2], device=device_of(backend))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with rk.backend(backend):
        found = run(compiled, operation, tensors, grads, edit_ids=ids)
        assert same_bits(found, run(fused, operation, tensors, grads, edit_ids=ids))


@compiled_only
def test_edit_ids_out_of_range_in_compiled_code() -> None:
    """The check of values is left out of a trace; the kernel has its own."""
    compiled = torch.compile(rk.edit, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="edit_ids has the value 3, expected 0 to 2"):
        compiled(torch.randn(2, 37), torch.randn(3, 37), edit_ids=torch.tensor([0, 3]))


@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_compiled_with_dropout(operation: str) -> None:
    """The mask is made from torch's generator; forward and backward have the same one."""
    tensors = arguments(operation, (60, 37)) | {"scale": None, "bias": None}
    asking = leaves(tensors)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    results = outputs_of(compiled(operation, asking, dropout_p=0.5, training=True))
    kept = results[-1] != tensors["residual"]
    assert 0.4 < float(kept.float().mean()) < 0.6  # ten standard deviations
    (gradient,) = torch.autograd.grad(results[-1].sum(), asking["x"])
    assert torch.equal(gradient != 0, kept)


@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_compiled_without_z(operation: str) -> None:
    tensors, grads = arguments(operation, (6, 37)), upstream((6, 37), torch.float32, number=1)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    found = run(compiled, operation, tensors, grads, need_z=False)
    assert same_bits(found, run(fused, operation, tensors, grads, need_z=False))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_fake_tensors(device: str, operation: str) -> None:
    tensors = arguments(operation, (6, 37), torch.bfloat16)
    real = run(fused, operation, tensors, upstream((6, 37), torch.bfloat16))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        given = {name: mode.from_tensor(t).to(device).requires_grad_() for name, t in tensors.items()}
        results = outputs_of(fused(operation, given))
        found = torch.autograd.grad(results, list(given.values()), [torch.ones_like(t) for t in results])
    for fake, (name, value) in zip((*results, *found), real.items(), strict=True):
        assert (fake.shape, fake.dtype, fake.device.type) == (value.shape, value.dtype, device), name


@pytest.mark.parametrize("operation", OPERATIONS)
def test_meta_tensors(operation: str) -> None:
    tensors = {name: t.to("meta").requires_grad_() for name, t in arguments(operation, (6, 37)).items()}
    results = outputs_of(fused(operation, tensors))
    sum(t.sum() for t in results).backward()
    assert all(t.shape == (6, 37) and t.is_meta for t in results)
    assert all(t.grad.shape == t.shape for t in tensors.values())


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_leaves_the_operations_alone(operation: str, dtype: torch.dtype) -> None:
    """They round once, to the dtype of what they are given: there is nothing for autocast to choose."""
    tensors, grads = arguments(operation, (6, 37), dtype), upstream((6, 37), dtype)
    plain = run(fused, operation, tensors, grads)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(run(fused, operation, tensors, grads), plain)


def test_autocast_of_a_half_linear_and_a_wide_residual() -> None:
    """A residual stream in fp32 stays there."""
    x, weight, residual = torch.randn(6, 24), torch.randn(37, 24), torch.randn(6, 37)
    scale = torch.randn(37, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        h = torch.nn.functional.linear(x, weight)
        z = rk.edit_add(h, residual, scale)
        both = rk.linear_edit(x, weight, None, scale, None, residual)
    assert (h.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(both, z)
    z.sum().backward()
    assert scale.grad.dtype == torch.float32


def test_every_argument_is_listed() -> None:
    assert set(ARGUMENTS) == set(rk.functional.__all__) & set(dir(rk)) - {"linear_edit"}
