"""Derivatives beyond the first gradient: second ones on the reference, forward mode on any backend, both in models."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
import torch.nn.functional as F
from op_cases import ARGUMENTS, EPS, OPERATIONS, WITH_DROPOUT, WITH_NORM_BEHIND, drawn_factor, outputs_of
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import red_kernels as rk

OPTIONAL = ("residual", "scale", "bias", "weight", "norm_bias")
ALL = (*OPERATIONS, "linear_edit")
NAMES = {**ARGUMENTS, "linear_edit": ("x", "weight", "linear_bias", "scale", "bias", "residual")}
ROWS, WIDTH, EDITS = 3, 4, 2


def given(operation: str, absent: tuple[str, ...] = (), edits: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """The tensors of an operation by name, None for those ``absent``; scale and bias of several edits, if asked for."""
    made: dict[str, Tensor | None] = {}
    for name in NAMES[operation]:
        shape: tuple[int, ...] = (WIDTH,)
        if name in ("x", "residual"):
            shape = (ROWS, WIDTH)
        elif operation == "linear_edit" and name == "weight":
            shape = (WIDTH, WIDTH)
        elif edits and name in ("scale", "bias"):
            shape = (EDITS, WIDTH)
        made[name] = None if name in absent else torch.randn(shape, dtype=dtype)
    return made


def operation_of(operation: str, names: tuple[str, ...], **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The operation as a function of the tensors called ``names``; the others are None."""

    def of(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the same dropout in every call
        named = dict(zip(names, tensors, strict=True))
        ids = options.get("edit_ids")
        if ids is not None and not {"scale", "bias"} & set(names):
            ids = None
        return outputs_of(
            getattr(rk, operation)(*(named.get(n) for n in NAMES[operation]), **{**options, "edit_ids": ids})
        )

    return of


def combinations() -> list[Any]:
    """Every operation with every combination of absent tensors, and with what else it takes."""
    found = []
    for operation in ALL:
        optional = [n for n in NAMES[operation] if n in OPTIONAL and (operation, n) != ("linear_edit", "weight")]
        optional += ["linear_bias"] if operation == "linear_edit" else []
        for count in range(len(optional) + 1):
            for absent in itertools.combinations(optional, count):
                found.append((operation, absent))
    return found


def check_second(operation: str, absent: tuple[str, ...], *, edits: bool = False, **options: Any) -> None:
    tensors = {n: t for n, t in given(operation, absent, edits).items() if t is not None}
    asking = tuple(t.requires_grad_() for t in tensors.values())
    of = operation_of(operation, tuple(tensors), **options)
    assert gradgradcheck(of, asking, fast_mode=True)


@pytest.mark.parametrize(
    ("operation", "absent"), combinations(), ids=lambda v: v if isinstance(v, str) else "-".join(v)
)
def test_second_derivatives_of_the_reference(operation: str, absent: tuple[str, ...]) -> None:
    check_second(operation, absent)
    if not {"scale", "bias"} <= set(absent):
        check_second(operation, absent, edits=True, edit_ids=torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("operation", WITH_DROPOUT)
@pytest.mark.parametrize("absent", [(), ("residual",), ("scale",), ("bias",), ("scale", "bias")], ids="-".join)
def test_second_derivatives_with_dropout(operation: str, absent: tuple[str, ...]) -> None:
    norm = operation in WITH_NORM_BEHIND
    for need_z in (True, False) if norm else (None,):
        kept = {} if need_z is None else {"need_z": need_z}
        check_second(operation, absent, dropout_p=0.4, training=True, **kept)


@pytest.mark.parametrize("operation", WITH_NORM_BEHIND)
def test_second_derivatives_without_z(operation: str) -> None:
    check_second(operation, (), need_z=False)
    check_second(operation, (), edits=True, need_z=False, edit_ids=torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("operation", ALL)
def test_some_tensors_ask_for_no_second_derivative(operation: str) -> None:
    """What is saved follows from what asks for a gradient: each tensor alone, and each left out."""
    full = given(operation)
    for name in full:
        for asking in ({name}, set(full) - {name}):
            names = tuple(n for n in full if n in asking)

            def of(*tensors: Tensor, names: tuple[str, ...] = names) -> tuple[Tensor, ...]:
                named = {**full, **dict(zip(names, tensors, strict=True))}
                return operation_of(operation, tuple(full))(*named.values())

            assert gradgradcheck(of, tuple(full[n].clone().requires_grad_() for n in names), fast_mode=True)


@pytest.mark.parametrize("operation", ["edit", "layer_norm_edit"])
def test_public_functions_can_be_differentiated_as_often_as_one_likes(operation: str) -> None:
    x, scale = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True)
    with rk.backend("reference"):
        if operation == "edit":
            y = rk.functional.EditFunction.apply(x, scale, None, None)
        else:
            y = rk.functional.LayerNormEditFunction.apply(x, None, None, scale, None, None, EPS)
    expected = scale * (x if operation == "edit" else F.layer_norm(x, (WIDTH,), eps=EPS))
    for _ in range(3):
        found = [
            torch.autograd.grad(t.pow(3).sum(), (x, scale), create_graph=True, allow_unused=True) for t in (y, expected)
        ]
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        y, expected = found[0][0] * 0.1, found[1][0] * 0.1


# ---- forward mode


def plain(
    operation: str, tensors: dict[str, Tensor | None], ids: Tensor | None, factor: Any = 1.0
) -> tuple[Tensor, ...]:
    """The operation in torch's own operations."""
    scale, bias = (t if t is None or ids is None else t[ids] for t in (tensors["scale"], tensors["bias"]))

    def edit(h: Tensor) -> Tensor:
        h = h if scale is None else h * scale
        return (h if bias is None else h + bias) * factor

    x, residual, weight, norm_bias = (tensors.get(n) for n in ("x", "residual", "weight", "norm_bias"))
    assert x is not None
    if operation == "linear_edit":
        assert weight is not None
        h = edit(F.linear(x, weight, tensors["linear_bias"]))
        return (h if residual is None else h + residual,)

    def norm(z: Tensor) -> Tensor:
        if "layer_norm" in operation:
            return F.layer_norm(z, (WIDTH,), weight, norm_bias, EPS)
        return F.rms_norm(z, (WIDTH,), weight, EPS)

    if operation in ("rms_norm_edit", "layer_norm_edit"):
        return (edit(norm(x)),)
    z = edit(x) if residual is None else residual + edit(x)
    return (norm(z), z) if operation in WITH_NORM_BEHIND else (z,)


def call_with_eps(operation: str, tensors: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, ...]:
    eps = (EPS,) if "norm" in operation else ()
    return outputs_of(getattr(rk, operation)(*(tensors[n] for n in NAMES[operation]), *eps, **options))


BACKENDS = [name for name in ("cpu", "reference") if rk.available_backends()[name] is None]


@pytest.mark.parametrize("edits", [False, True], ids=["one edit", "edit_ids"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ALL)
def test_tangents(operation: str, backend: str, edits: bool) -> None:
    """``dual_level`` and ``torch.func.jvp`` of all tensors at once, of each alone, and of a Hessian times a vector."""
    tensors = given(operation, edits=edits, dtype=torch.float32)
    ids = torch.tensor([1, 0, 1]) if edits else None
    tangents = {n: torch.randn_like(t) for n, t in tensors.items()}
    for names in (tuple(tensors), *((n,) for n in tensors)):

        def ours(*values: Tensor, names: Any = names) -> Tensor:
            found = call_with_eps(operation, {**tensors, **dict(zip(names, values, strict=True))}, edit_ids=ids)
            return sum(t.square().sum() for t in found)

        def theirs(*values: Tensor, names: Any = names) -> Tensor:
            found = plain(operation, {**tensors, **dict(zip(names, values, strict=True))}, ids)
            return sum(t.square().sum() for t in found)

        primals, along = tuple(tensors[n] for n in names), tuple(tangents[n] for n in names)
        expected = torch.func.jvp(theirs, primals, along)[1]
        of_gradient = torch.func.jvp(torch.func.grad(theirs), primals, along)[1]
        close = {"rtol": 1e-3, "atol": 1e-3}
        with rk.backend(backend):
            torch.testing.assert_close(torch.func.jvp(ours, primals, along)[1], expected, **close)
            found = torch.func.jvp(torch.func.grad(ours), primals, along)[1]
            torch.testing.assert_close(found, of_gradient, **close)
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(p.clone().requires_grad_(), t) for p, t in zip(primals, along, strict=True)
                ]
                value = ours(*duals)
                torch.testing.assert_close(forward_ad.unpack_dual(value).tangent, expected, **close)
                (gradient,) = torch.autograd.grad(value, duals[0])
                torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, of_gradient, **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ALL)
def test_tangents_of_the_upstream_gradient(operation: str, backend: str) -> None:
    """A forward before the level, on the kernels; its backward within: what comes with a tangent gives one."""
    tensors = {n: t.requires_grad_() for n, t in given(operation, dtype=torch.float32).items()}
    with rk.backend(backend):
        y = call_with_eps(operation, tensors)[0]
    upstream, along = torch.randn_like(y), torch.randn_like(y)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(upstream, along)
        found = torch.autograd.grad(y, list(tensors.values()), dual, retain_graph=True)
        found = [forward_ad.unpack_dual(g).tangent for g in found]
    # A gradient is linear in the upstream one.
    expected = torch.autograd.grad(y, list(tensors.values()), along)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_tangents_through_dropout(operation: str) -> None:
    tensors = given(operation, dtype=torch.float32)
    along = torch.randn_like(tensors["x"])
    for level in (True, False):
        factor = drawn_factor(0, 0.5, (ROWS, WIDTH)).float()

        def ours(x: Tensor) -> Tensor:
            return call_with_eps(operation, {**tensors, "x": x}, dropout_p=0.5, training=True)[0]

        def theirs(x: Tensor, factor: Tensor = factor) -> Tensor:
            return plain(operation, {**tensors, "x": x}, None, factor)[0]

        expected = torch.func.jvp(theirs, (tensors["x"],), (along,))[1]
        if level:
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(ours(forward_ad.make_dual(tensors["x"], along))).tangent
        else:
            found = torch.func.jvp(ours, (tensors["x"],), (along,))[1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("operation", ALL)
def test_transforms_in_compiled_code(operation: str) -> None:
    """Compiled code that takes derivatives in forward mode, or by torch.func, or is called within a level."""
    tensors = given(operation, dtype=torch.float32)
    x, along = tensors["x"], torch.randn_like(tensors["x"])

    def ours(x: Tensor) -> Tensor:
        return call_with_eps(operation, {**tensors, "x": x})[0].square().sum()

    def theirs(x: Tensor) -> Tensor:
        return plain(operation, {**tensors, "x": x}, None)[0].square().sum()

    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), theirs(x))
    expected = torch.func.jvp(theirs, (x,), (along,))[1]
    with forward_ad.dual_level():  # the code that was compiled outside would drop the tangent
        dual, found = forward_ad.make_dual(x, along), None
        with contextlib.suppress(torch._dynamo.exc.Unsupported):  # torch 2.14 refuses all tangents from outside
            found = forward_ad.unpack_dual(compiled(dual)).tangent
        if found is None:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="dual tensor"):
                compiled(dual)
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    jvp = torch.compile(lambda x, t: torch.func.jvp(ours, (x,), (t,))[1], backend="eager")
    torch.testing.assert_close(jvp(x, along), expected, rtol=1e-4, atol=1e-4)
    grad = torch.compile(torch.func.grad(ours), backend="eager")
    torch.testing.assert_close(grad(x), torch.func.grad(theirs)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", ALL)
def test_vmap(operation: str) -> None:
    """Over rows, with edits of their own too; ids out of range are an error there as well."""
    for edits in (False, True):
        tensors = given(operation, edits=edits, dtype=torch.float32)
        ids = torch.tensor([1, 0, 1]) if edits else None
        over = [n for n in ("x", "residual") if n in tensors]

        def one(ids: Tensor | None, *values: Tensor, over: Any = over, tensors: Any = tensors) -> Tensor:
            named = {**tensors, **dict(zip(over, values, strict=True))}
            return call_with_eps(operation, named, edit_ids=ids)[0]

        places = (None if ids is None else 0, *(0 for _ in over))
        each = torch.vmap(one, places)(ids if ids is None else ids[:, None], *(tensors[n][:, None] for n in over))
        torch.testing.assert_close(each[:, 0], plain(operation, tensors, ids)[0], rtol=1e-4, atol=1e-5)
        if ids is not None:
            with pytest.raises(IndexError, match="edit_ids has values from 0 to 7, expected 0 to 1"):
                torch.vmap(one, places)(torch.tensor([[7], [0], [1]]), *(tensors[n][:, None] for n in over))


# ---- patched models


def tiny(name: str) -> tuple[Any, Any]:
    """A model in fp64 and its patched copy, whose edit is applied to the plain one by a hook on each site."""
    plain_model = zoo.tiny(name).double().eval()
    plain_model.config._attn_implementation = "eager"  # torch's fused attention has one derivative only
    patched = copy.deepcopy(plain_model)
    rk.patch(patched, rk.RedConfig(dtype=torch.float64))
    vectors = rk.edit_parameters(patched)
    with torch.no_grad():
        for of in vectors.values():
            for vector in of.values():
                vector.add_(0.1 * torch.randn_like(vector))
    for site, of in vectors.items():
        plain_model.get_submodule(site).register_forward_hook(
            lambda module, args, output, of=of: output * of["scale"] + of["bias"]
        )
    return plain_model, patched


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_patched_models(name: str) -> None:
    """Gradients of a gradient's norm, and tangents along all edits, against hooks on the plain model."""
    plain_model, patched = tiny(name)
    vectors = [v for of in rk.edit_parameters(patched).values() for v in of.values()]
    along = [torch.randn_like(v) for v in vectors]
    batch = zoo.inputs(name)

    def loss(model: Any) -> Tensor:  # the library's own is taken in fp32
        return model(**batch).logits.square().mean()

    def penalty(model: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(model), vectors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), vectors)

    with rk.backend("reference"):
        ours = penalty(patched)
    for found, expected in zip(ours, penalty(plain_model), strict=True):
        assert_alike(found, expected)

    slots = [(holder, n) for holder, n, _ in _slots(patched, vectors)]

    def tangent(model: Any) -> Tensor:
        with forward_ad.dual_level():
            for (holder, n), v, t in zip(slots, vectors, along, strict=True):
                del holder._parameters[n]
                holder._parameters[n] = forward_ad.make_dual(v.detach(), t)
            try:
                return forward_ad.unpack_dual(loss(model)).tangent.clone()
            finally:
                for (holder, n), v in zip(slots, vectors, strict=True):
                    holder._parameters[n] = v

    gradients = torch.autograd.grad(loss(plain_model), vectors)
    expected = sum((g * t).sum() for g, t in zip(gradients, along, strict=True))
    assert_alike(tangent(patched), expected)


def assert_alike(found: Tensor, expected: Tensor) -> None:
    """To a few digits of fp32, in which the library's Llama takes its norms whatever the model's dtype."""
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def _slots(model: Any, vectors: list[Tensor]) -> Any:
    for vector in vectors:
        yield next((module, n, p) for module in model.modules() for n, p in module._parameters.items() if p is vector)


def test_first_gradients_are_the_same_under_create_graph() -> None:
    """Recorded or not, the reference's gradients have the same bits, half precision included."""
    for operation in OPERATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = {n: t.requires_grad_() for n, t in given(operation, dtype=dtype).items()}
            with rk.backend("reference"):
                total = sum(t.float().square().sum() for t in call_with_eps(operation, tensors))
            once = torch.autograd.grad(total, list(tensors.values()), retain_graph=True)
            recorded = torch.autograd.grad(total, list(tensors.values()), create_graph=True)
            assert all(map(torch.equal, once, recorded)), operation


def test_gradcheck_in_forward_mode() -> None:
    x, scale = torch.randn(2, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    assert gradcheck(lambda x, s: rk.edit(x, s), (x, scale), check_forward_ad=True, check_batched_grad=False)
