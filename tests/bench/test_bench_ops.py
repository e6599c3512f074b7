"""The benchmark of the operations: what is compared is the same, and what is timed is what is said."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import sys
import types
from collections import Counter

import pytest
import torch
from rich.console import Console

import red_kernels as rk
from benchmarks.ops import implementations, inputs, job, kernels, operations
from benchmarks.ops import timing as clocks
from benchmarks.ops.check import differing, evaluate, exact
from benchmarks.ops.implementations import apex, eager, flash_attention, liger, quack
from benchmarks.ops.implementations.base import on_gpu
from benchmarks.ops.timing import FLOOR, PASSES, Candidate
from benchmarks.runs import Run

CPU = torch.device("cpu")
EAGER_AND_OURS = ("eager", "eager-fused", "cpu")
EVERY = pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda one: "-".join(filter(None, one.key)))


@pytest.fixture
def run():
    return Run(CPU, Console(width=250), quick=True)


@pytest.fixture(autouse=True)
def _a_small_cache(monkeypatch):
    """Fresh inputs reach beyond the cache: of tensors of a few bytes that takes a million on a large processor."""
    monkeypatch.setattr(inputs, "LEAST_CACHE_BYTES", 1 << 18)
    monkeypatch.setattr(inputs, "_last_cache", lambda: 1 << 17)


def made(operation, rows=6, width=40, dtype=torch.float32, fresh=False):
    return inputs.Inputs(operation, rows, width, dtype, fresh, CPU)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_implementations_agree(operation, dtype):
    found, left_out = job.prepared(operation, made(operation, dtype=dtype), CPU, only=EAGER_AND_OURS)
    assert list(found) == ["cpu", "eager", "eager-fused"]
    assert not left_out


@EVERY
def test_every_difference_is_found(operation):
    """A change of any result or gradient by a hundredth of one of its values."""
    given = made(operation)
    right = eager.composed(operations.Edit(), operations.Norm(), operation)
    count = operation.outputs

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, place, *tensors):
            ctx.place = place
            return tuple(t * (1.01 if at == place else 1) for at, t in enumerate(tensors))

        @staticmethod
        def backward(ctx, *gradients):
            return None, *(g * (1.01 if at == ctx.place else 1) for at, g in enumerate(gradients))

    candidate = Candidate(right, contextlib.nullcontext)
    for place in range(count):
        wrong = Candidate(lambda a, p=place: Off.apply(p, *right(a)), contextlib.nullcontext)
        assert re.search(f"result {place} differs", differing({"eager": candidate, "wrong": wrong}, given)["wrong"])
    for place, name in enumerate(("x", "residual", "scale", "bias")):
        if name == "residual" and not operation.residual:
            continue

        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, tensor):
                return tensor.clone()

            @staticmethod
            def backward(ctx, gradient):
                return gradient * 1.01

        def changed(a, at=place, function=Scaled):
            return right(a._replace(**{a._fields[at]: function.apply(a[at])}))

        wrong = Candidate(changed, contextlib.nullcontext)
        assert f"gradient of {name} differs" in differing({"eager": candidate, "wrong": wrong}, given)["wrong"]


@EVERY
def test_exact_is_the_definition(operation):
    """The definition that all are held to agrees with the package's own reference in fp64."""
    given = made(operation)
    wide = [tensor.double() for tensor in evaluate_reference(operation, given)]
    for found, expected in zip(exact(given), wide, strict=True):
        torch.testing.assert_close(found, expected)


def evaluate_reference(operation, given):
    arguments, upstream = given[0]
    double = operations.Arguments(*(t.detach().double().requires_grad_(t.requires_grad) for t in arguments))
    given.sets[0] = (double, [t.double() for t in upstream])
    try:
        function = next(one for one in implementations.implementations(CPU) if one.ours).make(operation)
        return evaluate(Candidate(function, lambda: rk.backend("reference")), given)
    finally:
        given.sets[0] = (arguments, upstream)


