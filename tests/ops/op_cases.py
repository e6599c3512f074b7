"""The operations as tests see them: their tensors, the fused call, and the composition a user would write.

Tests make their tensors on the CPU. For an implementation that runs on a GPU, :func:`call` (and so ``fused`` and
``run``) moves them there as they lie in memory, and results and gradients back.

The variable RED_KERNELS_TEST_ON, a backend's name, leaves only that implementation, and RED_KERNELS_TEST_ALL=1 has
every case run, where else a part does; see ``sampling.py``. The CUDA kernels run on CPU tensors
where RED_KERNELS_CUDA_EMULATED is the path of their library for the emulator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import red_kernels as rk
from red_kernels import backends
from red_kernels.backends import Backend, cuda

Tensors = dict[str, Any]  # tensors, and None for what is absent
Results = dict[str, Tensor]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
ACTIVATIONS = ("x", "residual")

# Each operation's tensors, in the order of its arguments.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "edit": ("x", "scale", "bias"),
    "edit_add": ("x", "residual", "scale", "bias"),
    "edit_add_rms_norm": ("x", "residual", "scale", "bias", "weight"),
    "edit_add_layer_norm": ("x", "residual", "scale", "bias", "weight", "norm_bias"),
    "rms_norm_edit": ("x", "weight", "scale", "bias"),
    "layer_norm_edit": ("x", "weight", "norm_bias", "scale", "bias"),
}
OPERATIONS = tuple(ARGUMENTS)
WITH_DROPOUT = OPERATIONS[1:4]
WITH_NORM_BEHIND = OPERATIONS[2:4]
WITH_WEIGHT_OFFSET = ("edit_add_rms_norm", "rms_norm_edit")
EPS = 1e-5


# Triton's interpreter runs the kernels on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = cuda.EMULATED  # and these the CUDA kernels
TEST_ON = os.environ.get("RED_KERNELS_TEST_ON") or None
TEST_ALL = os.environ.get("RED_KERNELS_TEST_ALL") == "1"


def device_of(backend: str | None) -> str:
    """Where the tensors of a backend are."""
    return "cpu" if backend is None else backends.by_name(backend).device or "cpu"


@dataclass(frozen=True)
class Implementation:
    """A backend, and one of the ways in which it can run, such as an instruction set."""

    backend: str
    variant: str | None = None

    @property
    def device(self) -> str:
        return device_of(self.backend)

    @property
    def ours(self) -> bool:
        """Whether it is made of kernels of this project, which fix the order of every sum."""
        return self.backend != "reference"

    def __str__(self) -> str:
        return self.backend if self.variant is None else f"{self.backend}-{self.variant}"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with rk.backend(self.backend):
            if self.variant is None:
                yield
            else:
                with backends.by_name(self.backend).use(self.variant):
                    yield


def implementations(record: Backend) -> tuple[Implementation, ...]:
    """All that there is of a backend here."""
    if record.missing() is not None:
        return ()
    return tuple(Implementation(record.name, variant) for variant in record.variants() or (None,))


COMPILED = implementations(backends.by_name("cpu"))
CUDA = implementations(backends.by_name("cuda"))
TRITON = implementations(backends.by_name("triton"))
IMPLEMENTATIONS = tuple(
    implementation
    for record in reversed(backends.records())
    for implementation in implementations(record)
    if TEST_ON in (None, record.name)
)
if not IMPLEMENTATIONS:
    raise ValueError(
        f"RED_KERNELS_TEST_ON is {TEST_ON!r}, expected a backend that can be used: {rk.available_backends()}"
    )


def arguments(
    operation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    edits: int | None = None,
    mean: float = 0.0,
    norms: torch.dtype | None = None,
    vectors: torch.dtype = torch.float32,
    seed: int = 0,
) -> Tensors:
    """Random tensors of an operation: norm weights in the activations' dtype, edit vectors far from the identity.

    ``mean`` is that of the tensor whose mean reaches the norm.
    """
    draw = torch.Generator().manual_seed(seed)
    d = shape[-1]
    streaming = "residual" if "residual" in ARGUMENTS[operation] else "x"  # whose mean reaches the norm
    found: Tensors = {}
    for name in ARGUMENTS[operation]:
        if name in ACTIVATIONS:
            found[name] = (torch.randn(shape, generator=draw) + (mean if name == streaming else 0.0)).to(dtype)
        elif name in ("scale", "bias"):
            size = (d,) if edits is None else (edits, d)
            found[name] = (torch.randn(size, generator=draw) + (0.5 if name == "scale" else 0.0)).to(vectors)
        else:
            found[name] = (torch.randn(d, generator=draw) * 0.5 + (name == "weight")).to(norms or dtype)
    return found


class _Moved(torch.autograd.Function):
    """A tensor on another device, with its strides, its place in its storage, and all that lies around it there."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, device: str) -> Tensor:
        ctx.home = t.device.type
        whole = t.new_empty(0).set_(t.untyped_storage()).to(device)
        return whole.new_empty(0).set_(whole.untyped_storage(), t.storage_offset(), t.size(), t.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _Moved.apply(grads[0], ctx.home), None


def moved(value: Any, device: str) -> Any:
    """A tensor on another device, laid out as it was, with gradients flowing back; anything else as it is."""
    return _Moved.apply(value, device) if isinstance(value, Tensor) and value.device.type != device else value


def call(function: Callable[..., Any], *values: Any, **options: Any) -> Any:
    """Call an operation with CPU tensors on the device of the backend that was asked for, the results back on the CPU.

    Tensors that are elsewhere are used where they are.
    """
    device = device_of(backends.forced_backend())
    tensors = [value for value in (*values, *options.values()) if isinstance(value, Tensor)]
    if device == "cpu" or any(t.device.type != "cpu" for t in tensors):
        return function(*values, **options)
    found = function(
        *(moved(value, device) for value in values), **{name: moved(value, device) for name, value in options.items()}
    )
    return tuple(moved(t, "cpu") for t in found) if isinstance(found, tuple) else moved(found, "cpu")


def fused(operation: str, tensors: Tensors, **options: Any) -> Any:
    """The public operation."""
    values = [tensors[name] for name in ARGUMENTS[operation]]
    if "norm" in operation:
        values.append(options.pop("eps", EPS))
    return call(getattr(rk, operation), *values, **options)


def eager(
    operation: str,
    tensors: Tensors,
    *,
    edit_ids: Tensor | None = None,
    weight_offset: float = 0.0,
    eps: float = EPS,
    need_z: bool = True,
    z_as: Tensor | None = None,
    factor: Tensor | None = None,
) -> Any:
    """The same in PyTorch's own operations, each rounding to the activations' dtype.

    With ``z_as`` the norm behind an edit goes on from this value of ``z``: as it was rounded elsewhere.
    ``factor`` is the mask of a dropout.
    """
    x = tensors["x"]
    assert x is not None

    def edited(h: Tensor) -> Tensor:
        scale, bias = tensors["scale"], tensors["bias"]
        if scale is not None:
            h = h * (scale if edit_ids is None else scale[edit_ids])
        if bias is not None:
            h = h + (bias if edit_ids is None else bias[edit_ids])
        return h.to(x.dtype)

    def normed(h: Tensor) -> Tensor:
        weight = tensors["weight"]
        if weight is not None and weight_offset:
            weight = weight + weight_offset
        if "layer_norm" in operation:
            return F.layer_norm(h, h.shape[-1:], weight, tensors["norm_bias"], eps)
        return F.rms_norm(h, h.shape[-1:], weight, eps)

    if operation.endswith("norm_edit"):
        return edited(normed(x))
    z = edited(x)
    if factor is not None:
        z = z * factor.to(z.dtype)
    if tensors.get("residual") is not None:
        z = tensors["residual"] + z
    if z_as is not None:
        z = z + (z_as.to(z.dtype) - z).detach()
    if operation.endswith("norm"):
        return normed(z), z if need_z else None
    return z


Operation = Callable[..., Any]


def outputs_of(result: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """The tensors of a result, as a tuple."""
    return tuple(t for t in (result if isinstance(result, tuple) else (result,)) if t is not None)


def leaves(tensors: Tensors, dtype: torch.dtype | None = None, device: str | None = None) -> Tensors:
    """Copies that ask for gradients, in another dtype or on another device if one is given."""
    return {
        name: None if t is None else t.detach().to(device or t.device, dtype or t.dtype, copy=True).requires_grad_()
        for name, t in tensors.items()
    }


def upstream(shape: tuple[int, ...], dtype: torch.dtype, *, number: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Gradients that come from behind the operation, one for each of its results."""
    draw = torch.Generator().manual_seed(99 + seed)
    return tuple(torch.randn(shape, generator=draw).to(dtype) for _ in range(number))


def run(operation: Operation, name: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> Results:
    """Results and gradients of all tensors, by name: ``y``, ``z``, ``d x``, ``d scale``, ..."""
    asking = leaves(tensors)
    results = outputs_of(operation(name, asking, **options))
    wanted = {key: t for key, t in asking.items() if t is not None}
    found = torch.autograd.grad(results, list(wanted.values()), grads[: len(results)])
    values = dict(zip(("y", "z"), (t.detach() for t in results), strict=False))
    return values | {f"d {key}": gradient for key, gradient in zip(wanted, found, strict=True)}


def truth(name: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> Results:
    """The same from the reference in fp64, which ``gradcheck`` holds to the derivatives."""
    with rk.backend("reference"):
        return run(fused, name, widened(tensors), tuple(g.double() for g in grads), **options)


def exact(operation: str, tensors: Tensors, grads: tuple[Tensor, ...], **options: Any) -> Results:
    """The composition in fp64."""
    return run(eager, operation, widened(tensors), tuple(g.double() for g in grads), **options)


def widened(tensors: Tensors) -> Tensors:
    """The same numbers in fp64."""
    return {name: None if t is None else t.double() for name, t in tensors.items()}


def from_its_z(name: str, tensors: Tensors, grads: tuple[Tensor, ...], z: Tensor, **options: Any) -> Results:
    """The results in fp64 that follow from a ``z`` that was rounded."""
    return run(eager, name, widened(tensors), tuple(g.double() for g in grads), z_as=z, **options)


def step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a dtype at each of ``values``."""
    info = torch.finfo(dtype)
    return 2.0 ** torch.floor(torch.log2(values.double().abs().clamp(min=info.smallest_normal))) * info.eps


def assert_as_good_as(found: Results, peer: Results, expected: Results, of_peer: Results | None = None) -> None:
    """The error is at most the peer's and a rounding step of the result's dtype: the root mean square of all elements.

    The largest error of one element is a matter of luck on both sides; it may be twice the peer's, as in
    flash-attention's tests, and a step. ``of_peer`` is what the peer is measured by, where that differs.
    """
    of_peer = expected if of_peer is None else of_peer
    assert found.keys() == peer.keys() == expected.keys() == of_peer.keys()
    for name, value in found.items():
        assert value.dtype == peer[name].dtype, f"{name} has {value.dtype}"
        assert value.shape == expected[name].shape, f"{name} has shape {tuple(value.shape)}"
        if not value.numel():
            continue
        steps = step(expected[name], value.dtype)
        error, peers = value.double() - expected[name], peer[name].double() - of_peer[name]
        assert _mean(error) <= _mean(peers) + _mean(steps), f"{name}: {_mean(error)}, peer {_mean(peers)}"
        largest, largest_of_peer = float(error.abs().max()), float(peers.abs().max())
        assert largest <= 2 * largest_of_peer + float(steps.max()), f"{name}: {largest}, peer {largest_of_peer}"


def _mean(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def kept_and_not(
    operation: str, tensors: Tensors, dy: Tensor, asking: tuple[str, ...] | None = None, **options: Any
) -> tuple[Results, Results]:
    """``y`` and the gradients of what asks for them (without: of all), that of ``z`` absent: with ``z`` and without."""
    found = []
    for need_z in (True, False):
        torch.manual_seed(3)  # of the dropout
        given = {
            name: None if t is None else t.detach().requires_grad_(asking is None or name in asking)
            for name, t in tensors.items()
        }
        y, z = fused(operation, given, need_z=need_z, **options)
        assert (z is not None) == need_z
        wanted = {name: t for name, t in given.items() if t is not None and t.requires_grad}
        gradients = torch.autograd.grad(y, list(wanted.values()), dy) if wanted else ()
        found.append({"y": y.detach()} | {f"d {name}": g for name, g in zip(wanted, gradients, strict=True)})
    return found[0], found[1]


def drawn_factor(number: int, p: float, shape: tuple[int, ...]) -> Tensor:
    """The dropout factors of the first operation that is called next: the generators are seeded with ``number``."""
    torch.manual_seed(number)
    seed = torch.randint(0, 2**62, (1,), device=device_of(backends.forced_backend())).cpu()
    torch.manual_seed(number)
    return rk.reference.dropout_factor(seed, p, torch.ones(shape).double())


def stacked(trials: list[Results]) -> Results:
    """The results of several trials as one."""
    return {name: torch.stack([trial[name] for trial in trials]) for name in trials[0]}


def same_bits(a: Results, b: Results) -> bool:
    """Whether all results are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)
