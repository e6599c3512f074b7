"""The jobs of training steps: what they write, what they check before they time, and that memory is exact."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re

import model_zoo as zoo
import pytest
import torch
from rich.console import Console
from torch import nn

import red_kernels as rk
from benchmarks import memory, methods, runs
from benchmarks.step import check, compare, growth, job, models
from red_kernels.backends import cpu

CPU = torch.device("cpu")
EAGER = tuple(name for name in methods.STEP_METHODS if not name.endswith("-compile"))
CASE = ("tiny-decoder", "fp32", 2, 8)


@pytest.fixture
def run() -> runs.Run:
    return runs.Run(CPU, Console(file=io.StringIO(), width=160), quick=True, progress=Console(file=io.StringIO()))


def shown(run: runs.Run) -> str:
    return run.console.file.getvalue()


def test_the_job_writes_what_it_measured(tmp_path, run):
    job.run_job(job.Settings(methods=("red", "naive", "red-compile", "lora-qv", "full")), run, tmp_path, False)
    content = json.loads((tmp_path / "step.json").read_text())
    assert (content["job"], content["quick"], content["complete"], content["failed"]) == ("step", True, True, [])
    assert content["planned"] == len(content["cases"]) == len(job.QUICK)
    assert content["missing"] == {}
    for case, planned in zip(content["cases"], job.QUICK, strict=True):
        model, dtype, *sizes = planned
        assert tuple(case[name] for name in job.KEYS) == (model, run.resolved(dtype), *sizes)
        measured = ["red", "naive", "lora-qv", "full"]
        assert list(case["seconds"]) == list(case["peak_bytes"]) == list(case["trainable"]) == measured
        assert case["left_out"] == {"red-compile": "a quick run compiles nothing"}
        assert all(0 < time["low"] <= time["median"] <= time["high"] for time in case["seconds"].values())
        assert case["tokens"] == planned[2] * planned[3]
        assert case["trainable"]["full"] == case["parameters"]
        assert case["trainable"]["red"] == case["trainable"]["naive"] == 2 * 2 * 64
    assert "a quick run compiles nothing" in shown(run)
    assert "tiny-encoder, 88,002 parameters, fp32, 2 x 16 tokens" in shown(run)


def test_resuming_measures_only_what_is_left(tmp_path, run, monkeypatch):
    other = ("tiny-decoder", "fp32", 1, 4)
    settings = job.Settings(cases=(CASE, other), methods=("red",))
    job.run_job(settings, run, tmp_path, False)
    content = json.loads((tmp_path / "step.json").read_text())
    before = content["cases"]
    (tmp_path / "step.json").write_text(json.dumps(content | {"cases": before[:1], "complete": False}))
    asked = []
    measure = job.measure
    monkeypatch.setattr(job, "measure", lambda case, *rest: asked.append(case) or measure(case, *rest))
    file = job.run_job(settings, run, tmp_path, True)
    assert [tuple(case.values()) for case in asked] == [other]
    assert file.cases[0] == before[0]
    assert len(file.cases) == 2


def test_growth_writes_every_axis(tmp_path, run):
    growth.run_job(growth.Settings(), run, tmp_path, False)
    content = json.loads((tmp_path / "growth.json").read_text())
    points = {(case["axis"], case["value"]): case for case in content["cases"]}
    assert list(points) == [(axis, value) for axis, values in growth.QUICK.axes.items() for value in values]
    assert points["layers", 2]["layers"] == 2
    assert points["tokens", 32]["tokens"] == points["tokens", 32]["batch"] * points["tokens", 32]["length"] == 32
    assert points["edits", 4]["edits"] == 4
    assert points["edits", 4]["left_out"] == {"lora-all": growth.ONE_FOR_ALL}
    counts = {edits: points["edits", edits]["trainable"] for edits in (1, 4)}
    assert counts[4] == {name: 4 * counts[1][name] for name in ("frozen-fused", "red", "naive")}
    assert list(points["layers", 1]["seconds"]) == list(growth.METHODS_HERE)
    one, two = (points["layers", layers]["peak_bytes"] for layers in (1, 2))
    assert all(two[name] > one[name] for name in growth.METHODS_HERE)
    assert growth.ONE_FOR_ALL[:20] in shown(run)


def test_edits_by_row_are_those_of_their_rows():
    """Vectors of one edit only move the rows that use it, by both ways."""
    shape = models.llama(32, 64, 96, 2, 1, 64)
    base = models.build(shape, "fp32", CPU)
    batch = models.batch_of(base, shape.task, 4, 3, CPU)
    before = base(**batch).logits
    for made in (
        growth.by_rows(methods.sister(base), 4, 2),
        growth.naive_by_rows(methods.sister(base), torch.float32, 4, 2),
    ):
        assert made.trainable == 2 * 2 * 2 * 64
        values = check._flat(made.trained)
        of_second = torch.zeros(values.shape)
        of_second.view(2, 2, 2, 64)[:, :, 1] = 0.5  # site, part, edit
        check._fill(made.trained, values + of_second)
        with made.active(), torch.no_grad():
            after = made.model(**batch).logits
        moved = (after - before).abs().amax((1, 2)) > 1e-3
        assert moved.tolist() == [False, True, False, True]


def test_memory_is_exact():
    def call():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 18, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 19, dtype=torch.uint8)
        return second, third

    assert memory.peak_allocated(call, CPU) == (1 << 20) + (1 << 18)
    kept = torch.zeros(1000)
    assert memory.peak_allocated(lambda: kept.zero_(), CPU) == 0


@pytest.mark.skipif(cpu.load_error() is not None, reason="the CPU kernels are not built")
@pytest.mark.parametrize("rows", [64, 4096])  # the large outputs come from the kernels' own pool
def test_the_memory_of_our_operations_is_counted(rows):
    width, vectors = 256, 2 * 256 * 4
    x = torch.randn(rows, width, requires_grad=True)
    scale, bias = (torch.ones(width, requires_grad=True) for _ in range(2))
    upstream = torch.randn(rows, width)
    activation = rows * width * 4

    def forward():
        return rk.edit(x, scale, bias)

    def both():
        y = forward()
        return y, torch.autograd.grad(y, (x, scale, bias), upstream)

    with rk.backend("cpu"):
        assert memory.peak_allocated(forward, CPU) == activation
        lines = memory.peak_allocated(both, CPU) - 2 * activation - vectors
    assert 0 < lines <= activation // 8  # of the column sums


def test_the_memory_of_a_step_is_what_it_has_to_keep():
    """Each exp keeps its output for the backward pass, in which the first gradient comes on top of all of them."""

    class Tower(nn.Module):
        def __init__(self, floors):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))
            self.floors = floors

        def forward(self, ids):
            class Output:
                loss = self.weight

            for _ in range(self.floors):
                Output.loss = Output.loss.exp()
            Output.loss = Output.loss.sum()
            return Output

    size, scalar = 4000, 4
    for floors in (1, 3, 7):
        model = Tower(floors)
        step = compare.Step(methods.Prepared(model, [model.weight]), {"ids": torch.ones(1)})
        step()
        # the loss and its gradient are scalars
        assert memory.peak_allocated(step, CPU) == (floors + 1) * size + 2 * scalar
        # the optimizer keeps two moments and the count of its steps
        assert memory.held_bytes(step.added(), model.parameters()) == 2 * size + scalar
        assert memory.held_bytes(step.added(), []) == 3 * size + scalar
    part = model.weight.detach()[5:]
    assert memory.held_bytes([part, torch.zeros(3), torch.zeros(3)], [model.weight]) == 24


def test_steps_leave_shared_weights_as_they_are_to_the_bit():
    base = zoo.tiny("llama")
    before = [own.detach().clone() for own in base.parameters()]
    batch = zoo.inputs("llama")
    for name in ("full", "bitfit", "red"):
        step = compare.Step(methods.prepare(name, methods.sister(base)), batch)
        step()
        step()
    assert all(torch.equal(own, former) for own, former in zip(base.parameters(), before, strict=True))


def test_each_round_has_an_order_of_its_own():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = compare.timed(steps, CPU, seconds=0.0, rounds=30)
    rounds = ["".join(calls[first : first + 3]) for first in range(0, 90, 3)]
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) == 6
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys("abc", 30)
    assert len(compare.timed({"a": lambda: None}, CPU, seconds=1e9, rounds=2, most=4)["a"]) == 4


def test_a_step_is_held_to_the_floor_of_its_own_round():
    """The machine is ten times slower in one round: neither the ratio's median nor its quartiles move."""
    times = {"frozen-fused": [1.0, 1.0, 10.0, 1.0, 1.0], "red": [1.01, 1.01, 10.1, 1.01, 1.01]}
    found = compare.over_floor(times)
    assert [found["red"].median, found["red"].low, found["red"].high] == pytest.approx([1.01] * 3)
    assert found["frozen-fused"].median == 1.0
    assert compare.over_floor({"red": [1.0, 2.0]}) == {}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_methods_compute_the_same(kind, dtype):
    base = zoo.tiny(kind).to(dtype).requires_grad_(False)
    batch = zoo.inputs(kind, batch=8, length=16)
    prepared = {name: methods.prepare(name, methods.sister(base), batches=[batch]) for name in EAGER}
    check.check(base, prepared, job.naive, batch)
    assert all(own.grad is None for made in prepared.values() for own in made.trained)
    start = check._flat(prepared["red"].trained)
    assert torch.equal(start, check._flat(prepared["naive"].trained))
    assert set(start.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.long), 0.1])
