"""The quality job: the search of a learning rate, equal budgets, and what it writes."""

from __future__ import annotations

import io
import json
import math
import random
import statistics
import string
import sys
import time
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import model_zoo as zoo
import pytest
import tiny_folders
import torch
from rich.console import Console
from test_bench_sentiment import RATED

import red_kernels as rk
from benchmarks.methods import KIND_METHODS, QUALITY_DEFAULT, QUALITY_METHODS, prepare
from benchmarks.quality import following, job, sentiment, tasks
from benchmarks.quality.settings import GRIDS, Settings
from benchmarks.quality.training import data_order, search_rate, train
from benchmarks.runs import Run
from red_kernels.finetune.data import Document

# ---- the search of a learning rate


def searched(grid, losses, extend=2):
    asked = []

    def judge(rate):
        asked.append(rate)
        return SimpleNamespace(loss=losses(rate))

    return search_rate(grid, judge, extend), asked


def test_the_best_rate_inside_of_the_grid():
    found, asked = searched((1e-3, 3e-3, 1e-2), lambda rate: abs(math.log(rate / 3e-3)))
    assert (found.chosen, found.at_edge, found.added) == (3e-3, False, ())
    assert asked == [1e-3, 3e-3, 1e-2]


def test_a_grid_is_extended_until_the_best_is_inside():
    found, asked = searched((1e-3, 3e-3, 1e-2), lambda rate: abs(math.log(rate / 3e-2)))
    assert (found.chosen, found.at_edge, found.added) == (3e-2, False, (3e-2, 9e-2))
    found, asked = searched((1e-3, 3e-3, 1e-2), lambda rate: abs(math.log(rate / 3e-4)))
    assert (found.chosen, found.at_edge, found.added) == (3e-4, False, (3e-4, 9e-5))
    assert asked[:3] == [1e-3, 3e-3, 1e-2]
    assert list(found.tried) == sorted(asked)


def test_an_edge_that_stays_is_told():
    found, _ = searched((1e-3, 1e-2), lambda rate: -rate)
    assert (found.chosen, found.at_edge, found.added) == (1.0, True, (0.1, 1.0))
    found, asked = searched((1e-3, 1e-2), lambda rate: -rate, extend=0)
    assert (found.chosen, found.at_edge, asked) == (1e-2, True, [1e-3, 1e-2])


def test_rates_that_diverge_are_not_chosen():
    found, _ = searched((1e-3, 1e-2, 1e-1), lambda rate: math.nan if rate > 5e-2 else -rate)
    assert (found.chosen, found.at_edge) == (1e-2, False)
    with pytest.raises(RuntimeError, match="diverged with every learning rate"):
        searched((1e-3, 1e-2), lambda rate: math.nan)


@pytest.mark.parametrize("grid", [(), (1e-3,), (1e-2, 1e-3), (0.0, 1e-3), (1e-3, math.inf), (1e-3, math.nan)])
def test_grids_that_are_refused(grid):
    with pytest.raises(ValueError, match="at least two learning rates"):
        search_rate(grid, lambda rate: None, 0)
    with pytest.raises(ValueError, match=r"grids\['sentiment'\]\['full'\]"):
        Settings(grids={**GRIDS, "sentiment": {**GRIDS["sentiment"], "full": grid}})


# ---- the training


def test_the_order_of_the_data():
    batches = data_order(7, steps=4, batch=5, seed=3)
    stream = [number for batch in batches for number in batch]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5]
    assert sorted(stream[:7]) == sorted(stream[7:14]) == list(range(7))
    torch.rand(5)  # what the global generator has drawn does not matter
    assert data_order(7, steps=4, batch=5, seed=3) == batches
    assert data_order(7, steps=4, batch=5, seed=4) != batches


def test_batches_of_like_length():
    lengths = [number % 37 + 1 for number in range(300)]
    batches = data_order(300, steps=60, batch=5, seed=3, lengths=lengths)
    assert sorted(number for batch in batches for number in batch) == list(range(300))
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    assert padded < 1.15 * sum(lengths), "nearly nothing is padded"
    means = [sum(lengths[number] for number in batch) / 5 for batch in batches]
    assert means != sorted(means), "batches come in no order of length"
    assert data_order(300, steps=60, batch=5, seed=3, lengths=lengths) == batches
    with pytest.raises(ValueError, match="lengths: got 2, expected one for each of 3 items"):
        data_order(3, steps=1, batch=2, seed=0, lengths=[1, 2])


