"""Two calls on a GPU: the plan adds up, stages stop in time, a later call goes on, and the summary is right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from patience import HANGS
from places import ROOT

from benchmarks.gpu import commands, contents, plan, runner, state, summary, tests
from benchmarks.gpu.plan import Command, Machine, Stage

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs bash and GNU's timeout")
PRINTS = "import sys; print(sys.argv[1]); open(sys.argv[2], 'a').write(sys.argv[1] + '\\n')"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A place for a call; its kit is not there."""
    folders = [tmp_path / name for name in ("work", "kept", "results")]
    for folder in folders:
        folder.mkdir()
    return Machine(ROOT, *folders, sys.executable, tmp_path / "kit")


def noting(path: Path, name: str) -> plan.Commands:
    """Commands that write their name into a file."""
    return lambda machine, seconds: [Command((sys.executable, "-c", PRINTS, name, str(path)))]


def python(text: str) -> plan.Commands:
    return lambda machine, seconds: [Command((sys.executable, "-c", text))]


def call(machine: Machine, output: Path, known: state.State, stages: list[Stage], budget: float = 1000.0) -> list[str]:
    """One call; returns what was said."""
    said: list[str] = []
    runner.Runner(machine, output, known, budget, stages=stages, say=said.append).run()
    return said


def begun(said: list[str]) -> list[str]:
    return [name for line in said if line.startswith("--- ") for name in line[4:].partition(":")[0].split(", ")]


@pytest.mark.parametrize("number", [1, 2])
def test_the_shares_add_up(number: int) -> None:
    """To a call's time at most, whatever can run: nothing is left out of the sum."""
    assert plan.seconds_of(number) <= plan.CALL == 330
    assert {stage.call for stage in plan.STAGES} == {1, 2}
    assert all(stage.share > plan.GRACE for stage in plan.STAGES)
    for group in plan.together([stage for stage in plan.STAGES if stage.call == number]):
        assert len({stage.share for stage in group}) == 1  # a stage alone in its group would only wait
    longer = [*plan.STAGES, Stage("more", number, 60, python(""))]
    assert plan.seconds_of(number, longer) == plan.seconds_of(number) + 60


def test_what_is_timed_runs_alone() -> None:
    for group in plan.together(plan.STAGES):
        assert len(group) == 1 or not any(stage.result for stage in group)
    assert len([stage for stage in plan.STAGES if stage.result]) + len((runner.LOGS, runner.SUMMARY, state.FILE)) <= 8


def test_names_in_the_plan_are_known(machine: Machine) -> None:
    """Tests, methods, sizes, modules: what is named wrong would cost a call."""
    import importlib

    import test_sanitized

    known = {f"test_every_kernel[{name}]" for name in test_sanitized.CALLS}
    known |= {f"test_every_kernel_of_mixes[{name}]" for name in test_sanitized.MIXES}
    assert set(plan.SANITIZED) <= known
    assert len(set(plan.SANITIZED)) == 8
    names = re.findall(r"^def test_(\w+)", (ROOT / "tests/backends/test_gpu.py").read_text(), re.MULTILINE)
    for word in re.findall(r"\w+", plan.LARGE):
        assert word in ("or", "and") or word.isdecimal() or any(word in name for name in names), word
    measure = importlib.import_module("benchmarks.gpu.measure")
    for rehearsal in (False, True):
        here = Machine(**{**vars(machine), "rehearsal": rehearsal, "sanitizer": "s", "profiler": "p"})
        for stage in plan.STAGES:
            for command in stage.commands(here, 60.0):
                words = list(command.arguments)
                if "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
                    importlib.import_module(words[words.index("-m") + 1])
                if "--settings" in words:
                    job = "step" if stage.name == "step" else "ops"
                    measure.settings_of(job, json.loads(words[words.index("--settings") + 1]))
                for word in words:
                    if word.startswith("tests/"):
                        assert (ROOT / word.partition("::")[0]).exists()


