"""`red-kernels bench`: what is run, resumed, refused, and said."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
import time
import weakref

import pytest
import torch
from patience import HANGS
from places import ROOT
from rich.console import Console

from benchmarks import suite
from benchmarks.runs import ResultFile, Run, run_cases
from red_kernels import cli
from red_kernels.support.files import json_by_line

TINY = ["--quick", "--device", "cpu", "--operations", "edit", "--dtypes", "fp32", "--inputs", "fresh"]
TINY += ["--widths", "8", "--rows", "4"]
CASES = [{"name": name, "variant": ""} for name in "abc"]


@pytest.fixture
def run():
    return Run(torch.device("cpu"), Console(width=200), progress=Console(file=io.StringIO()))


@pytest.fixture(autouse=True)
def _a_small_cache(monkeypatch):
    """Fresh inputs reach beyond the cache: of tensors of a few bytes that takes a million on a large processor."""
    inputs = importlib.import_module(f"{cli._benchmarks('suite').__package__}.ops.inputs")  # the command's
    monkeypatch.setattr(inputs, "LEAST_CACHE_BYTES", 1 << 14)
    monkeypatch.setattr(inputs, "_last_cache", lambda: 1 << 13)


def file_of(folder, run, resume=False, settings=None):
    return ResultFile(folder / "job.json", "job", run, settings or {"sizes": (1, 2)}, {}, resume=resume)


def read(folder):
    return json.loads((folder / "job.json").read_text())


def test_command(tmp_path, capsys):
    """Results, pictures and a table; a second run is refused, resumed or begun anew."""
    assert cli.main(["bench", "ops", *TINY, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "edit: forward + backward on " in out
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith("wrote"))
    assert f"wrote {tmp_path / 'ops.json'}" in re.sub(r"\n(?=\S)", "", out)
    content = json.loads((tmp_path / "ops.json").read_text())
    assert (content["job"], content["quick"], content["complete"]) == ("ops", True, True)
    assert content["environment"]["torch"] == torch.__version__
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}

    assert cli.main(["bench", "ops", *TINY, "--output", str(tmp_path)]) == cli.EXIT_ERROR
    assert "has results of ops; --resume continues them, --overwrite measures again" in capsys.readouterr().err
    assert cli.main(["bench", "ops", *TINY, "--output", str(tmp_path), "--resume"]) == 0
    assert json.loads((tmp_path / "ops.json").read_text())["cases"] == content["cases"]
    assert cli.main(["bench", "ops", *TINY, "--output", str(tmp_path), "--overwrite"]) == 0
    assert json.loads((tmp_path / "ops.json").read_text())["cases"] != content["cases"]


def test_command_of_a_checkout_elsewhere(tmp_path):
    """The suite is found beside the package, from any folder."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import red_kernels.cli as cli; "
        "suite = cli._benchmarks('suite'); print(suite.__name__, suite.JOBS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS, env={}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "red_kernels.benchmarks.suite ('ops', 'step', 'quality')"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--widths", "8"], "--widths: needs the job ops, got the job step"),
        (["step", "--elements", "8", "--seconds", "1"], "--elements: needs the job ops, got the job step"),
        (["quality", "--seconds", "1"], "--seconds: needs the job ops, got the job quality"),
        (["--tune", "--no-memory"], "--no-memory: not an option of the search for launch rules"),
        (["ops", "--operations", "norm"], "operations: got 'norm', expected some of edit_add_rms_norm"),
        (["ops", "--minutes", "0"], "--minutes: got 0.0, expected a number above 0"),
        (["ops", "--device", "cuda"], "--device: got 'cuda', and torch .* finds no GPU here"),
    ],
)
def test_what_is_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", *arguments, "--output", str(tmp_path / "new")]) == cli.EXIT_ERROR
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert cli.main(["bench", *TINY, "--output", str(tmp_path / "file")]) == cli.EXIT_ERROR
    assert "is a file, expected a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_all_goes_on_behind_a_job_that_fails(tmp_path, monkeypatch):
    """And the error is the command's, at the end."""
    order = []

    def job(name, error=None):
        def run_job(settings, run, folder, resume):
            order.append((name, resume))
            if error is not None:
                raise error
            return ResultFile(folder / f"{name}.json", name, run, {}, {})

        return run_job

    monkeypatch.setattr(suite.ops, "run_job", job("ops"))
    monkeypatch.setattr(suite.step, "run_job", job("step", ModuleNotFoundError("no model")))
    monkeypatch.setattr(suite.growth, "run_job", job("growth"))
    monkeypatch.setattr(suite.quality, "run_job", job("quality"))
    request = suite.Request("all", tmp_path, device="cpu", resume=True)
    with pytest.raises(RuntimeError, match=r"^step: no model$"):
        suite.run_suite(request, Console())
    assert order == [("ops", True), ("step", True), ("growth", True), ("quality", True)]
    assert list(suite.Request("step", tmp_path).jobs()) == ["step", "growth"]