class Pull(torch.nn.Module):
    """Its loss pulls a weight of 1 upward."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, factor):
        return SimpleNamespace(loss=-(self.weight.float() * factor).sum())


def test_half_precision_weights_do_not_lose_small_steps():
    """A step of 1e-3 is less than half of what bf16 can tell at 1, ten of them are more."""
    model, peer = Pull(torch.bfloat16), Pull(torch.float32)
    batches = [{"factor": torch.tensor(1.0)}] * 20
    for own in (model, peer):
        train(own, list(own.parameters()), batches, 20, 1e-3)
    assert (model.weight > 1).all()
    assert torch.equal(model.weight, peer.weight.bfloat16())
    assert not model.training


def test_the_rates_of_a_training():
    """AdamW with a constant gradient steps by the rate: the sum of the schedule's rates is how far the weight goes."""
    model = Pull(torch.float64)
    steps, warm_up = 50, 3
    train(model, [model.weight], [{"factor": torch.tensor(1.0, dtype=torch.float64)}] * steps, steps, 1e-2)
    rates = [1e-2 * min(step / warm_up, (steps - step) / (steps - warm_up)) for step in range(steps)]
    assert (model.weight - 1).tolist() == pytest.approx([sum(rates)] * 3)


def test_a_training_is_looked_at():
    """In evaluation mode, behind the step that is named; what a look takes is not counted."""
    model = Pull(torch.float32)
    seen = []

    def look(step, seconds):
        seen.append((step, seconds, model.training, model.weight.detach().clone()))
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass

    batches = [{"factor": torch.tensor(1.0)}] * 5
    train(model, [model.weight], batches, 5, 1e-2, looks=(2, 5), look=look)
    other = Pull(torch.float32)
    train(other, [other.weight], batches, 5, 1e-2)
    assert [(step, training) for step, _, training, _ in seen] == [(2, False), (5, False)]
    assert torch.equal(seen[1][3], other.weight)
    assert not torch.equal(seen[0][3], other.weight)
    assert 0 < seen[0][1] < seen[1][1] < seen[0][1] + 0.1


def test_a_training_that_diverges_ends():
    model = Pull(torch.float32)
    factors = [1.0, math.inf, 1.0]
    losses = train(model, [model.weight], [{"factor": torch.tensor(factor)} for factor in factors], 3, 1e-2)
    assert losses == [-3.0, -math.inf]


def test_fused_and_eager_edits_train_alike():
    """The whole loss curve and the vectors at its end, held to the same training in fp64; without dropout."""
    model = zoo.tiny("llama")
    ids = torch.randint(0, 50, (8, 2, 7), generator=torch.Generator().manual_seed(5))
    batches = [{"input_ids": own, "labels": own} for own in ids]
    values = zoo.vectors(zoo.sites("llama"))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    rk.patch(model)
    zoo.fill(rk.edit_parameters(model), values)

    def curve(own, vectors):
        trained = [vector for parts in vectors.values() for vector in parts.values()]
        losses = torch.tensor(train(own, trained, batches, len(batches), 1e-2), dtype=torch.float64)
        return losses, torch.cat([vector.detach() for vector in trained])

    runs = [
        curve(model, rk.edit_parameters(model)),
        curve(unfused.model, unfused.vectors),
        curve(truth.model, truth.vectors),
    ]
    assert runs[0][0][-1] != runs[0][0][0]
    zoo.assert_as_exact("losses", *(losses for losses, _ in runs), dtype=torch.float32)
    zoo.assert_as_exact("vectors", *(vectors for _, vectors in runs), dtype=torch.float32)


# ---- the job


def topics():
    """Documents with no passage in common."""
    letters = random.Random(0)
    return [
        Document("".join(letters.choices(string.ascii_letters, k=60 + 9 * (number % 5))), str(number), number)
        for number in range(40)
    ]


