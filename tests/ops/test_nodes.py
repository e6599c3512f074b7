"""Autograd's nodes in C++ do what the Functions in Python do, to the bit, in each situation of a backward pass."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from red_kernels import backends
from red_kernels.backends import choose, nodes
from red_kernels.backends.arguments import Dropout, Edit, Norm, affine_edit
from red_kernels.ops import fused, handover

pytestmark = pytest.mark.skipif(nodes.load_error() is not None, reason=f"no nodes in C++: {nodes.load_error()}")
WIDTH = 24


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has operations run by the Functions from then on."""

    def switch() -> None:
        monkeypatch.setattr(fused, "_nodes", lambda x, operation: None)
        monkeypatch.setattr(handover, "choose", lambda *given: dataclasses.replace(choose(*given), nodes=None))

    return switch


class Case:
    """Tensors that ask for gradients, drawn anew but the same each time."""

    def __init__(self, ids: bool = False, dropout: bool = False, centered: bool = True, dtype: Any = None) -> None:
        drawn = torch.Generator().manual_seed(0)

        def draw(*shape: int, like: Any = dtype) -> Tensor:
            return torch.randn(*shape, generator=drawn).to(like).requires_grad_()

        vectors = (3, WIDTH) if ids else (WIDTH,)
        self.x, self.residual = draw(2, 5, WIDTH), draw(2, 5, WIDTH)
        self.scale, self.bias = draw(*vectors, like=torch.float32), draw(*vectors, like=torch.float32)
        self.weight = draw(WIDTH)
        self.norm_bias = draw(WIDTH) if centered else None
        rows = torch.randint(0, 3, (2, 5), generator=drawn) if ids else None
        mask = Dropout(0.3, torch.tensor([7])) if dropout else None
        self.edit: Edit = affine_edit(self.scale, self.bias, rows, mask)
        self.norm = Norm(self.weight, self.norm_bias, 1e-5, 0.0 if centered else 1.0, centered)

    @property
    def leaves(self) -> list[Tensor]:
        every = (self.x, self.residual, self.scale, self.bias, self.weight, self.norm_bias)
        return [one for one in every if one is not None]


def _edit(case: Case) -> tuple[Tensor, ...]:
    return (fused.edit_add(case.x, None, case.edit),)


def _edit_add(case: Case) -> tuple[Tensor, ...]:
    return (fused.edit_add(case.x, case.residual, case.edit),)


def _edit_norm(case: Case) -> tuple[Tensor, ...]:
    y, z = fused.edit_add_norm(case.x, case.residual, case.edit, case.norm)
    assert z is not None
    return y, z


def _norm_alone(case: Case) -> tuple[Tensor, ...]:
    return (fused.edit_add_norm(case.x, case.residual, case.edit, case.norm, need_z=False)[0],)


def _norm_edit(case: Case) -> tuple[Tensor, ...]:
    return (fused.norm_edit(case.x, case.norm, case.edit._replace(dropout=None)),)


def _sum_norm(case: Case) -> tuple[Tensor, ...]:
    z, given = handover.sum_of(case.x, case.residual, case.edit, case.norm)
    return z, handover.norm_of(z, given, case.norm)


def _sum_then_norm(case: Case) -> tuple[Tensor, ...]:
    z, given = handover.sum_of(case.x, case.residual, case.edit)
    return z, handover.norm_of(z, given, case.norm)


OPERATIONS = (_edit, _edit_add, _edit_norm, _norm_alone, _norm_edit, _sum_norm, _sum_then_norm)


def results(operation: Any, case: Case, use: str = "all", backward: bool = False) -> Iterator[Tensor]:
    """The outputs of an operation, and the gradients of all that asks for them."""
    outputs = operation(case)
    yield from outputs
    used = {"all": outputs, "first": outputs[:1], "last": outputs[-1:]}[use]
    value = sum((torch.cos(torch.arange(one.numel())).view(one.shape) * one).sum() for one in used)
    assert isinstance(value, Tensor)
    if backward:
        value.backward()
        found: Any = [leaf.grad for leaf in case.leaves]
    else:
        found = torch.autograd.grad(value, case.leaves, allow_unused=True)
    yield from (torch.zeros(()) if one is None else one for one in found)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("use", ["all", "first", "last"])