def test_methods_that_are_asked_for(tmp_path, monkeypatch):
    """Of steps and of quality; the growth, which has its own, is left out."""
    asked = []

    def run_job(settings, run, folder, resume):
        asked.append(settings.methods)
        return ResultFile(folder / "any.json", "any", run, {}, {})

    monkeypatch.setattr(suite.step, "run_job", run_job)
    monkeypatch.setattr(suite.quality, "run_job", run_job)
    monkeypatch.setattr(suite, "draw", lambda *_: [])
    for job in ("step", "quality"):
        request = suite.Request(job, tmp_path, device="cpu", methods=("road", "vera"))
        assert list(request.jobs()) == [job]
        suite.run_suite(request, Console(file=io.StringIO()))
    assert asked == [("road", "vera")] * 2
    for job in ("ops", "growth", "all"):
        with pytest.raises(ValueError, match=f"--methods: needs the job step or quality, got the job {job}"):
            suite.Request(job, tmp_path, methods=("road",))
    with pytest.raises(ValueError, match="methods: got"):
        suite.run_suite(
            suite.Request("quality", tmp_path, device="cpu", methods=("none",)), Console(file=io.StringIO())
        )


def test_cases_and_tasks_that_are_asked_for(tmp_path, monkeypatch, capsys):
    asked = []

    def run_job(settings, run, folder, resume):
        asked.append(settings)
        return ResultFile(folder / "any.json", "any", run, {}, {})

    monkeypatch.setattr(suite.step, "run_job", run_job)
    monkeypatch.setattr(suite.quality, "run_job", run_job)
    monkeypatch.setattr(suite, "draw", lambda *_: [])
    request = suite.Request("step", tmp_path, device="cpu", cases=(("MiniLM-L6", 16, 64), ("SmolLM2-135M", 1, 128)))
    assert list(request.jobs()) == ["step"]
    suite.run_suite(request, Console(file=io.StringIO()))
    suite.run_suite(suite.Request("quality", tmp_path, device="cpu", tasks=("sentiment",)), Console(file=io.StringIO()))
    assert asked[0].cases == (("MiniLM-L6", "fp32", 16, 64), ("SmolLM2-135M", "auto", 1, 128))
    assert asked[1].tasks == ("sentiment",)
    assert {case["task"] for case in suite.quality.cases(asked[1], None)} == {"sentiment"}
    for error, options in (
        ("--case: needs the job step, got the job quality", {"job": "quality", "cases": (("a", 1, 1),)}),
        ("--tasks: needs the job quality, got the job step", {"job": "step", "tasks": ("sentiment",)}),
    ):
        with pytest.raises(ValueError, match=error):
            suite.Request(output=tmp_path, **options)
    for tasks in ((), ("sums",)):
        with pytest.raises(ValueError, match="tasks: got"):
            suite.quality.Settings(tasks=tasks)
    assert cli.main(["bench", "step", "--output", str(tmp_path), "--case", "MiniLM-L6", "many", "64"]) != 0
    assert "--case: got MiniLM-L6 many 64, expected a model and two numbers" in capsys.readouterr().err


def test_each_result_is_on_the_disk_at_once(tmp_path, run):
    seen = []

    def measure(case):
        seen.append((case["name"], [done["name"] for done in read(tmp_path)["cases"]]))
        return {"seconds": 1.0}

    file = file_of(tmp_path, run)
    run_cases(file, CASES, measure, run, "title")
    assert seen == [("a", []), ("b", ["a"]), ("c", ["a", "b"])]
    assert read(tmp_path)["complete"]
    assert read(tmp_path)["planned"] == 3


def test_resumed(tmp_path, run):
    """What is there is not measured again; a file of another run is refused."""

    def until_b(case):
        if case["name"] == "b":
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    file = file_of(tmp_path, run)
    file.content["host"] = [1, 2]
    with pytest.raises(KeyboardInterrupt):
        run_cases(file, CASES, until_b, run, "title")
    assert not read(tmp_path)["complete"]
    measured = []
    again = file_of(tmp_path, run, resume=True)
    run_cases(again, CASES, lambda case: measured.append(case["name"]) or {"seconds": 2.0}, run, "title")
    assert measured == ["b", "c"]
    assert [case["seconds"] for case in read(tmp_path)["cases"]] == [1.0, 2.0, 2.0]
    assert read(tmp_path)["host"] == [1, 2]
    assert read(tmp_path)["complete"]

    with pytest.raises(ValueError, match=r"--resume: .* has the settings"):
        file_of(tmp_path, run, resume=True, settings={"sizes": (3,)})
    for name, value in (("device", "another"), ("sources", "0123")):
        content = read(tmp_path)
        content["environment"][name] = value
        (tmp_path / "job.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"was measured with {name} '{value}'"):
            file_of(tmp_path, run, resume=True)
        file_of(tmp_path, run).write()
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="not a file of results of schema 1"):
        file_of(tmp_path, run, resume=True)