TEXTS = [
    following.Text(source, tuple(f"Sentence {place} of text {number} in {source}." for place in range(4 + number % 3)))
    for source in ("news", "shop")
    for number in range(20)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return tiny_folders.tiny_bert(root / "bert"), tiny_folders.tiny_llama(root / "llama")


@pytest.fixture
def settings(folders, monkeypatch):
    """The job on tiny models and the data of this file."""
    monkeypatch.setattr(sentiment, "load", lambda: sentiment.split(RATED))
    monkeypatch.setattr(following, "load", lambda: following.split(TEXTS))
    monkeypatch.setattr(tasks, "python_topics", topics)
    bert, llama = map(str, folders)
    few = {"steps": 3, "search": 2, "seeds": 2}
    return Settings(
        sentiment=tasks.Budget(bert, "fp32", batch=4, length=24, validation=6, test=9, **few),
        following=tasks.Budget(bert, "fp32", batch=3, length=32, validation=7, test=8, **few),
        language=tasks.Budget(llama, "bf16", batch=2, length=16, validation=4, test=5, **few),
        grids=dict.fromkeys(tasks.TASKS, dict.fromkeys(QUALITY_METHODS, (1e-3, 1e-2, 1e-1))),
        extend=1,
    )


def a_run(quick=False):
    return Run(torch.device("cpu"), Console(file=io.StringIO(), width=140), quick, progress=Console(file=io.StringIO()))


@pytest.fixture
def watched(monkeypatch):
    """What happens, in its order: ("train", batches, head at the start, trained numbers), and ("judge", its part)."""
    events = []

    def watching_train(model, trained, batches, steps, rate, **looks):
        batches = list(batches)
        head = [own.detach().clone() for name, own in model.named_parameters() if "classifier" in name]
        events.append(("train", batches, head, sum(own.numel() for own in trained)))
        return train(model, trained, batches, steps, rate, **looks)

    def watching_judge(task, model, part):
        events.append(("judge", "test" if part is task.test else "validation"))
        return judge(task, model, part)

    judge = tasks.Task.judge
    monkeypatch.setattr(job, "train", watching_train)
    monkeypatch.setattr(tasks.Task, "judge", watching_judge)
    return events


def test_the_job_writes_what_a_reader_needs(settings, tmp_path):
    pytest.importorskip("peft")
    run = a_run()
    settings = replace(settings, methods=(*QUALITY_DEFAULT, "naive"))
    file = job.run_job(settings, run, tmp_path, resume=False)
    content = json.loads((tmp_path / "quality.json").read_text())
    assert content == json.loads(json.dumps(file.content))
    assert (content["job"], content["complete"], content["failed"], content["missing"]) == ("quality", True, [], {})
    found = {(case["task"], case["method"]): case for case in content["cases"]}
    methods = [job.BASE, *settings.methods]
    assert list(found) == [(task, method) for task in tasks.TASKS for method in methods]
    for (task, method), case in found.items():
        scores = [entry["score"] for entry in case["runs"]]
        assert case["metric"] == ("perplexity" if task == "language-modelling" else "accuracy")
        assert case["mean"] == statistics.fmean(scores)
        if method == job.BASE:
            assert (case["steps"], case["trainable"], case["chosen"], case["spread"]) == (0, 0, None, None)
            continue
        assert case["spread"] == statistics.stdev(scores)
        assert [entry["seed"] for entry in case["runs"]] == [1, 2]
        assert all(len(entry["curve"]) == 3 for entry in case["runs"])
        for entry in case["runs"]:
            assert [look["step"] for look in entry["validation"]] == [1, 2, 3]
            seconds = [look["seconds"] for look in entry["validation"]]
            assert 0 < seconds[0] <= seconds[1] <= seconds[2]
            assert all(look["loss"] >= 0 for look in entry["validation"])
        assert (case["steps"], case["search_steps"]) == (3, 2)
        assert case["peak_bytes"] > 4 * 3 * case["trainable"]  # at least the parameters and the optimizer's state
        if task == "language-modelling":
            assert scores == [math.exp(entry["loss"]) for entry in case["runs"]]
        rates = {float(rate): loss for rate, loss in case["learning_rates"].items()}
        assert case["chosen"] == min(rates, key=rates.get)
        assert case["at_edge"] == (case["chosen"] in (min(rates), max(rates)))
        assert set(rates) == {1e-3, 1e-2, 1e-1, *case["added"]}
        assert len(case["added"]) <= 1
    sizes = {name: {found[task, name]["trainable"] for task in tasks.TASKS} for name in QUALITY_DEFAULT}
    assert sizes["red"] == {2 * 2 * 32 + 2 * 32 + 2, 2 * 2 * 16}  # two layers; the head
    assert found["sentiment", "linear-probe"]["trainable"] == 2 * 32 + 2
    assert found["sentiment", "base"]["test_items"] == 9
    assert found["sentiment", "base"]["left_out_neutral"] == 7
    shown = run.console.file.getvalue()
    for words in ("RED, fused (ours)", "LoRA r=8", "fused minus eager edit, by seed", "most frequent class", "±"):
        assert words in shown


def test_every_method_gets_the_same_and_the_test_part_last(settings, watched):
    run = a_run()
    batches, heads = defaultdict(list), defaultdict(list)
    for method in ("red", "naive", "linear-probe", "full"):
        watched.clear()
        job._made.cache_clear()
        found = job.measure({"task": "sentiment", "method": method}, settings, run)
        searched = len(found["learning_rates"])
        judged = [*["validation"] * settings.sentiment.steps, "test"]  # so few steps that each is looked at
        assert [event[1] for event in watched if event[0] == "judge"] == ["validation"] * searched + judged * 2
        trainings = [event for event in watched if event[0] == "train"]
        assert {event[3] for event in trainings} == {found["trainable"]}
        *trainings, memory = trainings
        assert len(trainings) == searched + 2
        longest = max(batch["input_ids"].numel() for batch in trainings[-2][1])  # of the first seed
        assert [batch["input_ids"].numel() for batch in memory[1]] == [longest] * 2
        for seed, event in zip([0] * searched + [1, 2], trainings, strict=True):
            batches[seed].append(event[1])
            heads[seed].append(event[2])
    for seed in (0, 1, 2):
        assert len(batches[seed]) >= 4
        for other in batches[seed][1:]:
            assert len(other) == len(batches[seed][0])
        assert len(batches[seed][0]) == (settings.sentiment.steps if seed else settings.sentiment.search)
        for other in batches[seed][1:]:
            for one, two in zip(batches[seed][0], other, strict=True):
                assert one.keys() == two.keys()
                assert all(torch.equal(one[name], two[name]) for name in one)
        assert len(heads[seed][0]) == 2
        for other in heads[seed][1:]:
            assert all(torch.equal(one, two) for one, two in zip(heads[seed][0], other, strict=True))
    assert not torch.equal(heads[1][0][0], heads[2][0][0])
    assert not torch.equal(batches[1][0][0]["labels"], batches[2][0][0]["labels"]) or not torch.equal(
        batches[1][0][0]["input_ids"], batches[2][0][0]["input_ids"]
    )


def test_a_seed_decides_all_that_is_drawn(settings):
    """Adapters and dropout too, whatever was drawn before and whether or not the model is loaded already."""
    pytest.importorskip("peft")
    case = {"task": "sentiment", "method": "lora-all"}
    first = job.measure(case, settings, a_run())
    torch.rand(7)
    second = job.measure(case, settings, a_run())
    for found in (first, second):
        for run in found["runs"]:
            assert all(look.pop("seconds") > 0 for look in run["validation"])
    assert second == first


OTHERS = [name for name in QUALITY_METHODS if name not in (*QUALITY_DEFAULT, *KIND_METHODS)]


@pytest.mark.parametrize("method", OTHERS)
def test_methods_that_are_not_measured_by_default(settings, monkeypatch, method):
    """They train, and `spt` looks at the first batches of its own training."""
    pytest.importorskip("peft")
    looked = []
    monkeypatch.setattr(
        job,
        "prepare",
        lambda *args, batches, **options: prepare(
            *args, batches=(looked.append(batch) or batch for batch in batches), **options
        ),
    )
    found = job.measure({"task": "sentiment", "method": method}, replace(settings, methods=(method,)), a_run())
    assert found["mean"] is not None
    assert found["trainable"] > 2 * 32 + 2  # the head
    batches = len(found["learning_rates"]) * settings.sentiment.search + 2 * settings.sentiment.steps
    assert len(looked) == (batches + 1 if method == "spt" else 0)  # one for its memory


def test_no_text_is_in_two_parts(settings):
    for name in tasks.TASKS:
        everything = replace(settings.budget(name), length=50, validation=1000, test=1000)
        task = tasks.make_task(name, everything, torch.device("cpu"))
        parts = [
            {tuple(map(int, item["input_ids"])) for item in part} for part in (task.train, task.validation, task.test)
        ]
        assert all(parts)
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]