def test_compiled_methods_are_compared_like_the_others(dropout, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    names = ("red", "red-compile", "naive", "naive-compile")
    base = zoo.tiny("gpt2", dropout=dropout, n_layer=1).requires_grad_(False)
    makers = {name: functools.partial(job._make, name, base, zoo.inputs("gpt2")) for name in names}
    ran = []
    right = check._run
    monkeypatch.setattr(
        check, "_run", lambda made, *rest, **options: ran.append((made, *rest)) or right(made, *rest, **options)
    )
    found = compare.compare(base, makers, job.naive, zoo.inputs("gpt2"), CPU, 0.0, 2)
    assert found["left_out"] == {}
    assert list(found["seconds"]) == list(names)
    compiled = [one[2:4] for one in ran if isinstance(one[0].model, torch._dynamo.OptimizedModule)]
    # at the start and edited; with dropout neither the gradients nor the mode of training would be those of a check
    assert compiled == [(not dropout, not dropout)] * 4


@pytest.mark.parametrize("tokens", [4096, 16])
def test_a_method_that_computes_something_else_is_found(tokens, monkeypatch):
    monkeypatch.setattr(check, "TOKENS", tokens)  # fewer than there are: a part of the rows is checked
    base = zoo.tiny("llama").requires_grad_(False)
    batch = zoo.inputs("llama", batch=4, length=8)

    def hold(**prepared):
        check.check(base, prepared, job.naive, batch)

    lora = methods.prepare("lora-qv", methods.sister(base))
    hold(lora=lora)
    with torch.no_grad():
        next(own for own in lora.trained if not own.any()).fill_(1e-2)
    with pytest.raises(ArithmeticError, match="lora, at its start: the logits are off by"):
        hold(lora=lora)

    red = methods.prepare("red", methods.sister(base))
    hold(red=red, naive=methods.prepare("naive", methods.sister(base)))
    red.trained[0].register_hook(lambda gradient: gradient * 1.01)
    with pytest.raises(ArithmeticError, match="red: the gradients of all scales are off by"):
        hold(red=red)

    red = methods.prepare("red", methods.sister(base))
    red.trained.reverse()  # the random vectors of others
    with pytest.raises(ArithmeticError, match=r"red, edited: the logits are off by"):
        hold(red=red)


def test_a_classifier_s_logits_are_held_by_what_goes_into_its_head():
    base = zoo.tiny("roberta").requires_grad_(False)
    batch = zoo.inputs("roberta", batch=2)
    other = methods.sister(base)
    made = {"full": methods.prepare("full", other)}
    check.check(base, made, job.naive, batch)
    other.classifier.out_proj.bias = nn.Parameter(other.classifier.out_proj.bias + 1e-4)
    with pytest.raises(ArithmeticError, match="full, at its start: the logits"):
        check.check(base, made, job.naive, batch)


def test_dropout_is_found_wherever_it_is():
    assert not check._has_dropout(zoo.tiny("llama"))
    assert check._has_dropout(zoo.tiny("llama", attention_dropout=0.1))
    assert not check._has_dropout(zoo.tiny("gpt2"))
    assert check._has_dropout(zoo.tiny("gpt2", attn_pdrop=0.1))
    assert check._has_dropout(zoo.tiny("t5", dropout=0.1))
    assert check._has_dropout(nn.Sequential(nn.Dropout(0.1)))
    assert not check._has_dropout(nn.Sequential(nn.Dropout(0.0)))


def test_methods_that_fail_or_are_missing_are_named(run, monkeypatch):
    def broken(model):
        raise RuntimeError("no such layer\nand more")

    replaced = dataclasses.replace(methods.METHODS["ia3"], apply=broken)
    monkeypatch.setitem(methods.METHODS, "ia3", replaced)
    absent = dataclasses.replace(methods.METHODS["lora-qv"], needs="a_package_that_is_not_there")
    monkeypatch.setitem(methods.METHODS, "lora-qv", absent)
    case = dict(zip(job.KEYS, CASE, strict=True))
    found = job.measure(case, job.Settings(methods=("red", "ia3", "lora-qv")), run)
    assert list(found["seconds"]) == ["red"]
    assert found["left_out"].keys() == {"ia3", "lora-qv"}
    assert found["left_out"]["ia3"] == "RuntimeError: no such layer and more"
    assert "pip install a_package_that_is_not_there" in found["left_out"]["lora-qv"]
    assert job.missing(run) == {"lora-qv": found["left_out"]["lora-qv"]}


def test_published_sizes():
    """The parameters of the published models, without their heads where these differ."""
    expected = {
        "RoBERTa-base": 124_647_170,  # with the classification head of two labels
        "RoBERTa-large": 355_361_794,
        "GPT-2-medium": 354_823_168,
        "T5-base": 222_903_552,
        "Llama-2-7B": 6_738_415_616,
    }
    for name, count in expected.items():
        made = models.build(models.find(name), "bf16", torch.device("meta"))
        assert sum(own.numel() for own in made.parameters()) == count, name
        assert {own.dtype for own in made.parameters()} == {torch.bfloat16}
    assert {case[0] for case in job.ON_GPU} == expected.keys()
    assert {batch * length for name, _, batch, length in job.ON_GPU if name == "Llama-2-7B"} == {4096, 8192, 16384}
    assert {(name, batch * length) for name, _, batch, length in job.ON_CPU} == {
        ("SmolLM2-135M", 1024),
        ("MiniLM-L6", 4096),
    }


def test_batches():
    tiny = zoo.tiny("t5")
    batch = models.batch_of(tiny, "seq2seq", 3, 8, CPU)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, 8),
        "attention_mask": (3, 8),
        "labels": (3, 2),
    }
    assert models.batch_of(zoo.tiny("roberta"), "classification", 3, 8, CPU)["labels"].shape == (3,)
    with pytest.raises(ValueError, match="length: got 0"):
        models.batch_of(tiny, "seq2seq", 3, 0, CPU)


