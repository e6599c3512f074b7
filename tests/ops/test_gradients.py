"""Gradients: right by finite differences, only for what asks, from what was saved, and once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_cases import (
    ARGUMENTS,
    OPERATIONS,
    WITH_NORM_BEHIND,
    WITH_WEIGHT_OFFSET,
    Implementation,
    Tensors,
    arguments,
    call,
    device_of,
    fused,
    leaves,
    outputs_of,
    run,
    upstream,
)
from torch import Tensor

import red_kernels as rk
from red_kernels import backends, functional
from red_kernels.backends.arguments import Norm, affine_edit


def _check(operation: str, tensors: Tensors, **options: Any) -> None:
    present = {name: t for name, t in leaves(tensors, torch.float64).items() if t is not None}

    def of(*values: Tensor) -> tuple[Tensor, ...]:
        return outputs_of(fused(operation, tensors | dict(zip(present, values, strict=True)), **options))

    with rk.backend("reference"):
        torch.autograd.gradcheck(of, tuple(present.values()))


@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradcheck(operation: str, d: int) -> None:
    _check(operation, arguments(operation, (2, 3, d)), **({"eps": 1.0} if "norm" in operation else {}))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradcheck_with_edit_ids(operation: str) -> None:
    _check(operation, arguments(operation, (4, 3), edits=3), edit_ids=torch.tensor([2, 0, 2, 2]))


@pytest.mark.parametrize("operation", WITH_WEIGHT_OFFSET)
def test_gradcheck_with_weight_offset(operation: str) -> None:
    _check(operation, arguments(operation, (4, 3)), weight_offset=1.0)


@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_gradcheck_without_z(operation: str) -> None:
    _check(operation, arguments(operation, (4, 3)), need_z=False)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradcheck_without_vectors(operation: str) -> None:
    tensors = arguments(operation, (4, 3))
    _check(operation, tensors | dict.fromkeys(name for name in tensors if name not in ("x", "residual")))


@pytest.mark.parametrize("need_z", [True, False])
@pytest.mark.parametrize("operation", ["edit_add", *WITH_NORM_BEHIND])
def test_gradcheck_with_dropout(operation: str, need_z: bool) -> None:
    """With one mask throughout: the seed is the Function's argument."""
    functions = {"edit_add": rk.functional.EditAddFunction, "edit_add_rms_norm": rk.functional.EditAddRMSNormFunction}
    function = functions.get(operation, rk.functional.EditAddLayerNormFunction)
    seed = torch.tensor([12345])
    trailing: tuple[Any, ...] = (None, seed, 0.4)
    if operation in WITH_NORM_BEHIND:
        trailing += (1e-5, 1.0, need_z) if "rms" in operation else (1e-5, need_z)
    tensors = leaves(arguments(operation, (4, 5)), torch.float64)
    with rk.backend("reference"):
        torch.autograd.gradcheck(
            lambda *values: outputs_of(function.apply(*values, *trailing)), tuple(tensors.values())
        )


@pytest.mark.parametrize("absent", [(), ("linear_bias",), ("scale",), ("residual", "bias")], ids=str)
def test_gradcheck_of_linear_edit(absent: tuple[str, ...]) -> None:
    shapes = {"x": (4, 3), "weight": (5, 3), "linear_bias": (5,), "scale": (5,), "bias": (5,), "residual": (4, 5)}
    tensors = {
        name: torch.randn(shape).double().requires_grad_() for name, shape in shapes.items() if name not in absent
    }

    def of(*values: Tensor) -> Tensor:
        return rk.linear_edit(*(dict.fromkeys(shapes) | dict(zip(tensors, values, strict=True))).values())

    with rk.backend("reference"):
        torch.autograd.gradcheck(of, tuple(tensors.values()))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_only_for_what_asks(operation: str, implementation: Implementation) -> None:
    """For every subset of the arguments: the gradient that all together give, and None for the others."""
    shape = (5, 37)
    tensors, grads = arguments(operation, shape), upstream(shape, torch.float32)
    every = run(fused, operation, tensors, grads)
    names = ARGUMENTS[operation]
    for count in range(1, len(names)):
        for asking in itertools.combinations(names, count):
            given = {name: t.clone().requires_grad_(name in asking) for name, t in tensors.items()}
            results = outputs_of(fused(operation, given))
            torch.autograd.backward(results, grads[: len(results)])
            for name, t in given.items():
                if name in asking:
                    assert torch.equal(t.grad, every[f"d {name}"]), (asking, name)
                else:
                    assert t.grad is None, (asking, name)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_asks(operation: str, implementation: Implementation) -> None:
    results = outputs_of(fused(operation, arguments(operation, (5, 37))))
    assert not any(t.requires_grad for t in results)