def test_a_case_that_fails(tmp_path, run):
    """It is named, and the others are measured; where all fail, that is an error."""

    def measure(case):
        if case["name"] == "b":
            raise RuntimeError("no memory")
        return {"seconds": 1.0}

    file = file_of(tmp_path, run)
    run_cases(file, CASES, measure, run, "title")
    content = read(tmp_path)
    assert [case["name"] for case in content["cases"]] == ["a", "c"]
    assert content["failed"] == [{"name": "b", "variant": "", "error": "RuntimeError: no memory"}]
    assert content["complete"]  # nothing is left to be tried
    with pytest.raises(RuntimeError, match="no memory"):
        run_cases(file_of(tmp_path, run), CASES[1:2], measure, run, "title")


def test_a_case_that_failed_before_comes_last(tmp_path, run):
    order = []

    def measure(case):
        order.append(case["name"])
        if case["name"] == "a" and len(order) == 1:
            raise RuntimeError("no memory")
        if case["name"] == "b" and len(order) == 2:
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run_cases(file_of(tmp_path, run), CASES, measure, run, "title")
    again = file_of(tmp_path, run, resume=True)
    assert again.failed(CASES[0])
    run_cases(again, CASES, measure, run, "title")
    assert order == ["a", "b", "b", "c", "a"]
    assert read(tmp_path)["failed"] == []
    assert read(tmp_path)["complete"]


def test_what_a_case_held_is_given_back(tmp_path, run):
    """A failure keeps nothing of it alive, nor does a cycle."""
    alive = []

    class Held:
        pass

    def measure(case):
        held = Held()
        held.itself = held
        alive.append(weakref.ref(held))
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        run_cases(file_of(tmp_path, run), CASES, measure, run, "title")
    assert [one() for one in alive] == [None] * 3


def test_time_that_is_up(tmp_path, run, capsys):
    """No case is begun behind the deadline, and the file says that some are left."""
    late = Run(run.device, run.console, deadline=time.monotonic() - 1, progress=run.progress)
    file = file_of(tmp_path, late)
    run_cases(file, CASES, lambda case: {}, late, "title")
    assert read(tmp_path)["cases"] == []
    assert not read(tmp_path)["complete"]
    assert "3 of 3 cases are left to --resume" in capsys.readouterr().out


def test_sources_tell_versions_apart(tmp_path, monkeypatch):
    """The hash changes with a source, and not with what is no source."""
    from benchmarks import harness

    before = harness._sources()
    assert before == harness._sources()
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "harness.py").write_text("1")
    monkeypatch.setattr(harness, "__file__", str(folder / "harness.py"))
    first = harness._sources()
    (folder / "notes.md").write_text("other")
    assert harness._sources() == first
    (folder / "harness.py").write_text("2")
    assert harness._sources() != first


def test_json_has_a_line_for_each_case():
    text = json_by_line({"schema": 1, "cases": [{"a": 1}, {"a": 2}]})
    assert json.loads(text) == {"schema": 1, "cases": [{"a": 1}, {"a": 2}]}
    assert [line.strip(" ,") for line in text.splitlines()][3:5] == ['{"a": 1}', '{"a": 2}']


def test_options_of_the_operations_reach_them(tmp_path, monkeypatch):
    """And the seconds the training steps."""
    asked = []
    package = cli._benchmarks("suite").__package__
    for module in ("ops", "step"):
        of = importlib.import_module(f"{package}.{module}.job")
        monkeypatch.setattr(of, "run_job", lambda settings, run, folder, resume: asked.append(settings) or 1 / 0)
    output = ["--output", str(tmp_path), "--device", "cpu"]
    words = ["--elements", "64", "128", "--implementations", "cpu", "--no-memory", "--kernels", "--seconds", "3"]
    for arguments in (["ops", *output, *words], ["step", *output, "--methods", "red", "--seconds", "5"]):
        with pytest.raises(ZeroDivisionError):
            cli._bench(cli._parser().parse_args(["bench", *arguments]))
    ops, step = asked
    assert (ops.elements, ops.implementations, ops.peak_memory, ops.kernels) == ((64, 128), ("cpu",), False, True)
    assert (ops.seconds, step.seconds, step.methods) == (3.0, 5.0, ("red",))