def test_an_implementation_that_differs_is_left_out(monkeypatch, run):
    """A peer is named and left out; where ours or eager differ, the case fails."""
    operation = operations.OPERATIONS[0]
    everyone = implementations.implementations

    def with_wrong(name):
        def found(device):
            def make(operation):
                right = eager.composed(operations.Edit(), operations.Norm(), operation)
                return lambda a: right(a._replace(scale=a.scale * 2))

            return [
                dataclasses.replace(one, make=make) if one.name == name else one
                for one in everyone(device)
                if one.name in EAGER_AND_OURS
            ]

        return found

    monkeypatch.setattr(job, "implementations", with_wrong("eager-fused"))
    found, left_out = job.prepared(operation, made(operation), CPU)
    assert "eager-fused" not in found
    assert "does not compute the same: result 0" in left_out["eager-fused"]
    monkeypatch.setattr(job, "implementations", with_wrong("cpu"))
    with pytest.raises(ArithmeticError, match="cpu: result 0"):
        job.prepared(operation, made(operation), CPU)


def test_fresh_inputs_reach_beyond_the_cache():
    operation = operations.OPERATIONS[0]
    given = made(operation, 512, 768, fresh=True)
    arguments, upstream = given[0]
    of_set = sum(t.nbytes for t in (arguments.x, arguments.residual, *upstream))
    assert of_set * len(given.sets) >= inputs.cache_bytes(CPU) >= 2 * inputs._last_cache()
    assert len({a.x.data_ptr() for a, _ in given.sets}) == len(given.sets)
    assert len(made(operation, 512, 768).sets) == 1
    assert len(made(operation, 4096, 8192, fresh=True).sets) == 2


@EVERY
def test_the_floor_copies_the_least_bytes(operation, monkeypatch):
    given = made(operation, rows=8, fresh=True)
    copies = inputs.Copies(given)
    moved = []
    plain = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: moved.append(2 * self.nbytes) or plain(self, other))
    for activations, backward in ((operation.forward, False), (operation.backward, True)):
        moved.clear()
        copies.copy(activations, 3, backward)
        assert sum(moved) == activations * given[0][0].x.nbytes


def test_on_a_gpu_a_kernel_copies_into_targets_that_rotate(monkeypatch):
    """One target would stay in the cache, and a copy that is no kernel need not go through it."""
    operation = operations.OPERATIONS[0]
    given = made(operation, rows=8, fresh=True)
    given.sets = given.sets[:3]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    copies = inputs.Copies(given)
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "copy_", None)
    moved, written = [], set()
    plain = torch.neg
    monkeypatch.setattr(torch, "neg", lambda source, out: moved.append(2 * out.nbytes) or plain(source, out=out))
    for number in range(3):
        copies.copy(operation.forward, number)
        written |= {target.data_ptr() for target in copies._targets[number]}
    assert sum(moved) == 3 * operation.forward * given[0][0].x.nbytes
    assert len(written) == 3 * len(copies._targets[0])