def _saved(operation: str, tensors: Tensors, asking: tuple[str, ...], **options: Any) -> set[str]:
    """Which of the tensors a backward for ``asking`` keeps; 'z' and 'statistic' for what is made."""
    device = device_of(backends.forced_backend())
    given = {name: t.to(device, copy=True).requires_grad_(name in asking) for name, t in tensors.items()}
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        fused(operation, given, **options)
    known = {t.data_ptr(): name for name, t in given.items()}
    shape = tensors["x"].shape
    return {known.get(t.data_ptr(), "z" if t.shape == shape else "statistic") for t in kept}


def test_only_what_is_needed_is_saved(implementation: Implementation) -> None:
    for operation in ("edit", "edit_add"):
        tensors = arguments(operation, (5, 37))
        assert _saved(operation, tensors, ("bias",)) == set()
        assert _saved(operation, tensors, ("x",)) == {"scale"}
        assert _saved(operation, tensors, ("scale",)) == {"x"}
    for operation in WITH_NORM_BEHIND:
        tensors = arguments(operation, (5, 37))
        assert _saved(operation, tensors, ()) == set()
        assert _saved(operation, tensors, ("bias",)) == {"z", "weight", "statistic"}
        assert _saved(operation, tensors, ("residual",)) == {"z", "weight", "statistic"}
        assert _saved(operation, tensors, ("x", "scale", "bias")) == {"x", "z", "scale", "weight", "statistic"}
        # Without z, nothing of its size is made: it is computed again.
        recomputed = {"x", "residual", "scale", "bias", "weight", "statistic"}
        assert _saved(operation, tensors, ("bias",), need_z=False) == recomputed
    for operation in ("rms_norm_edit", "layer_norm_edit"):
        tensors = arguments(operation, (5, 37))
        assert _saved(operation, tensors, ()) == set()
        assert "norm_bias" not in _saved(operation, tensors, ("x", "bias"))


@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_only_one_of_the_results_is_used(operation: str, implementation: Implementation) -> None:
    """The same as an explicit zero for the other result."""
    shape = (5, 37)
    tensors, (dy, dz) = arguments(operation, shape), upstream(shape, torch.float32)
    for used, grads in ((0, (dy, torch.zeros(shape))), (1, (torch.zeros(shape), dz))):
        explicit = run(fused, operation, tensors, grads)
        asking = leaves(tensors)
        fused(operation, asking)[used].backward(grads[used])
        for name, t in asking.items():
            if used == 1 and name in ("weight", "norm_bias"):
                assert t.grad is None or not t.grad.any()
            else:
                assert torch.equal(t.grad, explicit[f"d {name}"]), name


@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_z_changed_before_the_backward(operation: str, implementation: Implementation) -> None:
    y, z = fused(operation, leaves(arguments(operation, (5, 37)), device=implementation.device))
    with torch.no_grad():
        z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_second_derivative(operation: str, implementation: Implementation) -> None:
    tensors = leaves(arguments(operation, (5, 37)), device=implementation.device)
    results = outputs_of(fused(operation, tensors))
    first = torch.autograd.grad(sum(t.square().sum() for t in results), list(tensors.values()), create_graph=True)
    expected = run(fused, operation, tensors, tuple(2 * t.detach() for t in results))
    for gradient, name in zip(first, tensors, strict=True):
        assert torch.equal(gradient, expected[f"d {name}"])
    if not implementation.ours:  # see test_derivatives.py
        assert all(torch.isfinite(t).all() for t in torch.autograd.grad(sum(g.sum() for g in first), tensors["x"]))
        return
    title = "LayerNorm" if "layer_norm" in operation else "RMSNorm"
    name = {"edit": "Edit(Add)?", "edit_add": "EditAdd"}.get(operation)
    name = name or (f"{title}Edit" if operation.endswith("edit") else f"EditAdd{title}")
    message = rf"^{name}Function has no second derivative.*rk\.backend\('reference'\)"
    for name, gradient in zip(tensors, first, strict=True):
        if (operation, name) == ("edit_add", "residual"):  # that is the upstream gradient itself, as in PyTorch's add
            (second,) = torch.autograd.grad(gradient.sum(), tensors["x"], retain_graph=True)
            assert torch.equal(second, (2 * tensors["scale"]).expand_as(second))
            continue
        for t in tensors.values():  # even where another way leads to this tensor, or none: never a wrong number
            with pytest.raises(RuntimeError, match=message):
                torch.autograd.grad(gradient.sum() + t.sum(), t, retain_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match=message):
            gradient.sum().backward(retain_graph=True)


