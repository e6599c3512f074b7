"""The search for launch rules: what it tries, what wins, what it stores; and the command."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch_tables import TABLE
from old_releases import needs_interpreter
from patience import HANGS
from places import ROOT, python_path
from rich.console import Console

pytest.importorskip("triton")

from red_kernels import cli
from red_kernels.backends.triton import launch, tuned
from red_kernels.backends.triton.rules import Architecture, RowTile
from red_kernels.backends.triton.tuning import candidates, job, matmul, search, workloads
from red_kernels.support import clocks
from red_kernels.support.clocks import Quartiles

CHIP = Architecture("sm_90", 32, 132)
CHIPS = (CHIP, Architecture("sm_80", 32, 108), Architecture("gfx942", 64, 304))


@pytest.mark.parametrize(
    "name", ["norm_forward", "norm_backward", "edit_forward", "edit_backward", "wide_norm", "finish", "linear"]
)
def test_candidates(name: str) -> None:
    """They are a bounded number of tiles that fit, near the factory's own, each once and without it."""
    rule = tuned.RULES[name]
    for chip in CHIPS:
        for width in (7, 768, 5120, 20000):
            values = {"width": width, "itemsize": 2, "sums": 2, "rows": 512, "depth": 3072, "precision": "ieee"}
            key = {parameter: values[parameter] for parameter in rule.parameters}
            default = rule.factory(**key, architecture=chip)
            found = candidates.candidates(rule, key, chip)
            assert {7: 0, 768: 1}.get(width, 5) <= len(found) <= 41
            assert default not in found
            assert len(set(found)) == len(found)
            assert (None in found) == (rule.optional and default is not None)
            for tile in found:
                assert tuned.tile_error(rule, tile, key, chip.warp) is None
                if tile is not None and default is not None:
                    assert 0 < _moves(tile, default) <= (1 if name == "linear" else 2)


def _moves(tile: Any, default: Any) -> int:
    """Doublings and halvings between two tiles; of stages and splits, steps."""
    moves = 0
    for field, value in dataclasses.asdict(tile).items():
        other = getattr(default, field)
        if field in ("stages", "splits"):
            moves += abs(value - other)
        elif field != "chunks":
            moves += abs(value.bit_length() - other.bit_length())
    return moves


def test_quartiles_that_overlap_are_noise() -> None:
    fast, near, slow = Quartiles(1, 2, 3), Quartiles(2.9, 4, 5), Quartiles(3.1, 4, 5)
    assert fast.beats(slow)
    assert not fast.beats(near)
    assert not slow.beats(fast)
    assert clocks.quartiles([[3.0, 1.0], [2.0, 5.0, 4.0]]) == Quartiles(2.0, 3.0, 4.0)


def _decided(
    first: dict[int, float], again: list[dict[int, Quartiles]], monkeypatch: pytest.MonkeyPatch
) -> search.Outcome:
    """A search among tiles of so many warps: ``first`` are their medians while they are chosen, ``again`` what is then
    measured on each workload; 4 warps are the default's."""

    def times(
        target: Any, workload: Any, tiles: Any, left_out: Any, bench: Any, count: int, passes: int
    ) -> dict[Any, Any]:
        named = {tile: tile.warps if tile is not None else 0 for tile in tiles} | {search._DEFAULT: 4}
        if passes == 1:
            return {tile: Quartiles(*[first.get(warps, 100.0)] * 3) for tile, warps in named.items()}
        assert len(tiles) <= search.FINALISTS
        return {tile: again[workload][warps] for tile, warps in named.items()}

    monkeypatch.setattr(search, "_times", times)
    rule = dataclasses.replace(tuned.RULES["norm_forward"], factory=lambda **key: RowTile(1, 1024, 4, 4))
    target = search.Target(rule, (4096, 2), tuple(range(len(again))))  # type: ignore[arg-type]
    bench = search.Bench(torch.device("cpu"), clocks.wall_clock, 0, reach=1)
    with launch.pretending(CHIP):
        return search.search(target, bench)