@pytest.mark.parametrize(
    "how", [{}, {"ids": True}, {"dropout": True}, {"centered": False}, {"dtype": torch.bfloat16}], ids=str
)
def test_the_bits_of_the_functions(
    operation: Any, how: dict[str, Any], use: str, backward: bool, in_python: Any
) -> None:
    here = list(results(operation, Case(**how), use, backward))
    in_python()
    there = list(results(operation, Case(**how), use, backward))
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("asked", range(6))
def test_only_what_is_asked_for(operation: Any, asked: int, in_python: Any) -> None:
    def run() -> list[Tensor]:
        case = Case()
        for at, leaf in enumerate(case.leaves):
            leaf.requires_grad_(at == asked)
        output = operation(case)[-1]
        if not output.requires_grad:
            return [output]
        output.sum().backward()
        return [output, *(torch.zeros(()) if leaf.grad is None else leaf.grad for leaf in case.leaves)]

    here = run()
    in_python()
    assert all(torch.equal(one, other) for one, other in zip(here, run(), strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_second_derivative_says_what_has_none(operation: Any) -> None:
    case = Case()
    first = torch.autograd.grad(operation(case)[-1].square().sum(), case.x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"Function has no second derivative: kernels can be differentiated once"):
        first.sum().backward()


@pytest.mark.parametrize("operation", [_edit_add, _edit_norm, _norm_edit, _sum_norm])
def test_gradients_with_tangents(operation: Any, in_python: Any) -> None:
    def run() -> Tensor:
        case = Case()
        output = operation(case)[-1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(torch.ones_like(output), torch.full_like(output, 0.5))
            found = torch.autograd.grad(output, case.x, dual)[0]
            tangent = torch.autograd.forward_ad.unpack_dual(found).tangent
            assert tangent is not None
            return tangent

    here = run()
    in_python()
    torch.testing.assert_close(here, run())


def test_a_graph_that_was_freed() -> None:
    output = _sum_norm(Case())[-1].sum()
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


@pytest.mark.parametrize("watched", ["retain_grad", "hook", "node", "inputs"])
def test_whoever_asks_for_the_gradient_of_a_sum_gets_all_of_it(watched: str) -> None:
    def run(watch: bool) -> tuple[Tensor | None, Tensor]:
        case, seen = Case(), []
        z, y = _sum_norm(case)
        value = (y * y).sum() + z.sum()
        if not watch:
            found = torch.autograd.grad(value, [z, case.x])
            return found[0], found[1]
        if watched == "retain_grad":
            z.retain_grad()
        elif watched == "hook":
            z.register_hook(seen.append)
        elif watched == "node":
            z.grad_fn.register_prehook(lambda grads: seen.append(grads[0]))  # type: ignore[union-attr]
        value.backward(inputs=[z, case.x] if watched == "inputs" else None)
        assert case.x.grad is not None
        return (z.grad if watched in ("retain_grad", "inputs") else seen[0]), case.x.grad

    (total, x), (expected, expected_x) = run(True), run(False)
    assert total is not None
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(x, expected_x)


def test_two_norms_of_one_sum() -> None:
    case = Case()
    z, given = handover.sum_of(case.x, case.residual, case.edit)
    other = Norm(case.weight, None, 1e-3, 0.0, False)
    value = handover.norm_of(z, given, case.norm).square().sum() + handover.norm_of(z, given, other).sin().sum()
    value.backward()
    plain = Case()
    z = plain.residual + (plain.scale * plain.x + plain.bias)
    first = torch.nn.functional.layer_norm(z, (WIDTH,), plain.weight, plain.norm_bias, 1e-5)
    second = torch.nn.functional.rms_norm(z, (WIDTH,), plain.weight, 1e-3)
    (first.square().sum() + second.sin().sum()).backward()
    for leaf, wanted in zip(case.leaves, plain.leaves, strict=True):
        torch.testing.assert_close(leaf.grad, wanted.grad, rtol=1e-4, atol=1e-5)


def test_several_threads_run_one_graph() -> None:
    case = Case()
    z, y = _sum_norm(case)
    value = y.square().sum() + z.sum()
    value.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in case.leaves if leaf.grad is not None]
    for leaf in case.leaves:
        leaf.grad = None
    count = 8
    threads = [threading.Thread(target=lambda: value.backward(retain_graph=True)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for leaf, one in zip(case.leaves, once, strict=True):
        torch.testing.assert_close(leaf.grad, count * one, rtol=1e-4, atol=1e-4)


def test_saved_tensors_go_through_hooks() -> None:
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    case = Case()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = _sum_norm(case)[-1]
    assert packed
    output.sum().backward()
    assert case.scale.grad is not None


def test_what_was_changed_in_place_is_noticed() -> None:
    case = Case()
    z, y = _sum_norm(case)
    with torch.no_grad():
        z.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_another_python_or_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_here", lambda: "cpython-399, torch 9.9.9")
    module, error = nodes._load()
    assert module is None
    assert error is not None
    assert "it was built for" in error
    assert "but this is cpython-399, torch 9.9.9; remedy: install red-kernels again" in error
    monkeypatch.setenv("RED_KERNELS_NODES", "0")
    assert nodes._load() == (None, "RED_KERNELS_NODES=0 leaves it out")


def test_nodes_are_those_of_the_chosen_backend() -> None:
    x = torch.randn(3, 5)
    assert fused._nodes(x, "edit") is backends.by_name("cpu").nodes
    with backends.backend("reference"):
        assert fused._nodes(x, "edit") is None
        with backends.backend("cpu"):
            assert fused._nodes(x, "edit") is backends.by_name("cpu").nodes
    assert fused._nodes(x.double(), "edit") is None
    seen = []
    torch.func.vmap(lambda row: seen.append(fused._nodes(row, "edit")) or row)(x)
    assert seen == [None]


def test_a_seed_is_what_torch_draws() -> None:
    assert nodes.seed is not None
    torch.manual_seed(3)
    wanted = [torch.randint(0, 2**62, (1,)) for _ in range(4)], torch.get_rng_state()
    torch.manual_seed(3)
    assert [nodes.seed(torch.empty(2)) for _ in range(4)] == wanted[0]
    assert torch.equal(torch.get_rng_state(), wanted[1])