def test_what_is_measured_on_is_spread_over_the_data(settings):
    """The sentences come with the positive ones first: a smaller part must not be of one class."""
    task = tasks.make_task("sentiment", settings.sentiment, torch.device("cpu"))
    assert len(task.test) == 9
    assert 3 <= sum(item["labels"] for item in task.test) <= 6
    assert tasks.spread_out(range(10), 5) == [0, 2, 4, 6, 8]
    assert tasks.spread_out(range(3), 5) == [0, 1, 2]


def test_a_training_that_diverges_is_null(settings, monkeypatch):
    """Rates and seeds alike; a mean over the other seeds would not be one, and nothing that is no JSON is written."""

    def train_badly(model, trained, batches, steps, rate, **looks):
        calls.append(rate)
        losses = train(model, trained, batches, steps, rate, **looks)
        return [*losses[:-1], math.nan] if rate == 1e-1 or len(calls) == broken else losses

    monkeypatch.setattr(job, "train", train_badly)
    calls, broken = [], 0
    found = job.measure({"task": "sentiment", "method": "red"}, settings, a_run())
    assert found["learning_rates"]["0.1"] is None
    assert found["chosen"] < 1e-1
    broken, calls = len(calls) - 1, []  # the second seed's; the last training is for the memory
    found = job.measure({"task": "sentiment", "method": "red"}, settings, a_run())
    assert [entry["score"] is None for entry in found["runs"]] == [False, True]
    assert (found["mean"], found["spread"], found["runs"][1]["loss"]) == (None, None, None)
    json.dumps(found, allow_nan=False)