def test_create_graph_without_a_second_derivative(implementation: Implementation) -> None:
    """A gradient that depends on nothing that asks is a constant."""
    x, scale = torch.randn(5, 37), torch.randn(37, requires_grad=True)
    (first,) = torch.autograd.grad(call(rk.edit, x, scale).sum(), scale, create_graph=True)
    assert not first.requires_grad


def test_reference_has_second_derivatives() -> None:
    """What the error recommends."""
    x, scale = torch.randn(3, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()

    def of(x: Tensor, scale: Tensor) -> Tensor:
        return rk.reference.norm_edit_forward(x, Norm(None, None, 1e-5, 0.0, True), affine_edit(scale))[0]

    assert torch.autograd.gradgradcheck(of, (x, scale))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_backward_twice(operation: str, implementation: Implementation) -> None:
    tensors = leaves(arguments(operation, (5, 37)))
    total = sum(t.sum() for t in outputs_of(fused(operation, tensors)))
    first = torch.autograd.grad(total, list(tensors.values()), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(total, list(tensors.values())), first))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_tensor_in_several_places(operation: str, implementation: Implementation) -> None:
    """x as its own residual, scale as bias: the gradients add up."""
    tensors = arguments(operation, (5, 37))
    same = {"residual": "x", "bias": "scale"}
    apart = {name: tensors[same.get(name, name)].clone().requires_grad_() for name in tensors}
    one = leaves(tensors)
    one = {name: one[same.get(name, name)] for name in tensors}
    for given in (apart, one):
        sum(t.square().sum() for t in outputs_of(fused(operation, given))).backward()
    for name in set(tensors) - set(same):
        added = sum(apart[other].grad for other in tensors if same.get(other, other) == name)
        assert torch.allclose(one[name].grad, added, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_leaf_gradients_do_not_share_memory(operation: str, implementation: Implementation) -> None:
    """Where the gradients of x and of the residual are one tensor, changing one of them must not change the other."""
    tensors = arguments(operation, (5, 37)) | {"scale": None}
    asking = leaves(tensors, device=implementation.device)
    results = outputs_of(fused(operation, asking))
    grads = [g.to(implementation.device) for g in upstream((5, 37), torch.float32)[: len(results)]]
    before = [g.clone() for g in grads]
    torch.autograd.backward(results, grads)
    kept = {name: t.grad.clone() for name, t in asking.items() if t is not None}
    asking["x"].grad.zero_()
    assert all(torch.equal(asking[name].grad, value) for name, value in kept.items() if name != "x")
    assert all(map(torch.equal, grads, before))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_expanded_upstream_gradient(operation: str, implementation: Implementation) -> None:
    """As the backward of a sum hands it down."""
    shape = (5, 37)
    tensors = arguments(operation, shape)
    plain = run(fused, operation, tensors, (torch.ones(shape), torch.ones(shape)))
    expanded = run(fused, operation, tensors, (torch.ones(()).expand(shape), torch.ones(()).expand(shape)))
    assert all(torch.equal(value, plain[name]) for name, value in expanded.items())


def test_functional_call(implementation: Implementation) -> None:
    class Site(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(37))

        def forward(self, x: Tensor) -> Tensor:
            return call(rk.edit, x, self.scale)

    x, scale = torch.randn(5, 37), torch.randn(37, requires_grad=True)
    torch.func.functional_call(Site(), {"scale": scale}, (x,)).sum().backward()
    assert torch.equal(scale.grad, run(fused, "edit", {"x": x, "scale": scale.detach(), "bias": None},
                                       (torch.ones(5, 37),))["d scale"])  # fmt: skip


def test_functions_are_public() -> None:
    names = [name for name in functional.__all__ if name.endswith("Function")]
    assert len(names) == 7
    for name in names:
        assert issubclass(getattr(functional, name), torch.autograd.Function)
    x, scale = torch.randn(5, 37), torch.randn(37)
    assert torch.equal(functional.EditFunction.apply(x, scale, None, None), rk.edit(x, scale))
