"""What only a GPU can show of the operations, with each backend that runs there. Run by `make test-gpu`, with all other
tests of operations on that GPU.

Skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_cases import (
    DTYPES,
    OPERATIONS,
    WITH_DROPOUT,
    Results,
    Tensors,
    arguments,
    assert_as_good_as,
    eager,
    exact,
    fused,
    moved,
    outputs_of,
    run,
    same_bits,
    stacked,
    upstream,
)
from torch import Tensor

import red_kernels as rk
from red_kernels import backends
from red_kernels.backends import choice, cuda

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")

DEVICE = "cuda"
SHAPE = (199, 769)
Trial = tuple[Tensors, tuple[Tensor, ...], dict[str, Any]]


def _trial(
    operation: str, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.bfloat16, *, edits: int | None = None,
    device: str = DEVICE, seed: int = 0,
) -> Trial:  # fmt: skip
    """Tensors, gradients from above and options of an operation, on the GPU."""
    tensors = {name: t.to(device) for name, t in arguments(operation, shape, dtype, edits=edits, seed=seed).items()}
    grads = tuple(g.to(device) for g in upstream(shape, dtype, seed=seed))
    if edits is None:
        return tensors, grads, {}
    draw = torch.Generator().manual_seed(seed)
    return tensors, grads, {"edit_ids": torch.randint(0, edits, shape[:-1], generator=draw).to(device)}


def _run(operation: str, trial: Trial) -> Results:
    return run(fused, operation, trial[0], trial[1], **trial[2])


def _held(operation: str, *trials: tuple[Trial, Results]) -> None:
    """The error of results is at most that of PyTorch's operations on the CPU and a step."""
    results = []
    for (tensors, grads, options), found in trials:
        tensors = {name: t.cpu() for name, t in tensors.items()}
        grads = tuple(g.cpu() for g in grads)
        options = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
        of_both = (run(eager, operation, tensors, grads, **options), exact(operation, tensors, grads, **options))
        results.append(({name: value.detach().cpu() for name, value in found.items()}, *of_both))
    assert_as_good_as(*(stacked(list(of)) for of in zip(*results, strict=True)))