def test_a_quick_run(settings, tmp_path):
    settings = replace(settings, methods=("red", "full"))
    file = job.run_job(settings, a_run(quick=True), tmp_path, resume=False)
    assert file.content["quick"]
    assert file.content["settings"]["sentiment"]["steps"] == 4
    for case in file.cases:
        if case["method"] != job.BASE:
            assert (len(case["learning_rates"]), len(case["runs"]), case["spread"]) == (2, 1, None)


def test_a_missing_package_is_named(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    settings = replace(settings, methods=("lora-all", "linear-probe"))
    run = a_run(quick=True)
    file = job.run_job(settings, run, tmp_path, resume=False)
    assert file.content["missing"].keys() == {"lora-all", "ia3"}
    assert file.content["complete"]
    assert {case["method"] for case in file.cases} == {job.BASE, "linear-probe"}
    assert "not measured: lora-all: " in run.console.file.getvalue()


def test_data_that_cannot_be_had_is_a_failure_of_its_task_alone(settings, tmp_path, monkeypatch):
    def refuse():
        raise OSError("pip cannot fetch the source distribution")

    monkeypatch.setattr(sentiment, "load", refuse)
    run = a_run(quick=True)
    file = job.run_job(replace(settings, methods=("red",)), run, tmp_path, resume=False)
    assert [case["task"] for case in file.content["failed"]] == ["sentiment", "sentiment"]
    assert all("pip cannot fetch" in case["error"] for case in file.content["failed"])
    assert [case["task"] for case in file.cases] == ["next-sentence"] * 2 + ["language-modelling"] * 2
    assert file.content["complete"]  # nothing is left to be tried


def test_settings_that_are_refused(settings):
    red = {**GRIDS["sentiment"], "red": (1e-3, 1e-2)}
    for message, changes in {
        "methods: got": {"methods": ("red", "prompt-tuning")},
        "expected some of": {"methods": ()},
        "extend: got -1": {"extend": -1},
        "expected the same": {"methods": ("red", "naive"), "grids": {**GRIDS, "sentiment": red}},
        "sentiment.steps: got 0": {"sentiment": replace(settings.sentiment, steps=0)},
        "language.seeds: got 0": {"language": replace(settings.language, seeds=0)},
        "language.length: got 1": {"language": replace(settings.language, length=1)},
        "following.search: got 0": {"following": replace(settings.following, search=0)},
        "language.products: got 'tf32'": {"language": replace(settings.language, products="tf32")},
        "sentiment.dtype: got 'fp16'": {"sentiment": replace(settings.sentiment, dtype="fp16")},
    }.items():
        with pytest.raises(ValueError, match=message):
            Settings(**changes)
    with pytest.raises(ValueError, match=r"sentiment\.length: got 4096, .* takes at most"):
        tasks.make_task("sentiment", replace(settings.sentiment, length=4096), torch.device("cpu"))


def test_fused_over_naive_is_by_seed():
    def case(scores, chosen=1e-2):
        return {"chosen": chosen, "runs": [{"seed": seed, "score": score} for seed, score in scores.items()]}

    red, naive = case({1: 80.0, 2: 90.0}), case({2: 89.0, 1: 81.0})
    assert job.fused_over_naive({"red": red, "naive": naive}) == (0.0, statistics.stdev([-1.0, 1.0]))
    assert job.fused_over_naive({"red": red}) is None
    assert job.fused_over_naive({"red": red, "naive": case({1: 80.0, 2: 90.0}, 3e-2)}) is None
    assert job.fused_over_naive({"red": red, "naive": case({1: None, 2: 90.0})}) is None
