"""benchmarks/gpu_suite.sh with a Python that only notes what it is called with: order, time, failures, going on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from places import ROOT

ORDER = ["environment", "build", "tests-cuda", "tests-triton", "tests-gpu", "memcheck", "racecheck", "initcheck"]
ORDER += ["host", "ops", "step", "tune", "growth", "remaining"]
# A stand-in for python3: notes its arguments, fails or sleeps where it is told to, and makes files of results.
STUB = """#!/bin/bash
case "$*" in
    *"json.load"*) exec {python} "$@" ;;
    "-c import xdist") exit 1 ;;
esac
printf '%s|%s\\n' "${{RED_KERNELS_TEST_ON:-}}" "$*" >>"$NOTES"
if [ -n "${{SLOW:-}}" ] && [[ "$*" == *$SLOW* ]]; then sleep 600; fi
if [ -n "${{FAILING:-}}" ] && [[ "$*" == *$FAILING* ]]; then echo "it broke"; exit 3; fi
if [[ "$*" == *"-m pytest"* ]] && [ -n "${{PASSED_TESTS:-}}" ]; then echo a::test >>"$PASSED_TESTS"; fi
if [[ "$*" == *"--output"* ]]; then
    words=("$@")
    for i in "${{!words[@]}}"; do [ "${{words[i]}}" = --output ] && output=${{words[i + 1]}}; done
    case "$*" in
        *" bench ops "*) files=(ops) ;;
        *" bench step "*) files=(step) ;;
        *" bench growth "*) files=(growth) ;;
        *" bench quality "*) files=(quality) ;;
        *) files=() ;;
    esac
    complete=true
    if [ -n "${{INCOMPLETE:-}}" ]; then complete=false; fi
    for file in "${{files[@]}}"; do echo "{{\\"complete\\": $complete}}" >"$output/$file.json"; done
    if [ ${{#files[@]}} = 0 ]; then echo '{{}}' >"$output"; fi
fi
exit 0
"""

pytestmark = pytest.mark.skipif(
    os.name != "posix" or any(shutil.which(name) is None for name in ("bash", "timeout", "awk", "tar", "sha256sum")),
    reason="needs bash and GNU's tools",
)


@pytest.fixture
def tree(tmp_path):
    """A small copy of the sources, the stand-ins, and nothing of this machine's CUDA."""
    root = tmp_path / "sources"
    for folder in ("csrc", "red_kernels", "tests", "benchmarks"):
        (root / folder).mkdir(parents=True)
        (root / folder / "some.py").write_text(f"{folder} = 1\n")
    shutil.copy(ROOT / "benchmarks/gpu_suite.sh", root / "benchmarks")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("stub", STUB.format(python=sys.executable)), ("compute-sanitizer", SANITIZER)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return root


SANITIZER = """#!/bin/bash
printf '%s|compute-sanitizer %s\\n' "${RED_KERNELS_TEST_ON:-}" "$*" >>"$NOTES"
"""


def call(tree, *arguments, **variables):
    """Run the script; returns the finished process and what the stand-ins were called with."""
    notes = tree.parent / "notes"
    notes.unlink(missing_ok=True)
    programs = tree.parent / "programs"
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHON": str(programs / "stub"),
        "NOTES": str(notes),
        "CUDA_HOME": str(tree / "none"),
        **variables,
    }
    done = subprocess.run(
        ["bash", str(tree / "benchmarks/gpu_suite.sh"), *map(str, arguments)],
        env=environment,
        cwd=tree.parent,
        capture_output=True,
        text=True,
    )
    return done, notes.read_text().splitlines() if notes.exists() else []


def status(folder):
    """Stage to status and exit status, in the order of the summary."""
    lines = (folder / "summary.txt").read_text().splitlines()[1:]
    return {line.split()[0]: tuple(line.split()[1:3]) for line in lines}


def begun(done):
    return [line.split()[1].rstrip(",") for line in done.stdout.splitlines() if line.startswith("--- ")]


def test_everything_in_order_into_few_files(tree, tmp_path):
    done, notes = call(tree, "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert begun(done) == ORDER
    assert list(status(tmp_path / "out")) == ORDER
    assert set(status(tmp_path / "out").values()) == {("done", "0")}
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(
        ["summary.txt", "logs.tar.gz", *(f"{n}.json" for n in ("host", "ops", "step", "growth", "quality", "tune"))]
    )
    assert len(files) <= 8
    with tarfile.open(tmp_path / "out/logs.tar.gz") as archive:
        assert {f"./{stage}.log" for stage in ORDER} <= set(archive.getnames())
    suites = [note.partition("|") for note in notes if "-m pytest" in note]
    assert [on for on, _, what in suites if what.endswith(" tests")] == ["cuda", "triton"]
    assert sum(what.startswith("compute-sanitizer --tool") and on == "cuda" for on, _, what in suites) == 3
    assert sum("tests/backends/test_gpu.py" in what and on == "" for on, _, what in suites) == 1
    benches = [note for note in notes if " bench " in note and "--tune" not in note]
    assert all("--resume --minutes" in note and "--device cuda" in note for note in benches)


def test_the_tests_are_those_of_make_test_gpu():
    makefile, script = ((ROOT / name).read_text() for name in ("Makefile", "benchmarks/gpu_suite.sh"))
    recipe = makefile.split("\ntest-gpu:")[1].split("\n\n")[0]
    files = [word for word in recipe.split() if word.startswith("tests/")]
    assert files
    assert all(f"{name} " in script or f"{name}\n" in script for name in files)
    assert all(
        name in script for name in ("RED_KERNELS_TEST_ON", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "--error-exitcode 99")
    )


def test_a_failing_stage_is_named_and_later_ones_run(tree, tmp_path):
    done, _ = call(tree, "out", FAILING="bench ops")
    assert done.returncode == 1
    assert begun(done) == ORDER
    found = status(tmp_path / "out")
    assert found.pop("ops") == ("failed", "3")
    assert set(found.values()) == {("done", "0")}
    assert "see ops.log" in (tmp_path / "out/summary.txt").read_text()
    with tarfile.open(tmp_path / "out/logs.tar.gz") as archive:
        assert archive.extractfile("./ops.log").read() == b"it broke\n"
    # Another call leaves it alone unless it is asked to try again.
    done, _ = call(tree, "second", "out")
    assert begun(done) == ["environment", "build"]
    assert (done.returncode, status(tmp_path / "second")["ops"]) == (1, ("failed", "3"))
    done, _ = call(tree, "third", "second", GPU_SUITE_RETRY="1")
    assert begun(done) == ["environment", "build", "ops"]
    assert (done.returncode, status(tmp_path / "third")["ops"]) == (0, ("done", "0"))


@pytest.mark.long
def test_a_stage_is_cut_off_and_the_next_call_goes_on(tree, tmp_path):
    done, _ = call(tree, "out", MINUTES="0.4", SLOW="bench ops")  # much more than the stand-ins need
    found = status(tmp_path / "out")
    assert found["ops"][0] == "cut"
    assert found["tests-cuda"] == ("done", "0")
    assert begun(done).index("tune") < max(
        i for i, stage in enumerate(begun(done)) if stage == "ops"
    )  # its second turn
    assert "call again" in done.stdout
    assert done.returncode == 0
    done, notes = call(tree, "out", "out")  # the same folder
    assert begun(done) == ["environment", "build", "ops"]
    assert set(status(tmp_path / "out").values()) == {("done", "0")}
    assert "call again" not in done.stdout
    assert not [note for note in notes if "-m pytest" in note]


def test_without_time_nothing_more_is_begun(tree, tmp_path):
    done, notes = call(tree, "out", MINUTES="0.05", SLOW="e")  # three seconds, and every stage sleeps
    found = status(tmp_path / "out")
    assert found["environment"] == ("cut", "124")
    waiting = [stage for stage, (kind, _) in found.items() if kind == "waiting"]
    assert waiting == ORDER[-len(waiting) :]
    assert {"ops", "remaining"} <= set(waiting)
    assert not set(waiting) & set(begun(done))
    assert not [note for note in notes if " bench " in note]
    assert "call again" in done.stdout


def test_what_was_cut_off_shares_what_is_left(tree, tmp_path):
    """The first of them does not take all the time of every call."""
    done, _ = call(tree, "out", INCOMPLETE="1")
    cut = ["ops", "step", "growth", "remaining"]
    assert [stage for stage, (kind, _) in status(tmp_path / "out").items() if kind == "cut"] == cut
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("--- ")]
    limits = [(line[1].rstrip(","), int(line[-2])) for line in lines]
    again = dict(limits[-4:])
    assert list(again) == cut
    shares = {"ops": 34, "step": 34, "growth": 20, "remaining": 20}
    total = 9 * 60
    for place, stage in enumerate(cut):
        whole = sum(shares[other] for other in cut[place:])
        # Of what is left, which is all but the little that the stand-ins took; percents are whole numbers.
        assert again[stage] <= total * (shares[stage] / whole + 0.01)
    assert again["ops"] < again["step"] < again["growth"] < again["remaining"]


def test_results_of_other_sources_are_not_gone_on_with(tree, tmp_path):
    call(tree, "out")
    (tree / "tests/some.py").write_text("tests = 2\n")
    done, _ = call(tree, "second", "out")
    of_tests = ["tests-cuda", "tests-triton", "tests-gpu", "memcheck", "racecheck", "initcheck"]
    assert begun(done) == ["environment", "build", *of_tests]
    (tree / "benchmarks/some.py").write_text("benchmarks = 2\n")
    (tmp_path / "second/ops.json").write_text('{"complete": true, "old": 1}\n')
    done, _ = call(tree, "third", "second")
    assert begun(done) == ["environment", "build", "host", "ops", "step", "growth", "remaining"]
    assert "ops: PREVIOUS is of other sources" in done.stdout
    assert "old" not in (tmp_path / "third/ops.json").read_text()


def test_without_the_sanitizer_its_stages_are_left_out(tree, tmp_path):
    (tmp_path / "programs/compute-sanitizer").unlink()
    if shutil.which("compute-sanitizer"):
        pytest.skip("there is a compute-sanitizer here")
    done, _ = call(tree, "out")
    assert done.returncode == 0
    assert status(tmp_path / "out")["racecheck"] == ("left-out", "-")
    assert "compute-sanitizer was not found" in (tmp_path / "out/summary.txt").read_text()


def test_without_a_gpu_nothing_else_is_begun(tree):
    done, _ = call(tree, "out", FAILING="torch.cuda.is_available")
    assert done.returncode == 2
    assert begun(done) == ["environment"]
    assert "no GPU that torch can use" in done.stderr


def test_a_dry_run_prints_the_plan_and_does_nothing(tree, tmp_path):
    done, notes = call(tree, "out", GPU_SUITE_DRY="1")
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ORDER
    assert not notes
    assert not (tmp_path / "out").exists()
    call(tree, "out")
    done, _ = call(tree, "out", "out", GPU_SUITE_DRY="1")
    kinds = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[1:]}
    assert kinds["build"] == "waiting"
    assert kinds["ops"] == "done"


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ((), {}, "got 0 arguments, expected OUTPUT [PREVIOUS]"),
        (("out", "nowhere"), {}, "has no logs.tar.gz"),
        (("out",), {"MINUTES": "soon"}, "MINUTES is 'soon', expected a number"),
        (("out",), {"MINUTES": "0"}, "expected more than a second"),
        (("out",), {"PYTHON": "no-such-python"}, "PYTHON is 'no-such-python'"),
    ],
)
def test_wrong_calls(tree, arguments, variables, said):
    done, notes = call(tree, *arguments, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert not notes


@pytest.mark.long
def test_passed_tests_are_left_out_of_the_next_run(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_skipped(): pytest.skip('no')\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_bad(n): assert n == 1 or os.environ.get('MENDED')\n"
    )
    names = tmp_path / "passed"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}

    def run(*more, **variables):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "benchmarks.tools.passed_tests",
                "-p",
                "no:cacheprovider",
                *more,
                "-q",
            ],
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