def test_what_wins_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    default, faster, little, slower = (
        Quartiles(9, 10, 11),
        Quartiles(6, 7, 8),
        Quartiles(8, 9, 10),
        Quartiles(12, 13, 14),
    )

    outcome = _decided({4: 10, 2: 7, 8: 8}, [{4: default, 2: faster, 8: little}], monkeypatch)
    assert outcome.won
    assert outcome.tile == RowTile(1, 1024, 4, 2)
    assert outcome.ratio == pytest.approx(10 / 7)
    # what is noise when it is measured again does not count, however fast it was at first
    assert not _decided({4: 10, 2: 1}, [{4: default, 2: little}], monkeypatch).won
    # nor what loses somewhere; but it may be as fast as the default there
    assert not _decided({4: 10, 2: 7}, [{4: default, 2: faster}, {4: default, 2: slower}], monkeypatch).won
    outcome = _decided({4: 10, 2: 7}, [{4: default, 2: faster}, {4: default, 2: little}], monkeypatch)
    assert outcome.won
    assert outcome.ratio == pytest.approx((10 / 7 * 10 / 9) ** 0.5)
    # none is faster at first: nothing is measured again
    assert not _decided({4: 10, 2: 11}, [{}], monkeypatch).won


def test_results_that_differ() -> None:
    right = torch.randn(64, 32, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        expected = (right.to(dtype), None)
        assert search.difference(expected, expected, 32) is None
        rounded_otherwise = (torch.nextafter(right.to(dtype), torch.tensor(9.0, dtype=dtype)), None)
        assert search.difference(rounded_otherwise, expected, 32) is None
        wrong = right.to(dtype)
        wrong[3] = 0
        assert "result 0 is off by" in str(search.difference((wrong, None), expected, 32))
        search.poison((wrong,))
        assert "result 0 is off by nan" in str(search.difference((wrong, None), expected, 32))


def test_inputs_are_beyond_the_cache() -> None:
    work = workloads.Pass("edit_add", False, "bf16", 64, 128)
    sets = workloads.input_sets(work, torch.device("cpu"), 10 * 2 * 64 * 128 * 2)
    assert sum(t.numel() * t.element_size() for tensors in sets for t in tensors.values()) >= 10 * 2 * 64 * 128 * 2
    assert len({tensors["x"].data_ptr() for tensors in sets}) == len(sets) > 9
    assert not torch.equal(sets[0]["x"], sets[1]["x"])
    assert len(workloads.input_sets(work, torch.device("cpu"), 0)) == 2


def test_only_rules_in_use_are_searched() -> None:
    """Rows that are held have no use for the rules of wide ones, and the other way round."""
    bench = search.Bench(torch.device("cpu"), clocks.wall_clock, 0)
    passes = [
        workloads.Pass(name, backward, "bf16", 512, width, 2)
        for name in ("edit_add_rms_norm", "layer_norm_edit") for width in (1024, 20000) for backward in (False, True)
    ]  # fmt: skip
    with launch.pretending(CHIP):
        found = search.targets(passes, bench)
    assert [(target.rule.name, *target.arguments, len(target.workloads)) for target in found] == [
        ("norm_forward", 1024, 2, 2), ("norm_backward", 1024, 2, 2, 2), ("finish", 1024, 2),
        ("norm_forward", 20000, 2, 2), ("wide_norm", 20000, 2, 4), ("norm_backward", 20000, 2, 2, 2),
        ("wide_backward", 20000, 2, 2), ("finish", 20000, 2),
    ]  # fmt: skip


def test_launches_that_are_timed() -> None:
    """A rule of the finishing kernel is timed by that kernel, others by all; every tile writes the same results."""
    work = workloads.Pass("edit_add_rms_norm", True, "bf16", 64, 128, 2)
    call = partial(work.call, work.tensors(torch.device("cpu"), 0))
    tile = RowTile(2, 128, 1, 4, 3)
    with launch.pretending(CHIP):
        default, _ = workloads.record(call, {})
        found, asked = workloads.record(call, {"norm_backward": tile})
    assert ("norm_backward", 128, 2, 2) in asked
    assert found.shapes()[0][:4] == ("norm_backward", (32, 1, 1), (128, 2, 128, 1, False), 4)
    for rule, expected in (("norm_backward", ["norm_backward", "add_lines"]), ("finish", ["add_lines"])):
        started: list[str] = []
        with launch.recording(lambda kernel, *rest, to=started: to.append(kernel.name)):  # type: ignore[misc]
            found.runner(rule)()
        assert started == expected

    own = {id(t) for t in found.results if t is not None}
    theirs = {id(t) for t in default.results if t is not None}
    assert len(own) == len(theirs) == 4
    found.write_into(default.results)
    assert found.results is default.results
    tensors = {id(t) for _, (_, tensors, *_) in found.kernels for t in tensors if t is not None}
    assert theirs <= tensors
    assert not own & tensors


def test_kernels_that_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    spills = {"norm_backward": 0, "add_lines": 0}
    monkeypatch.setattr(launch.Kernel, "compiled", lambda self, *rest: SimpleNamespace(n_spills=spills[self.name]))
    work = workloads.Pass("edit_add_rms_norm", True, "bf16", 4, 8, 2)
    with launch.pretending(CHIP):
        found, _ = workloads.record(partial(work.call, work.tensors(torch.device("cpu"), 0)), {})
    assert found.spilling() is None
    spills["add_lines"] = 12
    assert found.spilling() == "add_lines spills 12 registers"


def _outcome(target: search.Target, low: float) -> search.Outcome:
    tile, default = Quartiles(low, low, low), Quartiles(2, 2, 2)
    cases = tuple(search.Case(workload, tile, default) for workload in target.workloads)
    return search.Outcome(target, RowTile(1, 128, 1, 4), 5, True, RowTile(2, 128, 1, 4), cases)


def test_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is written after each result: an interruption, or too little memory for a size, loses no other."""
    passes = tuple(workloads.Pass("edit_add_rms_norm", False, "bf16", 4, width) for width in (128, 127, 126, 125))
    rule = tuned.RULES["norm_forward"]
    found = [search.Target(rule, (work.width, 2), (work,)) for work in passes]
    shown = io.StringIO()

    def result(target: search.Target, bench: search.Bench) -> search.Outcome:
        if target.arguments[0] == 127:
            raise torch.OutOfMemoryError("out of memory")
        if target.arguments[0] == 125:
            raise KeyboardInterrupt
        return _outcome(target, 1.0)

    monkeypatch.setattr(job, "targets", lambda *rest: found)
    monkeypatch.setattr(job, "search", result)
    bench = search.Bench(torch.device("cpu"), clocks.wall_clock, 0)
    output = tmp_path / "new" / "table.json"
    with launch.pretending(CHIP), pytest.raises(KeyboardInterrupt):
        job.tune(job.Settings(output=output), Console(file=shown, width=200), bench)
    assert list(tuned.parse(output.read_text(), "it", output).tiles) == [(rule.name, 128, 2), (rule.name, 126, 2)]
    assert "norm_forward, width 127, itemsize 2: not searched, the device has too little memory" in shown.getvalue()


def test_the_fused_matmul_has_to_win_every_case() -> None:
    target = search.Target(tuned.RULES["norm_forward"], (128, 2), (workloads.Pass("edit", False, "bf16", 4, 128),))
    (win,), (tie,) = _outcome(target, 1.0).cases, _outcome(target, 2.0).cases
    assert matmul.wins([win, win])
    assert not matmul.wins([win, tie])
    assert not matmul.wins([])


def _worker(task: str, folder: Path, **variables: str) -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **variables}
    environment.pop("RED_KERNELS_BACKEND", None)
    environment["PYTHONPATH"] = python_path()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tune_worker.py")), task, str(folder)],
        env=environment, capture_output=True, text=True, timeout=HANGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_interpreter
def test_search_store_reload_use(tmp_path: Path) -> None:
    """By a clock that counts programs a tile of twice as many rows is faster: 2 programs for 40 rows, not 3."""
    found = _worker("search", tmp_path)
    entries = {entry["rule"]: entry for entry in found["table"]["entries"]}
    assert set(entries) == {"norm_forward", "norm_backward"}  # the finishing kernel takes one program whatever its tile
    forward = entries["norm_forward"]
    assert forward["default"] == found["default"] == found["other"]
    assert forward["tile"] == {**found["default"], "rows": 2 * found["default"]["rows"]} == found["rule"]
    assert forward["ratio"] == pytest.approx(1.5)
    (case,) = forward["measured"]
    assert (case["operation"], case["dtype"], case["rows"]) == ("edit_add_rms_norm forward", "fp32", 40)
    assert case["microseconds"] == {"low": 2.0, "median": 2.0, "high": 2.0}
    assert case["default_microseconds"]["median"] == 3.0
    assert found["table"]["versions"]["torch"] == torch.__version__
    assert "norm_forward, width 24, itemsize 4" in found["shown"]
    assert "finish, width 24" in found["shown"]
    assert "left out" not in found["shown"]  # every candidate computed what the default did

    assert found["during"] == found["before"]
    names = [name for name, *_ in found["after"]]
    assert names == [name for name, *_ in found["before"]] == ["norm_forward", "norm_backward", "add_lines"]
    for name, constants, warps in found["after"][:2]:
        tile = entries[name]["tile"]
        assert constants == [24, tile["rows"], tile["chunk"], tile["chunks"], False]
        assert warps == tile["warps"]
    assert found["after"][2] == found["before"][2]
    # one rounding, and fp32 sums of 40 rows and 24 columns
    assert max(found["errors"].values()) < (1 + 40**0.5) * torch.finfo(torch.float32).eps
    assert list(tmp_path.iterdir()) == [tmp_path / "table.json"]


@pytest.mark.long
def test_search_by_real_times(tmp_path: Path) -> None:
    found = _worker("wall", tmp_path)
    for target in (
        "norm_forward, width 24, itemsize 2:",
        "norm_backward, width 24, itemsize 2, sums 4:",
        "finish, width 24:",
    ):
        assert target in found["shown"]
    assert "left out" not in found["shown"]
    for entry in found["table"]["entries"]:  # none, or what the noise of the moment made faster
        for case in entry["measured"]:
            assert 0 < case["microseconds"]["low"] <= case["microseconds"]["median"] <= case["microseconds"]["high"]
        assert entry["ratio"] > 1


@pytest.mark.long
def test_where_the_fused_matmul_wins_it_is_used(tmp_path: Path) -> None:
    """By a clock for which the composed form is slow up to 8 rows; m stands for all numbers from above its half."""
    found = _worker("products", tmp_path)
    assert found["table"]["entries"] == []  # every tile takes the same time by this clock
    (win,) = found["table"]["linear_wins"]
    assert (win["dtype"], win["m"], win["n"], win["k"]) == ("bfloat16", 8, 24, 96)
    assert win["ratio"] == pytest.approx(100)
    assert [(case["operation"], case["rows"]) for case in win["measured"]] == [
        ("linear_edit", 8), ("linear_edit without residual", 8),
        ("linear_edit", 6), ("linear_edit without residual", 6),
    ]  # fmt: skip
    assert "linear_edit bfloat16, m 8, n 24, k 96: fused wins, 100.00x the composed form" in found["shown"]
    assert "linear_edit bfloat16, m 16, n 24, k 96: fused does not win, 1.00x the composed form" in found["shown"]
    assert found["used"] == {"4": False, "5": True, "6": True, "8": True, "9": False, "16": False}


@pytest.mark.long
def test_tiles_that_do_not_compile_or_compute_something_else(tmp_path: Path) -> None:
    """They are left out, and said to be; the search goes on."""
    found = _worker("broken", tmp_path)
    assert [entry["rule"] for entry in found["table"]["entries"]] == ["norm_backward"]
    shown = found["shown"]
    assert (
        "rows 32, chunk 32, chunks 1, warps 4, programs 0: RuntimeError: [32 rows] are out of resources (edit" in shown
    )
    assert "warps 8, programs 0: wrong: result 0 is off by nan" in shown
    assert "2 tiles were left out for the reasons above." in shown


def test_a_wrong_table_is_an_error_at_first_use(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(TABLE))
    found = _worker("first_use", tmp_path, RED_KERNELS_TRITON_TABLE=str(tmp_path / "own.json"))
    error = f"{tuned.VARIABLE}: {tmp_path / 'own.json'} is a table for 'sm_90', and this device is 'interpreter'"
    assert found == {"errors": [f"ValueError: {error}"] * 2, "others work": True}


@pytest.mark.parametrize(
    ("table", "state"),
    [
        ({**TABLE, "architecture": "interpreter"}, "interpreter: 5 measured launch rules, and 1 sizes"),
        (TABLE, "interpreter: launch rules cannot be used: RED_KERNELS_TRITON_TABLE: "),
        (None, "interpreter: no table of measured launch rules"),
    ],
)  # fmt: skip
def test_info_says_whether_a_table_is_in_use(table: Any, state: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "COLUMNS": "1000", "PYTHONPATH": str(ROOT)}
    if table is not None:
        (tmp_path / "own.json").write_text(json.dumps(table))
        environment[tuned.VARIABLE] = str(tmp_path / "own.json")
    done = subprocess.run(
        [sys.executable, "-m", "red_kernels", "info"], env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    assert state in done.stdout
    assert "available; Triton 3." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune", "--quick"], "--quick: not an option of the search for launch rules"),
        (["ops", "--tune"], "--tune is a separate job, got the job ops"),
        (["--sums", "2"], "--sums is for --tune"),
        (["--tune"], "measures the Triton kernels on a GPU, and torch .* finds none here"),
    ],
)
def test_bench_says_what_is_missing(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", *arguments]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"operations": ("norm",)}, "operations: got 'norm', expected some of edit, edit_add, .*linear_edit"),
        ({"dtypes": ("fp64",)}, "dtypes: got 'fp64', expected some of fp32, bf16, fp16"),
        ({"widths": (768, 0)}, "widths: got 0, expected positive numbers"),
        ({"rows": (-1,)}, "rows: got -1, expected positive numbers"),
        ({"rows": ()}, "rows: got nothing, expected one value or more"),
        ({"widths": (8, 8)}, "widths: got 8, 8, expected each value once"),
        ({"sums": (5,)}, "sums: got 5, expected numbers from 1 to 4"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job.Settings(**settings)


def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is measured, and an older table stays."""
    monkeypatch.setattr(job, "targets", None)
    bench = search.Bench(torch.device("cpu"), clocks.wall_clock, 0)
    (tmp_path / "table.json").write_text("older")
    for output, error, message in (
        (tmp_path, IsADirectoryError, "is a folder, expected the name of a file"),
        (tmp_path / "table.json", FileExistsError, "exists; remedy: --overwrite, or another name"),
        (tmp_path / "table.json" / "table.json", OSError, "table.json"),
    ):
        with pytest.raises(error, match=message):
            job.tune(job.Settings(output=output), None, bench)  # type: ignore[arg-type]
    assert (tmp_path / "table.json").read_text() == "older"
    assert list(tmp_path.iterdir()) == [tmp_path / "table.json"]


def test_a_build_holds_the_tables(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
    shutil.copy2(ROOT / "csrc/build.py", tmp_path / "csrc/build.py")
    shutil.copytree(
        ROOT / "red_kernels", tmp_path / "red_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    tables = tmp_path / "red_kernels/backends/triton/tables"
    (tables / "sm_00.json").write_text("{}")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"], cwd=tmp_path, check=True, timeout=HANGS,
        capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "built/red_kernels/backends/triton/tables/sm_00.json").is_file()
    assert (tmp_path / "built/red_kernels/backends/triton/tuning/job.py").is_file()


@pytest.mark.skipif(not torch.cuda.is_available() or launch.INTERPRETED, reason="needs a GPU")
def test_search_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "table.json"
    settings = job.Settings(output, ("edit_add_rms_norm", "linear_edit"), (256,), ("bf16",), (256,))
    bench = dataclasses.replace(job.gpu_bench(), reach=1, rounds=3, confirming_rounds=3, passes=2)
    job.tune(settings, Console(), bench)
    monkeypatch.setenv(tuned.VARIABLE, str(output))
    chip = bench.architecture
    read = tuned.table_for(chip.name, chip.warp)
    assert read is not None
    assert read.device == torch.cuda.get_device_name()