def test_a_stage_that_hangs_is_stopped_and_the_next_runs(machine: Machine, tmp_path: Path) -> None:
    """With all that it has started, also what ignores the first signal."""
    hangs = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(1000)\n"
    )
    (tmp_path / "passed").write_text("one\ntwo\n")
    command = Command((sys.executable, "-c", hangs), {"PASSED_TESTS": str(tmp_path / "passed")})
    stages = [Stage("load", 1, 60, python("")), Stage("hangs", 1, 20, lambda machine, seconds: [command])]
    stages.append(Stage("next", 1, 60, noting(tmp_path / "notes", "next")))
    known = state.State()
    call(machine, tmp_path / "out", known, stages)
    assert (known.of("hangs").status, known.of("next").status) == (state.CUT, state.DONE)
    assert known.of("hangs").note == "2 tests passed or skipped so far"
    assert (tmp_path / "notes").read_text() == "next\n"
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def test_tests_that_are_interrupted_say_what_they_found(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that passed, and those that failed by their names: the next call begins there. `timeout` interrupts all
    processes of a stage at once, as the last test does here."""
    monkeypatch.setattr(runner, "GRACE", 300)
    (tmp_path / "test_some.py").write_text(
        "import os, signal, time\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "def test_long():\n"
        "    os.kill(0, signal.SIGINT)\n"
        "    time.sleep(1000)\n"
    )
    words = ("-m", "benchmarks.gpu.tests", "-c", "/dev/null", f"--rootdir={tmp_path}", str(tmp_path / "test_some.py"))
    command = Command((sys.executable, *words), {"PASSED_TESTS": str(tmp_path / "passed")})
    behind = Command((sys.executable, "-c", PRINTS, "behind", str(tmp_path / "notes")))
    stages = [Stage("load", 1, 500, python(""))]
    stages.append(Stage("tests-cuda", 1, 500, lambda machine, seconds: [command, behind]))
    known = state.State()
    call(machine, tmp_path / "out", known, stages)
    entry = known.of("tests-cuda")
    assert "1 failed, 1 passed" in entry.note
    assert entry.note.endswith("test_some.py::test_bad")
    assert (tmp_path / "passed").read_text() == "test_some.py::test_good\n"
    assert "WRONG" in (tmp_path / "out/summary.txt").read_text()
    assert not (tmp_path / "notes").exists()


def test_without_time_nothing_more_is_begun(machine: Machine, tmp_path: Path) -> None:
    stages = [Stage("load", 1, 60, python("")), Stage("more", 1, 60, noting(tmp_path / "notes", "more"))]
    known = state.State()
    said = call(machine, tmp_path / "out", known, stages, budget=plan.PACKING + 1)
    assert begun(said) == []
    assert known.of("more").status == state.WAITING
    assert "left to another call: load, more" in said[-1]
    assert not (tmp_path / "notes").exists()


def test_a_second_call_goes_on_where_the_first_ended(machine: Machine, tmp_path: Path) -> None:
    """What was not begun, what was cut off and what failed comes first; nothing that is done is done twice."""
    notes, output, flag = tmp_path / "notes", tmp_path / "out", tmp_path / "mended"
    grows = (
        "import json, pathlib, sys\n"
        f"file = pathlib.Path({str(machine.results / 'grows.json')!r})\n"
        "cases = json.loads(file.read_text())['cases'] if file.exists() else []\n"
        "file.write_text(json.dumps({'cases': [*cases, len(cases)], 'complete': len(cases) == 1}))\n"
    )
    fails = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(flag)!r}).exists() else 'it ' + 'broke')"
    stages = [
        Stage("load", 1, 60, noting(notes, "load")),
        Stage("done", 1, 60, noting(notes, "done")),
        Stage("grows", 1, 60, python(grows), result="grows.json"),
        Stage("fails", 1, 60, python(fails)),
        Stage("late", 1, 60, noting(notes, "late"), left_out=lambda machine: None if flag.exists() else "not here"),
        Stage("second", 2, 60, noting(notes, "second")),
    ]
    known = state.State()
    said = call(machine, output, known, stages)
    assert begun(said) == ["load", "done", "grows", "fails"]
    assert {name: entry.status for name, entry in known.stages.items()} == {
        "load": "done", "done": "done", "grows": "cut", "fails": "failed", "late": "left out", "second": "waiting",
    }  # fmt: skip
    assert "left to another call: grows, second" in said[-1]
    with tarfile.open(output / "logs.tar.gz") as archive:
        log = archive.extractfile("fails.log")
        assert log is not None
        assert b"it broke" in log.read()
    assert "it broke" in "\n".join(said)
    # Another machine: what is not in the output is lost.
    flag.touch()
    for path in (*machine.kept.iterdir(), *machine.results.iterdir()):
        path.unlink()
    notes.unlink()
    known = runner.fetch(machine, output, stages)
    said = call(machine, output, known, stages)
    assert begun(said) == ["load", "grows", "fails", "second"]
    assert "it broke" not in "\n".join(said)  # of this call alone
    assert notes.read_text() == "load\nsecond\n"
    assert json.loads((output / "grows.json").read_text()) == {"cases": [0, 1], "complete": True}
    assert {entry.status for name, entry in known.stages.items() if name != "late"} == {"done"}
    assert begun(call(machine, output, runner.fetch(machine, output, stages), stages)) == ["load"]
    assert sorted(path.name for path in output.iterdir()) == ["grows.json", "logs.tar.gz", "state.json", "summary.txt"]


def test_tests_that_failed_are_gone_on_with_by_another_stage(machine: Machine, tmp_path: Path) -> None:
    mended = tmp_path / "mended"
    fails = python(f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(mended)!r}).exists() else 1)")
    stages = [
        Stage("load", 1, 60, python("")),
        Stage("tests-cuda", 1, 60, fails, beside="tests"),
        Stage("tests-triton", 1, 60, python(""), beside="tests"),
        Stage("again-cuda", 2, 60, fails, beside="again", continues="tests-cuda"),
        Stage("again-triton", 2, 60, fails, beside="again", continues="tests-triton"),
    ]
    known = state.State()
    call(machine, tmp_path / "out", known, stages)
    mended.touch()
    assert begun(call(machine, tmp_path / "out", known, stages)) == ["load", "again-cuda"]
    assert known.of("tests-cuda").status == "done"
    assert begun(call(machine, tmp_path / "out", known, stages)) == ["load"]


def test_results_of_other_sources_are_begun_anew(machine: Machine, tmp_path: Path) -> None:
    stages = [Stage("load", 1, 60, python("")), Stage("grows", 1, 60, python(""), result="grows.json")]
    known = state.State()
    known.stages["grows"] = state.Entry("cut", call=1, sources="older")
    (machine.results / "grows.json").write_text("{}")
    call(machine, tmp_path / "out", known, stages)
    assert not (machine.results / "grows.json").exists()
    assert known.of("grows").status == "cut"


def test_without_a_gpu_nothing_more_is_begun(machine: Machine, tmp_path: Path) -> None:
    stages = [Stage("load", 1, 60, python("import sys; sys.exit('no GPU')")), Stage("more", 1, 60, python(""))]
    said: list[str] = []
    assert runner.Runner(machine, tmp_path / "out", state.State(), 1000.0, stages=stages, say=said.append).run() == 2
    assert begun(said) == ["load"]
    assert "FAILED" in (tmp_path / "out/summary.txt").read_text().upper()


def test_all_commands_of_a_stage_run(tmp_path: Path) -> None:
    listed = [[[sys.executable, "-c", f"import sys; sys.exit({code})"], {}] for code in (0, 3, 4)]
    listed.append([[sys.executable, "-c", PRINTS, "last", str(tmp_path / "notes")], {"SOME": "value"}])
    (tmp_path / "list").write_text(json.dumps(listed))
    assert commands.main(str(tmp_path / "list")) == 3
    assert (tmp_path / "notes").read_text() == "last\n"


@pytest.mark.parametrize(
    ("code", "expected"),
    [(0, 0), (1, 1), (tests.NONE_LEFT, 0), (2, 2)],
)
def test_no_test_left_is_no_failure(code: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        called.append(command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(tests.subprocess, "run", run)
    assert tests.main(["-n", "2", "some"]) == expected
    monkeypatch.setattr(tests.importlib.util, "find_spec", lambda name: None)
    tests.main(["-n", "2", "some"])
    assert called[0][-3:] == ["-n", "2", "some"]
    assert called[1][-2:] == ["--continue-on-collection-errors", "some"]


def test_what_pytest_said() -> None:
    last = "======= 1 failed, 20 passed, 3 skipped in 12.50s (0:00:12) ======="
    found = runner.said_of_tests(["FAILED tests/a.py::test_b[edit_add-bf16 x] - AssertionError: 1", last])
    assert found == "1 failed, 20 passed, 3 skipped in 12.50s; tests/a.py::test_b[edit_add-bf16 x]"
    failed = [f"FAILED tests/a.py::test_{number}" for number in range(runner.MOST_NAMED + 3)]
    assert runner.said_of_tests(["ERROR tests/b.py - ImportError", *failed]).startswith(
        "tests/b.py; tests/a.py::test_0;"
    )
    assert runner.said_of_tests(failed).endswith("; and 3 more")
    assert runner.said_of_tests(["nothing of the kind"]) == ""


def case(width: int, seconds: dict[str, tuple[float, float]], **more: Any) -> dict[str, Any]:
    """A case of ops.json: implementation to seconds forward and backward; `copy` takes 1 and 1."""
    passes = {
        one: {name: {"median": times[place]} for name, times in (seconds | {"copy": (1.0, 1.0)}).items()}
        for place, one in enumerate(("forward", "backward"))
    }
    passes["both"] = {
        name: {"median": passes["forward"][name]["median"] + passes["backward"][name]["median"]}
        for name in passes["forward"]
    }
    ours = {
        one: {name: {"over_floor": of[name]["median"] / of["copy"]["median"]} for name in ("cuda", "triton")}
        for one, of in passes.items()
    }
    return {
        "operation": "edit_add_rms_norm", "variant": "", "dtype": "bf16", "width": width, "rows": 2**26 // width,
        "inputs": "fresh", "seconds": passes, "left_out": {}, "result": ours, **more,
    }  # fmt: skip


def test_the_summary_says_what_came_of_it() -> None:
    """Of made-up results: each figure is where a reader looks for it."""
    known = state.State(2, {}, ["call 1: 37 Triton programs of the kit"])
    for name, status, note in (
        ("tests-cuda", "done", "40 passed, 2 skipped in 30.00s"),
        ("tests-triton", "failed", "1 failed, 39 passed in 31.00s; tests/ops/test_x.py::test_y[a]"),
        ("tests-gpu", "cut", "12 passed in 9.00s"),
        ("large", "done", "3 skipped in 2.00s"),
        ("sanitizers", "left out", "compute-sanitizer was not found"),
        ("step", "done", ""),
    ):
        known.stages[name] = state.Entry(status, 30.0, 0, 0 if status == "left out" else 1, "one", note)
    sizes = {768: {"cuda": (1.25, 2.0), "triton": (1.1, 1.0)}, 4096: {"cuda": (1.0, 4.0), "triton": (2.0, 5.0)}}
    bandwidth = {"cases": [case(width, seconds) for width, seconds in sizes.items()], "failed": []}
    peers = {
        "settings": {"implementations": ["cuda", "quack"]},
        "missing": {"quack": "not installed: pip install quack-kernels", "apex": "not asked for"},
        "cases": [
            case(
                width, {"cuda": (1.0, 1.0), "triton": (1.5, 1.5), "liger": (slower, slower)},
                kernels={"liger": ["_rms_norm_cute"], "cuda": ["ours"]},
            )
            for width, slower in ((768, 2.0), (4096, 3.0))
        ],
    }  # fmt: skip
    host = {"times_torch_rms_norm": {"cuda, 4 x 64": {"edit": 0.5}}}
    trained = {"seconds": {"red": 1}, "over_floor": {"red": {"median": 1.0123}}, "left_out": {"lora": "no PEFT"}}
    step = {"cases": [{"model": "A-7B", "batch": 2, "length": 8, **trained}]}
    over_copy = {"a cuda forward": {"here": 2.0, "tma": 1.8}, "b": {"here": 1.0, "tma": 1.001}}
    variants = {"failed": {"bad": "it broke"}, "over_copy": over_copy}
    found = {"bandwidth": bandwidth, "peers": peers, "host": host, "step": step, "variants": variants}
    text = summary.text(known, found)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "cuda right",
        "triton WRONG",
        "tests-triton: tests/ops/test_x.py::test_y[a]",
        "on a GPU only right so far, not all ran",
        "memory not checked: compute-sanitizer was not found",
        "768 4096",
        "rms, 64M, cuda 80/50 100/25",
        "rms, 64M, triton 91/100 50/20",
        "rms liger 2.50 (widths: 2.00 to 3.00)",
        "liger ran: _rms_norm_cute",
        "quack was not measured: not installed: pip install quack-kernels",
        "cuda, 4 x 64 edit 0.5",
        "A-7B, 2 x 8: red 1.012",
        "lora was not measured: no PEFT",
        "tma median 0.950 of 2",
        "0.900 a cuda forward",
        "bad could not be measured: it broke",
        "failed tests-triton (30 s)",
        "call 1: 37 Triton programs of the kit",
    ):
        assert expected in lines, f"{expected!r} is not in:\n{text}"
    assert not any("apex" in line for line in lines)
    assert max(map(len, text.splitlines())) <= summary.LONGEST
    assert len(lines) < 60  # a minute
    nothing = summary.text(state.State(rehearsal=True), {})
    assert nothing.startswith("REHEARSAL on a CPU")
    assert "not checked" in nothing


@pytest.mark.parametrize(
    ("first", "again", "expected"),
    [
        (("done", "9 passed in 1.00s"), None, "right"),
        (("failed", "1 failed, 8 passed in 1.00s"), None, "WRONG"),
        (("failed", "1 failed, 8 passed in 1.00s"), ("failed", "1 failed in 1.00s"), "WRONG"),
        (("done", "the rest in call 2"), ("done", "1 passed in 1.00s"), "right"),
        (("failed", "1 failed, 8 passed in 1.00s"), ("cut", "1 passed in 1.00s"), "right so far, not all ran"),
        (("cut", "8 tests passed or skipped so far"), None, "right so far, not all ran"),
        (("cut", "1 failed, 8 passed in 1.00s"), None, "WRONG"),
        (("failed", ""), None, "WRONG"),
    ],
)
def test_right_or_wrong(first: tuple[str, str], again: tuple[str, str] | None, expected: str) -> None:
    """What the last run of a test says holds, and no test that passed is no proof."""
    known = state.State(2)
    for name, entry in (("tests-cuda", first), ("again-cuda", again)):
        if entry is not None:
            known.stages[name] = state.Entry(entry[0], 1.0, 0, 1, "", entry[1])
    lines = [" ".join(line.split()) for line in summary.text(known, {}).splitlines()]
    assert f"cuda {expected}" in lines


def test_skipped_tests_show_nothing() -> None:
    known = state.State(1, {"tests-cuda": state.Entry("done", 1.0, 0, 1, "", "57 skipped in 3.00s")})
    assert "not checked: no test passed" in summary.text(known, {})


def suite(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script itself."""
    command = ["bash", str(ROOT / "benchmarks/gpu_suite.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)


def test_a_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path) -> None:
    done = suite(tmp_path / "out", "--dry", "--rehearse", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    assert listed == [stage.name for stage in plan.STAGES if stage.call == 1]
    assert "at most 330 s" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["OUT", "NOWHERE"], "which has no state.json of an earlier call"),
        (["FILE"], "which is no folder"),
        (["OUT", "--seconds", "0"], "--seconds: got 0.0, expected a number above 0"),
        (["OUT", "--scale", "nan"], "--scale: got nan, expected a number above 0"),
        (["DAMAGED"], "state.json cannot be read"),
        (["REHEARSED"], "of a rehearsal, but this is not"),
    ],
)
def test_wrong_calls(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "FILE").touch()
    for name, text in (("DAMAGED", "{"), ("REHEARSED", json.dumps(state.State(1, rehearsal=True).json()))):
        (tmp_path / name).mkdir()
        (tmp_path / name / state.FILE).write_text(text)
    words = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    assert runner.main(words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()


def test_a_python_that_is_none(tmp_path: Path) -> None:
    done = suite(tmp_path / "out", PYTHON="no-such-python")
    assert done.returncode == 2
    assert "PYTHON is 'no-such-python'" in done.stderr


@pytest.mark.long
def test_the_whole_is_rehearsed(tmp_path: Path) -> None:
    """Both calls on the CPU: every stage that needs no GPU ends well, and nothing is left."""
    kit, libraries = tmp_path / "kit", tmp_path / "libraries"
    kit.mkdir()
    libraries.mkdir()
    for name in contents.LIBRARIES:  # a rehearsal takes those that are here
        (libraries / name).touch()
    contents.pack(libraries, kit / contents.PACKED_LIBRARIES)
    (kit / contents.MANIFEST).write_text(json.dumps(made_manifest() | {"files": contents.digests(kit)}))
    for number in (1, 2):
        done = suite(tmp_path / "out", "--kit", kit, "--rehearse", "--scale", "20", TMPDIR=str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert state.read(tmp_path / "out").calls == number
    statuses = {name: entry.status for name, entry in state.read(tmp_path / "out").stages.items()}
    assert {name for name, status in statuses.items() if status == "left out"} == {"sanitizers", "tiles"}
    assert set(statuses.values()) <= {"done", "left out", "waiting"}
    assert {name for name, status in statuses.items() if status == "waiting"} == {
        "again-cuda", "again-triton", "again-gpu",
    }  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) <= 8


def made_manifest() -> dict[str, Any]:
    return {
        "schema": contents.SCHEMA, "sources": contents.sources(), "architecture": "sm_90",
        "triton": {"python": "0.0", "triton": "0.0", "left": 0},
    }  # fmt: skip


@pytest.mark.long
def test_passed_tests_are_left_out_of_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_skipped(): pytest.skip('no')\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_bad(n): assert n == 1 or os.environ.get('MENDED')\n"
    )
    names = tmp_path / "passed"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    plugins = ("-p", "benchmarks.tools.passed_tests", "-p", "no:cacheprovider")

    def run(*more: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", *plugins, *more, "-q"],
            cwd=tmp_path,
            env={**inherited, "PYTHONPATH": str(ROOT), "PASSED_TESTS": str(names), **variables},
            capture_output=True,
            text=True,
        )

    assert "1 failed, 2 passed, 1 skipped" in run().stdout
    assert len(names.read_text().splitlines()) == 3
    assert "1 passed, 3 deselected" in run(MENDED="1").stdout
    assert run().returncode == 5  # none are left
    names.unlink()
    assert "1 failed, 2 passed, 1 skipped" in run("-n", "2").stdout
    assert len(names.read_text().splitlines()) == 3
    assert "PASSED_TESTS is not set" in run(PASSED_TESTS="").stderr