def test_wall_times_are_of_one_loop(monkeypatch):
    """Forward, backward and their sum, of each call the right one, in turn; by a clock that no load disturbs."""
    order, now = [], [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(clocks, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(seconds, name):
        class Slow(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, scale, bias):
                order.append(name)
                sleep(seconds)
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                sleep(3 * seconds)
                return gradient, gradient.sum(0), gradient.sum(0)

        return Candidate(lambda a: (Slow.apply(a.x, a.scale, a.bias),), contextlib.nullcontext)

    operation = operations.find("edit", "")
    given = made(operation)
    times = clocks.wall_times(
        {"a": slow(0.004, "a"), "b": slow(0.001, "b")}, given, inputs.Copies(given), seconds=0.0, least=3
    )
    # Two rounds to warm up and three measured.
    assert all(sorted(order[first : first + 2]) == ["a", "b"] for first in range(0, 10, 2))
    assert len(order) == 10
    assert list(times) == list(PASSES)
    for own in times.values():
        assert set(own) == {"a", "b", FLOOR}
    for name, seconds in (("a", 0.004), ("b", 0.001)):
        for part, expected in (("forward", seconds), ("backward", 3 * seconds), ("both", 4 * seconds)):
            found = times[part][name]
            assert [found.low, found.median, found.high] == pytest.approx([expected] * 3)


def test_everyone_follows_everyone():
    """Who always ran behind the same other one would always run in the cache that this one leaves."""
    operation = operations.find("edit", "")
    given = made(operation)
    order = []

    def noting(name):
        return Candidate(lambda a: order.append(name) or (a.x * a.scale + a.bias,), contextlib.nullcontext)

    clocks.wall_times({name: noting(name) for name in "abc"}, given, inputs.Copies(given), seconds=0.0, least=50)
    pairs = Counter(itertools.pairwise(order))
    assert min(pairs[pair] for pair in itertools.permutations("abc", 2)) >= 10


def test_nobody_gets_the_inputs_of_the_one_before():
    """Over the rounds, calls that follow each other take another set each, whoever makes them."""
    operation = operations.find("edit", "")
    given = made(operation, fresh=True)
    taken = []

    def noting(name):
        return Candidate(lambda a: taken.append((name, a.x)) or (a.x * a.scale + a.bias,), contextlib.nullcontext)

    clocks.wall_times({"a": noting("a"), "b": noting("b")}, given, inputs.Copies(given), seconds=0.0, least=3)
    measured = taken[2 * clocks.WARM_UPS :]
    assert len({x.data_ptr() for _, x in measured}) == len(measured) == 6


def test_device_times_with_a_clock_of_the_host():
    """The same way as on a GPU, where graphs are replayed; what cannot be captured is named."""
    operation = operations.OPERATIONS[0]
    given = made(operation, fresh=True)
    given.sets = given.sets[:3]
    found, _ = job.prepared(operation, given, CPU, only=EAGER_AND_OURS)
    calls = []

    def clock(of):
        for call in of:
            call()
        calls.append(len(of))
        if len(calls) == 4:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported")
        return lambda: 1e-3 * len(calls)

    times, left_out = clocks.device_times(
        found, given, inputs.Copies(given), rounds=3, clock=clock, stream=contextlib.nullcontext
    )
    assert set(calls) == {3}
    assert list(left_out) == ["eager"]
    assert "cudaErrorStreamCaptureUnsupported" in left_out["eager"]
    for own in times.values():
        assert set(own) == {"cpu", "eager-fused", FLOOR}


def test_job_writes_what_is_documented(tmp_path, run, capsys):
    settings = job.Settings(operations=("edit_add_layer_norm",), dtypes=("bf16",), widths=(40,), rows=(6,))
    file = job.run_job(settings, run, tmp_path, False)
    content = json.loads((tmp_path / "ops.json").read_text())
    assert content == json.loads(json.dumps(file.content))
    assert content["complete"]
    assert not content["failed"]
    keys = [(case["operation"], case["variant"], case["inputs"]) for case in content["cases"]]
    name = "edit_add_layer_norm"
    assert keys == [(name, "", "fresh"), (name, "post-norm", "fresh"), (name, "", "warm")]
    for case in content["cases"]:
        assert set(case["seconds"]) == set(PASSES)
        names = {"cpu", "eager", "eager-fused", "compile"}
        assert set(case["seconds"]["both"]) == names | {FLOOR}
        assert set(case["peak_bytes"]) == names
        bytes_of_one = 6 * 40 * 2
        assert case["bytes"] == (
            {"forward": 4 * bytes_of_one, "backward": 6 * bytes_of_one, "both": 10 * bytes_of_one}
            if not case["variant"]
            else {"forward": 3 * bytes_of_one, "backward": 5 * bytes_of_one, "both": 8 * bytes_of_one}
        )
        own = case["result"]["both"]["cpu"]
        medians = {peer: t["median"] for peer, t in case["seconds"]["both"].items()}
        best = min(("eager", "eager-fused", "compile"), key=medians.get)
        assert own["best_peer"] == best
        assert own["over_best_peer"] == pytest.approx(medians[best] / medians["cpu"])
        assert own["over_floor"] == pytest.approx(medians["cpu"] / medians[FLOOR])
        assert own["gigabytes_per_second"] == pytest.approx(case["bytes"]["both"] / medians["cpu"] / 1e9)
    assert {(one["operation"], one["variant"]) for one in content["host"]} == {(name, ""), (name, "post-norm")}
    assert set(content["missing"]) == {"compile-max-autotune", "liger", "quack", "flash-attention", "apex"}
    out = capsys.readouterr().out
    for missing in content["missing"]:
        assert f"not measured: {missing}: " in out


def test_memory_is_that_of_forward_and_backward():
    """Results and gradients of an eager edit in fp32, and the product that is between them."""
    operation = operations.find("edit", "")
    given = made(operation, rows=64, width=256)
    found, _ = job.prepared(operation, given, CPU, only=("eager", "cpu"))
    one = 64 * 256 * 4
    memory = job._memory(found, given, CPU)
    assert memory["cpu"] >= 2 * one
    assert memory["eager"] > memory["cpu"]


def test_order_of_the_cases():
    """The half precision before fp32 and fresh before warm, and never more than fits."""
    for device in ("cpu", "cuda"):
        found = job.cases(job.Settings(), Run(torch.device(device), Console()))
        keys = [(case["inputs"] == "warm", case["dtype"] == "fp32") for case in found]
        assert keys == sorted(keys)
        assert len({tuple(case.items()) for case in found}) == len(found)
        assert all(case["width"] * case["rows"] <= (17_000_000 if device == "cpu" else 135_000_000) for case in found)
        assert {case["operation"] for case in found} == set(operations.NAMES)


def test_sizes_by_elements(run):
    settings = job.Settings(operations=("edit",), dtypes=("bf16",), widths=(64, 240), elements=(1024, 2048))
    sizes = [(case["width"], case["rows"]) for case in job.cases(settings, run)]
    assert sizes == [(64, 16), (240, 4), (64, 32), (240, 8)]
    with pytest.raises(ValueError, match="elements: got 100, less than one row of the width 768"):
        job.cases(job.Settings(widths=(768,), elements=(100,)), run)


def test_some_implementations_only(tmp_path, run):
    """Eager PyTorch is what they are compared with, and it is not timed."""
    settings = job.Settings(
        operations=("edit",), dtypes=("bf16",), widths=(40,), rows=(6,), implementations=("cpu", "liger"),
        peak_memory=False, kernels=True,
    )  # fmt: skip
    content = job.run_job(settings, run, tmp_path, False).content
    (case,) = content["cases"]
    assert set(case["seconds"]["both"]) == {"cpu", FLOOR}
    assert case["peak_bytes"] == {}
    assert case["result"]["both"]["cpu"]["best_peer"] is None
    assert "kernels" not in case  # a CPU starts none
    assert "host" not in content
    assert content["complete"]
    with pytest.raises(
        ValueError, match="implementations: none of liger, apex can be measured here: its kernels run on"
    ):
        job.run_job(job.Settings(implementations=("liger", "apex")), run, tmp_path / "none", False)


def test_kernels_that_were_started():
    """Those of the GPU alone, in the order of their starts; a profiler that fails is named and stops nothing."""

    def event(name, start, kind=kernels.DeviceType.CUDA):
        return types.SimpleNamespace(name=name, device_type=kind, time_range=types.SimpleNamespace(start=start))

    events = [event("b" * 500, 3), event("a", 1), event("aten::mul", 0, kernels.DeviceType.CPU), event("a", 4)]
    events.append(event("Memcpy DtoD (Device -> Device)", 2))
    assert kernels.names_of(events) == ["a", "b" * kernels.LONGEST]
    given = made(operations.OPERATIONS[0])
    found, _ = job.prepared(operations.OPERATIONS[0], given, CPU, only=("eager",))
    profile = contextlib.nullcontext(types.SimpleNamespace(events=lambda: events))
    assert kernels.started(found, given, lambda: profile)["eager"] == ["a", "b" * kernels.LONGEST]

    def broken():
        raise RuntimeError("CUPTI is not there")

    assert "CUPTI is not there" in kernels.started(found, given, broken)["eager"][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operations": ("norm",)}, "operations: got 'norm', expected some of edit_add_rms_norm, "),
        ({"dtypes": ("fp64",)}, "dtypes: got 'fp64', expected some of fp32, bf16, fp16"),
        ({"inputs": ("cold",)}, "inputs: got 'cold', expected some of fresh, warm"),
        ({"widths": (0,)}, "widths: got 0, expected positive numbers"),
        ({"rows": ()}, "rows: got nothing, expected one value or more"),
        ({"seconds": -1.0}, "seconds: got -1.0, expected 0 or more"),
        ({"elements": (0,)}, "elements: got 0, expected positive numbers"),
        ({"elements": (64,), "rows": (1,)}, "rows and elements: got both, expected one of them at most"),
        ({"implementations": ("numpy",)}, "implementations: got 'numpy', expected some of cpu, eager, "),
        ({"implementations": ()}, "implementations: got nothing, expected one value or more"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        job.Settings(**settings)


def test_too_large_for_the_device(run):
    with pytest.raises(ValueError, match="every pair exceeds the 17,000,000 elements"):
        job.cases(job.Settings(widths=(100_000,), rows=(100_000,)), run)


class _Stand:
    """Stands for a package with kernels for GPUs, with the calls that its documentation names."""

    def __init__(self):
        self.calls = []

    def _norm(self, x, weight, bias, eps, rms):
        norm = torch.nn.functional.rms_norm if rms else torch.nn.functional.layer_norm
        return norm(x, x.shape[-1:], weight, eps=eps) if rms else norm(x, x.shape[-1:], weight, bias, eps)

    def liger_layer_norm(self, X, W, B, eps):
        return self._norm(X, W, B, eps, False)

    def liger_rms_norm(self, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert not in_place
        return self._norm(X, W, None, eps, True)

    def liger_fused_add_rms_norm(self, X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place
        return self._norm(X + R, W, None, eps, True), X + R

    def rmsnorm(
        self, x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False
    ):
        z = x if residual is None else x + residual
        y = self._norm(z, weight, None, eps, True)
        return (y, z) if prenorm else y

    def layer_norm_fn(self, x, weight, bias, residual=None, eps=1e-6, prenorm=False, is_rms_norm=False):
        z = x if residual is None else x + residual
        y = self._norm(z, weight, bias, eps, is_rms_norm)
        return (y, z) if prenorm else y

    def fused_layer_norm_affine(self, input, weight, bias, normalized_shape, eps=1e-6):
        return self._norm(input, weight, bias, eps, False)

    def fused_rms_norm_affine(self, input, weight, normalized_shape, eps=1e-6):
        return self._norm(input, weight, None, eps, True)


@EVERY
@pytest.mark.parametrize("peer", [liger, quack, flash_attention, apex], ids=lambda file: file.__name__.split(".")[-1])
def test_peers_with_kernels_for_gpus(peer, operation):
    """With a stand-in for the package: what the peer's file makes of it is the operation."""
    function = peer._make(_Stand(), operation)
    if isinstance(function, str):
        assert not operation.norm or (peer is quack and operation.norm == "layer")
        return
    given = made(operation)
    right = Candidate(eager.composed(operations.Edit(), operations.Norm(), operation), contextlib.nullcontext)
    assert not differing({"eager": right, "peer": Candidate(function, contextlib.nullcontext)}, given)


def test_liger_is_called_as_it_is():
    """The functions of the version that is installed take what the peer's file gives them."""
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    import inspect

    for name in ("liger_layer_norm", "liger_rms_norm", "liger_fused_add_rms_norm"):
        own = inspect.signature(getattr(functional, name)).parameters
        assert (
            list(own)[: len(inspect.signature(getattr(_Stand(), name)).parameters)]
            == list(inspect.signature(getattr(_Stand(), name)).parameters)[: len(own)]
        )


def test_reasons_of_missing_packages(monkeypatch):
    gpu = torch.device("cuda")
    assert on_gpu(CPU, "quack-kernels", "quack.rmsnorm")[1] == "its kernels run only on a GPU"
    assert on_gpu(gpu, "quack-kernels", "no_such_package.rmsnorm")[1] == "not installed: pip install quack-kernels"
    broken = types.ModuleType("broken_package")
    monkeypatch.setitem(sys.modules, "broken_package", broken)
    assert "cannot be imported" in on_gpu(gpu, "broken", "broken_package.part")[1]