@pytest.fixture(params=("triton", "cuda"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both backends of a GPU, in use during the test."""
    reason = rk.available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"no backend {request.param!r}: {reason}")
    with rk.backend(request.param):
        yield request.param


with_each_backend = pytest.mark.usefixtures("backend")


def test_kernels_are_chosen() -> None:
    """For what they can take, without being asked for, as the table says."""
    found = rk.available_backends()
    assert found["triton"] is None
    capability = torch.cuda.get_device_capability()
    for shape in ((3, 5), (512, 768), (1024, 8192), (512, 16384)):
        for operation in ("edit", "edit_norm", "norm_edit", "linear_edit"):
            row = choice.preferred(operation, shape[0] * shape[1], shape[1], capability)
            for dtype in DTYPES:
                chosen = backends.choose(torch.empty(shape, device=DEVICE, dtype=dtype), operation).name
                assert chosen == (row.backend if found[row.backend] is None else "triton"), (shape, operation, dtype)
    assert backends.choose(torch.ones(3, 5, device=DEVICE, dtype=torch.float64), "edit").name == "reference"


def test_the_library_was_built_for_this_gpu() -> None:
    if not cuda.usable():
        pytest.skip(f"no CUDA kernels: {cuda.load_error()}")
    assert cuda.unusable(torch.cuda.current_device()) is None


def test_tensors_elsewhere(backend: str) -> None:
    with pytest.raises(ValueError, match="x is on cpu, and these kernels run on a GPU"):
        rk.edit(torch.ones(3, 5))


def test_tests_move_tensors_as_they_lie() -> None:
    """What carries the tests' tensors to the GPU keeps strides and surroundings, and gradients come back."""
    whole = torch.arange(24.0).view(4, 6)
    for t in (whole[:, 1:5], whole[1:, ::2], whole.t(), whole[0].expand(5, 6)):
        there = moved(t, DEVICE)
        assert (there.stride(), there.storage_offset()) == (t.stride(), t.storage_offset())
        assert torch.equal(there.cpu(), t)
    leaf = torch.ones(3, requires_grad=True)
    (moved(leaf, DEVICE) * torch.tensor([1.0, 2.0, 3.0], device=DEVICE)).sum().backward()
    assert torch.equal(leaf.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_dropout_words_on_the_gpu_are_those_of_the_cpu() -> None:
    """They depend on the seed and the place only, not on the device."""
    seed = torch.tensor([0x0123456789ABCDEF])
    expected = rk.reference.philox_words(seed, 33, 130)
    assert torch.equal(rk.reference.philox_words(seed.to(DEVICE), 33, 130).cpu(), expected)


@with_each_backend
@pytest.mark.parametrize("edits", [None, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_same_bits_every_time(operation: str, dtype: torch.dtype, edits: int | None) -> None:
    """With Triton the first time as it starts a kernel, then as it is started here."""
    trial = _trial(operation, (4099, 769), dtype, edits=edits)
    first = _run(operation, trial)
    assert all(same_bits(_run(operation, trial), first) for _ in range(3))


@with_each_backend
@pytest.mark.parametrize("width", [1, 2, 13, 96, 1023, 6144, 12288, 16385, 32768, 65536])
@pytest.mark.parametrize("operation", ["edit_add", "edit_add_layer_norm", "rms_norm_edit"])
def test_every_width(operation: str, width: int) -> None:
    # Few numbers have no mean error: many trials have.
    trials = [_trial(operation, (5, width), torch.float32, seed=seed) for seed in range(32 if width < 100 else 1)]
    if width <= 2 and "norm" in operation:
        # RMSNorm of one element, LayerNorm of two, are signs, and their gradients differences of equals. An eps of the
        # elements' size leaves digits to compare.
        for _, _, options in trials:
            options["eps"] = 1.0
    _held(operation, *((trial, _run(operation, trial)) for trial in trials))


@with_each_backend
@pytest.mark.parametrize("edits", [None, 70_000])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_rows_than_a_grid_is_high(operation: str, edits: int | None) -> None:
    """And more edits: 65,535 is the largest second and third dimension of a grid."""
    trial = _trial(operation, (70_001, 40), edits=edits)
    _held(operation, (trial, _run(operation, trial)))


@with_each_backend
@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_odd_addresses(operation: str, dtype: torch.dtype, edits: int | None) -> None:
    """Every tensor one element behind where it could be read by vectors."""

    def odd(t: Tensor) -> Tensor:
        flat = t.new_empty(t.numel() + 1)[1:]
        return flat.copy_(t.reshape(-1)).view(t.shape)

    tensors, grads, options = _trial(operation, SHAPE, dtype, edits=edits)
    asking = {name: odd(t).requires_grad_() for name, t in tensors.items()}
    results = outputs_of(fused(operation, asking, **{name: odd(t) for name, t in options.items()}))
    gradients = torch.autograd.grad(results, list(asking.values()), [odd(g) for g in grads[: len(results)]])
    names = [*("y", "z")[: len(results)], *(f"d {name}" for name in asking)]
    found = dict(zip(names, (*results, *gradients), strict=True))
    _held(operation, ((tensors, grads, options), found))


@with_each_backend
@pytest.mark.parametrize(
    ("operation", "width"),
    [("edit_add", 4096), ("edit_add_layer_norm", 4096), ("edit_add_layer_norm", 32768), ("rms_norm_edit", 4096)],
)
def test_more_elements_than_32_bits_count(operation: str, width: int) -> None:
    """The last rows are those of a call of their own, and the sums over rows, of which only the last are not zero."""
    torch.cuda.empty_cache()
    rows, few, dtype = 2**31 // width + 5, 64, torch.bfloat16
    needed, free = 12 * rows * width * dtype.itemsize, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of GPU memory, and {free >> 30} are free")
    tensors, grads, _ = _trial(operation, (few, width), dtype)

    def behind_zeros(t: Tensor) -> Tensor:
        wide = torch.zeros(rows, width, dtype=dtype, device=DEVICE)
        wide[-few:] = t
        return wide

    asking = {
        name: (behind_zeros(t) if name in ("x", "residual") else t.clone()).requires_grad_()
        for name, t in tensors.items()
    }
    results = outputs_of(fused(operation, asking))
    grads = grads[: len(results)]
    gradients = torch.autograd.grad(results, list(asking.values()), [behind_zeros(g) for g in grads])
    names = [*("y", "z")[: len(results)], *(f"d {name}" for name in asking)]
    found = {
        name: value[-few:] if value.shape[0] == rows else value
        for name, value in zip(names, (*results, *gradients), strict=True)
    }
    expected = run(fused, operation, tensors, grads)
    for name, value in found.items():
        if value.shape[0] == few:
            assert torch.equal(value, expected[name]), name
    _held(operation, ((tensors, grads, {}), found))


@with_each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here")
@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_device_that_is_not_the_current_one(operation: str, edits: int | None) -> None:
    last = f"cuda:{torch.cuda.device_count() - 1}"
    expected = _run(operation, _trial(operation, edits=edits, device="cuda:0"))
    with torch.cuda.device(0):
        found = _run(operation, _trial(operation, edits=edits, device=last))
        assert torch.cuda.current_device() == 0
    for name, value in found.items():
        assert str(value.device) == last, name
        if torch.cuda.get_device_name(last) == torch.cuda.get_device_name(0):
            assert torch.equal(value.cpu(), expected[name].cpu()), name


@with_each_backend
@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_stream_that_is_not_the_default(operation: str, edits: int | None) -> None:
    """Its inputs come late on that stream: whoever reads them from another finds NaN."""
    tensors, grads, options = trial = _trial(operation, edits=edits)
    expected = _run(operation, trial)
    late = {name: torch.full_like(t, float("nan")) for name, t in tensors.items()}
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: tens of milliseconds
        for name, t in tensors.items():
            late[name].copy_(t)
        found = run(fused, operation, late, grads, **options)
    stream.synchronize()
    assert same_bits(found, expected)


@pytest.fixture
def _no_synchronisation() -> Iterator[None]:
    """What makes the host wait for the GPU is an error from here on."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@with_each_backend
@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_host_never_waits(operation: str, edits: int | None, dropout: bool) -> None:
    tensors, grads, options = _trial(operation, edits=edits)
    if dropout and operation in WITH_DROPOUT:
        options |= {"dropout_p": 0.5, "training": True}
    run(fused, operation, tensors, grads, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    run(fused, operation, tensors, grads, **options)


@with_each_backend
@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_cuda_graphs(operation: str, edits: int | None) -> None:
    """Forward and backward are captured once; on other numbers the graph gives the bits of a plain call."""
    tensors, grads, options = trial = _trial(operation, edits=edits)
    graph, found = _captured(operation, trial)
    for seed in (1, 2):
        others, other_grads, other_options = _trial(operation, edits=edits, seed=seed)
        expected = run(fused, operation, others, other_grads, **other_options)
        for t, other in zip((*tensors.values(), *grads, *options.values()),
                            (*others.values(), *other_grads, *other_options.values()), strict=True):  # fmt: skip
            t.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(found, expected)


@with_each_backend
@pytest.mark.parametrize("operation", WITH_DROPOUT)
def test_cuda_graphs_with_dropout(operation: str) -> None:
    """Each replay drops other elements, the same ones forward and backward."""
    tensors, grads, _ = _trial(operation, dtype=torch.float32)
    tensors |= {"scale": None, "bias": None, "x": torch.ones_like(tensors["x"])}
    tensors["residual"] = torch.zeros_like(tensors["x"])
    grads = (torch.zeros_like(grads[0]), torch.ones_like(grads[0])) if "norm" in operation else (torch.ones(()),)
    grads = tuple(g.to(DEVICE).expand(SHAPE) for g in grads)
    graph, found = _captured(operation, (tensors, grads, {"dropout_p": 0.5, "training": True}))
    seen = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        z = found["z"] if "norm" in operation else found["y"]
        assert torch.equal(z, found["d x"])
        seen.append((z != 0).clone())
    assert 0.4 < float(seen[0].float().mean()) < 0.6  # hundreds of standard deviations
    assert not torch.equal(*seen)


def _captured(operation: str, trial: Trial) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A graph of forward and backward, and where it puts their results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _run(operation, trial)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = _run(operation, trial)
    return graph, found


@with_each_backend
@pytest.mark.parametrize("edits", [None, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiled_by_inductor_once_for_all_numbers_of_rows(operation: str, edits: int | None) -> None:
    """Between operations of PyTorch's own, in one graph: the same bits as those around a plain call."""
    torch._dynamo.reset()

    def around(name: str, given: Tensors, **options: Any) -> tuple[Tensor, ...]:
        return tuple(t * 2 for t in outputs_of(fused(name, given | {"x": given["x"] * 2}, **options)))

    compiled = torch.compile(around, fullgraph=True)
    for rows in (64, 65, 1000, 4099):
        tensors, grads, options = _trial(operation, (rows, 768), torch.float32, edits=edits)
        expected = run(around, operation, tensors, grads, **options)
        asking = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        for t in (*(t for name, t in asking.items() if name in ("x", "residual")), *options.values()):
            torch._dynamo.mark_dynamic(t, 0)
        with torch.compiler.set_stance("default" if rows == 64 else "fail_on_recompile"):
            results = compiled(operation, asking, **options)
        found = torch.autograd.grad(results, list(asking.values()), grads[: len(results)])
        for value, other in zip((*results, *found), expected.values(), strict=True):
            assert torch.equal(value, other), rows


def test_compiled_code_chooses_as_plain_calls_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is the first to ask what GPU there is: in one graph, on both sides of a limit of the table."""
    torch._dynamo.reset()
    for kept in ("_capabilities", "_unusable"):
        monkeypatch.setattr(cuda, kept, {})
    compiled = torch.compile(rk.edit_add_layer_norm, fullgraph=True, dynamic=True)
    for rows in (64, 1000, 8192, 512):
        tensors, _, _ = _trial("edit_add_layer_norm", (rows, 1024))
        for found, expected in zip(compiled(*tensors.values()), rk.edit_add_layer_norm(*tensors.values()), strict=True):
            assert torch.equal(found, expected), rows


@with_each_backend
@pytest.mark.parametrize("autocast", DTYPES[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_autocast_leaves_the_operations_alone(operation: str, dtype: torch.dtype, autocast: torch.dtype) -> None:
    """They round once, to the dtype of what they are given: there is nothing for autocast to choose."""
    trial = _trial(operation, dtype=dtype)
    plain = _run(operation, trial)
    with torch.autocast("cuda", autocast):
        assert same_bits(_run(operation, trial), plain)