SIZES = growth.QUICK


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: job.Settings(cases=(("GPT-9", "fp32", 1, 8),)), "model: got 'GPT-9', expected one of"),
        (lambda: job.Settings(cases=(("T5-base", "fp8", 1, 8),)), "cases: got the dtype 'fp8'"),
        (lambda: job.Settings(cases=(("T5-base", "bf16", 0, 8),)), "cases: got a batch of 0 for T5-base"),
        (lambda: job.Settings(cases=(("T5-base", "bf16", 1, 513),)), "cases: got 513 tokens for T5-base"),
        (lambda: job.Settings(methods=("linear-probe",)), "methods: got 'linear-probe'"),
        (lambda: job.Settings(methods=()), "methods: got none"),
        (lambda: job.Settings(seconds=float("nan")), "seconds: got nan"),
        (lambda: job.Settings(rounds=1), "rounds: got 1"),
        (lambda: growth.Settings(dtype="fp8"), "dtype: got 'fp8'"),
        (lambda: growth.Settings(methods=("full",)), "methods: got 'full'"),
        (lambda: growth.Settings(methods=()), "methods: got none"),
        (lambda: growth.Settings(seconds=-1), "seconds: got -1"),
        (lambda: growth.Settings(rounds=0), "rounds: got 0"),
        (lambda: growth.Settings(sizes=dataclasses.replace(SIZES, width=100)), "sizes: got the width 100"),
        (lambda: growth.Settings(sizes=dataclasses.replace(SIZES, layers=0)), "sizes: got layers 0"),
        (lambda: growth.Settings(sizes=dataclasses.replace(SIZES, axes={"depth": (1,)})), "got the axis 'depth'"),
        (lambda: growth.Settings(sizes=dataclasses.replace(SIZES, axes={"tokens": (9,)})), "got 9 tokens"),
        (lambda: growth.Settings(sizes=dataclasses.replace(SIZES, axes={"edits": (5,)})), "got 5 edits"),
        (lambda: growth.Settings(sizes=dataclasses.replace(SIZES, axes={"layers": (0,)})), "got 0 layers"),
        (
            lambda: growth.Settings(sizes=dataclasses.replace(SIZES, batch=1000, axes={"edits": (5,)})),
            "got 1000 x 8 tokens, expected at most 4096",
        ),
        (lambda: models.build(models.find("tiny-decoder"), "fp8", CPU), "dtype: got 'fp8'"),
    ],
)
def test_bad_settings_are_named(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()
