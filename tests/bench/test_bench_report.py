"""What is made from files of results: figures, losses shown like wins, and texts that agree with the files."""

from __future__ import annotations

import json
import math
import re
import sys

import made_results as made
import pytest

from benchmarks.report import __main__ as report
from benchmarks.report import kinds, quality, tables
from benchmarks.report import losses as against
from benchmarks.report.documents import BEGIN, END, NOTHING, performance, put_block
from benchmarks.report.figures import (
    Spread,
    growth_series,
    method_figures,
    operation_figures,
    operation_memory,
    size_class,
    worst_cases,
)
from benchmarks.report.plots import LOOKS, write_plots
from benchmarks.report.results import load, load_folder
from benchmarks.report.summary import MOST_ROWS, ROWS, summary
from benchmarks.report.text import number, ratio, ratios, table, time

README = f"# Some\n\ntext\n{BEGIN}\nold\n{END}\nmore\n"


@pytest.fixture
def root(tmp_path):
    """A folder with a README and the results of a CPU and a GPU."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    results = tmp_path / "benchmarks" / "results"
    made.write(results / "a-cpu", made.everything())
    made.write(results / "b-gpu", made.everything(gpu=True))
    (results / "flat.json").write_text("another form")
    return tmp_path


def one_case(**seconds):
    case = made.operation_case("edit", "bf16", 10, 100)
    case["seconds"] = {"both": {name: made.timing(value, 0.0) for name, value in seconds.items()}}
    case["bytes"] = {"both": 8_000_000_000}
    return case


def test_the_readme_and_the_page_agree_with_the_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr()


def test_figures_of_operations():
    first, second = one_case(cpu=2.0, eager=4.0, liger=3.0, copy=1.0), one_case(cpu=1.0, eager=8.0, liger=0.5, copy=1.0)
    second["rows"] = 20
    (found,) = operation_figures(made.frame("ops", [first, second]), gpu=False)
    assert (found.operation, found.dtype, found.size, found.which, found.ours) == (
        "edit",
        "bf16",
        "under 1M",
        "both",
        "cpu",
    )
    assert found.peers["eager"] == Spread(pytest.approx(4.0), 2.0, 8.0, 2)
    assert found.best_peer == Spread(pytest.approx(math.sqrt(1.5 * 0.5)), 0.5, 1.5, 2)
    assert found.over_floor == Spread(pytest.approx(math.sqrt(2)), 1.0, 2.0, 2)
    assert found.gigabytes == Spread(pytest.approx(math.sqrt(32)), 4.0, 8.0, 2)
    behind, above = worst_cases(made.frame("ops", [first, second]), "edit", "", "cpu")
    assert (behind.value, behind.peer) == (0.5, "liger")
    assert "20 x 100" in behind.where
    assert above.value == 2.0
    assert "10 x 100" in above.where


def test_figures_without_peers_or_copies():
    (found,) = operation_figures(made.frame("ops", [one_case(cpu=2.0)]), gpu=False)
    assert (found.peers, found.best_peer, found.over_floor) == ({}, None, None)
    assert ratios(found.best_peer) == "–"


def test_backends_of_a_gpu_are_apart():
    content = made.operations(gpu=True, names=("edit",))
    groups = operation_figures(content, gpu=True)
    assert {group.ours for group in groups} == {"cuda", "triton"}
    assert {group.size for group in groups} == {"under 1M", "1M to 3M", "3M to 16M", "over 16M"}
    cuda, triton = groups[0], groups[1]
    assert cuda.peers["eager"].mean == pytest.approx(1.1 * triton.peers["eager"].mean)


@pytest.mark.parametrize(
    ("elements", "gpu", "name"),
    [
        (999_999, False, "under 1M"),
        (1_000_000, False, "1M to 3M"),
        (3_000_000, True, "1M to 3M"),
        (3_000_001, False, "over 3M"),
        (16_000_000, True, "3M to 16M"),
        (16_000_001, True, "over 16M"),
        (10**10, False, "over 3M"),
    ],
)
def test_classes_of_sizes(elements, gpu, name):
    assert size_class(elements, gpu) == name


def test_memory_of_operations():
    case = one_case(cpu=1.0)
    case["peak_bytes"] = {"cpu": 100, "eager": 150, "copy": 1}
    assert operation_memory(made.frame("ops", [case])) == {
        ("edit", "", "bf16", "cpu"): {"eager": Spread(1.5, 1.5, 1.5, 1)}
    }


def test_figures_of_methods():
    case = made.step_case("SmolLM2-135M", 256, 2.0)
    found = {method.method: method for method in method_figures(case)}
    assert list(found) == list(made.STEPS)
    assert found["red"].over_floor == pytest.approx(1.006)
    assert found["red"].tokens == pytest.approx(1024 / 2.012)
    assert found["lora-all"].memory_over_floor == pytest.approx(1.42**2)
    assert found["red"].trainable == 34_560
    case["over_floor"] = {name: made.timing(value) for name, value in (("frozen-fused", 1.0), ("red", 1.004))}
    ratios = {method.method: method.over_floor for method in method_figures(case)}
    assert (ratios["red"], ratios["lora-all"]) == (1.004, found["lora-all"].over_floor)  # by round, where that is there
    del case["seconds"]["frozen-fused"]
    assert {method.over_floor for method in method_figures(case)} == {None}


def test_growth_is_by_axis():
    series = growth_series(made.growth())
    assert [title.partition(" ")[0] for title, _ in series] == ["layers", "width", "tokens", "edits"]
    assert [case["value"] for case in series[2][1]] == [128, 512, 2048, 8192]


def device(tmp_path, **contents):
    return load_folder(made.write(tmp_path / "one", contents))


def test_losses_are_beyond_the_spread_only(tmp_path):
    near, far, memory = one_case(cpu=1.0, eager=0.9), one_case(cpu=1.0, eager=0.8), one_case(cpu=1.0)
    near["seconds"]["both"]["eager"]["high"] = 1.0
    for case, peak in ((near, {}), (far, {}), (memory, {"cpu": 100, "liger": 80})):
        case["peak_bytes"] = peak
    found = device(tmp_path, ops=made.frame("ops", [near, far, memory]))
    time_lost, memory_lost = against.losses(found)
    assert (time_lost.peer, time_lost.what, time_lost.ratio) == ("eager", "time", pytest.approx(1.25))
    assert (memory_lost.peer, memory_lost.what, memory_lost.ratio) == ("liger", "memory", 1.25)
    assert against.comparisons(found) == {"operations, time": (1, 2), "operations, memory": (1, 1)}
    text = "\n".join(tables.loss_tables(found))
    assert "| edit, bf16, 10 x 100, fresh, both | time | cpu | eager | 1.00 s (1.00 s to 1.00 s) against 800 ms" in text
    assert "| operations, time | 1 | 2 |" in text


def test_losses_of_steps_host_and_scores(tmp_path):
    steps, operations, growth = made.steps(), made.operations(sizes=made.SIZES[:1]), made.growth()
    case = steps["cases"][0]
    case["seconds"]["naive"] = made.timing(0.5)
    case["seconds"]["frozen"] = made.timing(0.4)  # trains nothing, so it is nobody's peer
    operations["host"][0]["seconds"]["forward"]["eager"] = made.timing(1e-6)
    growth["cases"][0]["seconds"]["lora-all"] = made.timing(1e-3)
    found = device(tmp_path, ops=operations, step=steps, growth=growth, quality=made.quality())
    lost = {(loss.job, loss.ours, loss.peer, loss.what) for loss in against.losses(found)}
    assert {key for key in lost if key[0] != "ops"} == {
        ("host", "cpu", "eager", "time"),
        ("step", "red", "naive", "time"),
        ("step", "red-compile", "naive", "time"),
        ("growth", "red", "lora-all", "time"),
        ("quality", "red", "full", "accuracy"),  # 80.1 and 78.2, with 0.4 each
        ("quality", "red", "full", "perplexity"),
    }
    text = performance([found], tmp_path)
    assert text.count("| red | full | 78.20 ± 0.40 against 80.10 ± 0.40 |") == 1


def test_a_diverged_method_is_said_and_lost(tmp_path):
    content = made.quality()
    for case in content["cases"]:
        if (case["task"], case["method"]) in (("sentiment", "red"), ("language-modelling", "full")):
            case.update(mean=None, spread=None)
    found = device(tmp_path, quality=content)
    lost = {(loss.where, loss.peer) for loss in against.losses(found)}
    peers = {"naive", "lora-all", "ia3", "linear-probe", "full"}
    assert lost == {("sentiment", peer) for peer in peers}
    assert "| `full` | diverged |" in performance([found], tmp_path)


def test_goals_that_are_missed(tmp_path):
    steps = made.steps()
    for case, over in zip(steps["cases"], (1.011, 1.5), strict=True):
        case["seconds"]["red"] = made.timing(case["seconds"]["frozen-fused"]["median"] * over)
    operations = made.operations(gpu=True, sizes=made.SIZES[:1])
    found = device(tmp_path, ops=operations, step=steps)
    near, far, host = against.missed_goals(found)
    assert near.found == "1.011 (the quartiles reach it)"
    assert far.found == "1.50 (beyond the quartiles)"
    assert host.goal == "under 10 us"
    assert "Goals missed: 3 of 3." in tables.loss_tables(found)
    operations["host"][0]["seconds"]["forward"]["cuda"] = made.timing(9e-6)
    assert len(against.missed_goals(device(tmp_path, ops=operations, step=made.steps()))) == 0


def test_what_is_missing_failed_or_incomplete_is_said(tmp_path):
    steps = made.steps()
    steps.update(
        complete=False, planned=9, failed=[{"model": "GPT-2", "batch": 4, "error": "OutOfMemoryError: too | big"}]
    )
    steps["cases"][0]["left_out"] = {"ia3": "has no\nsuch layer"}
    del steps["cases"][0]["seconds"]["ia3"]
    found = device(tmp_path, step=steps, ops=made.operations())
    text = performance([found], tmp_path)
    assert "**`step.json` is incomplete: 2 of 9 cases measured.**" in text
    assert "| step.json | GPT-2, 4 | failed: OutOfMemoryError: too \\| big |" in text
    assert "| step.json | quack | not installed |" in text
    assert "| step.json | ia3 of SmolLM2-135M | has no such layer |" in text
    assert "| `ia3` | left out: has no such layer |" in text
    assert "| ops.json | apex of edit (14 cases) | has no RMSNorm |" in text
    assert "2 of 9" in summary([found], {})


def test_environments_that_differ_are_told_apart(tmp_path):
    operations, steps = made.operations(), made.steps()
    steps["environment"]["commit"] = "another"
    text = tables.environment_table(device(tmp_path, ops=operations, step=steps))
    assert "| commit | ops: 0123456789abcdef; step: another |" in text
    assert "| torch | 2.11.0 |" in text


def test_writes_and_checks(root, capsys):
    assert report.main(["--root", str(root), "--check"]) == 1
    assert "--- README.md" in capsys.readouterr().out
    assert (root / "README.md").read_text() == README
    assert not (root / "docs/performance.md").exists()
    assert report.main(["--root", str(root)]) == 0
    assert report.main(["--root", str(root), "--check"]) == 0
    readme, page = (root / "README.md").read_text(), (root / "docs/performance.md").read_text()
    assert readme.startswith(f"# Some\n\ntext\n{BEGIN}\n")
    assert readme.endswith(f"{END}\nmore\n")
    assert len(readme.splitlines()) < 50
    assert "|  | a-cpu | b-gpu |" in page
    assert page.index("## All devices") < page.index("## a-cpu") < page.index("## b-gpu")
    for changed in ("README.md", "docs/performance.md"):
        text = (root / changed).read_text()
        assert "1.42" in text
        (root / changed).write_text(text.replace("1.42", "99.90"))
        assert report.main(["--root", str(root), "--check"]) == 1
        assert "99.90" in capsys.readouterr().out
        (root / changed).write_text(text)
    # As do files that say something else.
    path = root / "benchmarks/results/a-cpu/step.json"
    path.write_text(path.read_text().replace("1.6,", "1.7,"))
    assert report.main(["--root", str(root), "--check"]) == 1


def rows_of(text):
    """By what the README calls a method: the other cells of its row, of each table in order."""
    found = {}
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith(("| ---", "| training step")):
            title, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found.setdefault(title, []).append(cells)
    return found


def test_the_readme_has_a_table_of_eight_rows_for_each_training_step(root):
    devices = load(root / "benchmarks/results")
    scores = {case["method"]: case for case in made.quality()["cases"] if case["task"] == "sentiment"}
    rows = rows_of(summary(devices, {"sentiment": scores}))
    assert len(rows) == len(ROWS) == MOST_ROWS
    assert {len(tables) for tables in rows.values()} == {2}  # one of the CPU's model, one of the GPU's
    trained, seconds, over, memory, accuracy = rows["**RED, fused**"][0]
    assert (trained, seconds, memory, accuracy) == ("34,560", "1.61 s", "2,895 MiB", "78.20 ± 0.40")
    assert over.startswith("1.006 (")
    assert rows["RED, fused, `torch.compile`"][0][-1] == "–"  # no score of its own
    assert rows["frozen model"][0][-1] == "74.00 ± 0.40"  # of its head alone
    unknown = summary(devices, {})
    assert "Accuracy: " not in unknown
    assert rows_of(unknown)["full fine-tuning"][0][-1] == "–"
    assert max(len(line) for line in unknown.splitlines() if not line.startswith("|")) <= 120


def test_devices_that_measured_one_step_share_a_table(tmp_path):
    first, second = made.steps(), made.steps()
    for case in second["cases"]:
        del case["peak_bytes"], case["seconds"]["ia3"]
    made.write(tmp_path / "a", {"step": first})
    made.write(tmp_path / "b", {"step": second})
    text = summary(load(tmp_path), {})
    assert "time, a | over frozen | memory | time, b | over frozen | accuracy" in text
    (ia3,) = rows_of(text)["IA3 (PEFT)"]
    assert ia3[-3:] == ["–", "–", "–"]


def test_the_page_of_kinds(root, capsys):
    page = root / "docs" / "kinds.md"
    page.write_text(f"# Kinds\n{BEGIN}\n{END}\nmore\n")
    assert report.main(["--root", str(root)]) == 0
    assert kinds.NOTHING in page.read_text()
    steps = made.steps()
    for case in steps["cases"]:
        for values in (case["seconds"], case["peak_bytes"], case["trainable"]):
            values["rotation"] = values["red"]
        case.pop("over_floor", None)
    folder = root / "benchmarks/results/kinds/a-cpu"
    made.write(folder, {**made.everything(), "step": steps})
    made.write(root / "benchmarks/results/quality/a-cpu", {"quality": made.quality()})
    over = {"all": 1.0, "rotation": 1.04, "copy": 0.5}
    mixes = [{"pass": "forward", "rows": 8, "width": 64, "dtype": "fp32", "blocks": 4, "over_all": over}]
    (folder / "mixes.json").write_text(json.dumps({"environment": {"instruction_set": "avx2"}, "results": mixes}))
    assert report.main(["--root", str(root), "--check"]) == 1
    assert report.main(["--root", str(root)]) == 0
    assert report.main(["--root", str(root), "--check"]) == 0
    lines = page.read_text().splitlines()
    assert lines[-1] == "more"
    (red,) = (line for line in lines if line.startswith("| `red` |"))
    (rotation,) = (line for line in lines if line.startswith("| `rotation` |"))
    assert red.split("|")[2:-3] == rotation.split("|")[2:-3]
    assert "78.20" in red
    assert rotation.endswith("| – | – |")
    assert "| rotation | 1.040 |" in lines
    assert "| copy | 0.50 |" in lines


def test_the_page_of_quality(root, capsys):
    """From several runs together: each has some of the methods, on one budget."""
    page = root / "docs" / "quality.md"
    page.write_text(f"# Quality\n{BEGIN}\n{END}\nmore\n")
    assert report.main(["--root", str(root)]) == 0
    assert quality.NOTHING in page.read_text()
    first, second = made.quality(), made.quality()
    of_first = ("base", "red", "lora-all")
    first["cases"] = [case for case in first["cases"] if case["method"] in of_first]
    second["cases"] = [case for case in second["cases"] if case["method"] not in of_first[1:]]
    folders = [root / "benchmarks/results/quality" / name for name in ("one", "two")]
    for folder, content in zip(folders, (first, second), strict=True):
        made.write(folder, {"quality": content})
    assert report.main(["--root", str(root), "--check"]) == 1
    assert report.main(["--root", str(root)]) == 0
    assert report.main(["--root", str(root), "--check"]) == 0
    lines = page.read_text().splitlines()
    assert lines.index("### Sentiment") < lines.index("### Language-modelling")
    rows = {line.split("|")[1].strip(" `"): line.split("|")[2:-1] for line in lines if line.startswith("| `")}
    sentiment = [line for line in lines if line.startswith("| `")][:7]
    assert [line.split("`")[1] for line in sentiment] == [
        *("base", "red", "naive", "lora-all", "ia3", "linear-probe", "full")
    ]
    assert " 78.20 ± 0.40 | (-0.70) | 0.01 | 0.320, 0.220, 0.220 | 40 | 55.0 MiB |" in sentiment[1]
    assert "| +1.20 |" in sentiment[-1]  # beyond both deviations
    assert "| +0.25 |" in "|".join(rows["full"])  # a perplexity: less is better
    assert {row.split("|")[2].strip() for row in sentiment[1:]} == {"fp32"}
    second["cases"][-1]["products"] = "bf16"  # of another processor: it is said, and no other budget
    made.write(folders[1], {"quality": second})
    assert report.main(["--root", str(root)]) == 0
    assert page.read_text().count("| bf16 |") == 1
    second["cases"].append(first["cases"][1])
    made.write(folders[1], {"quality": second})
    capsys.readouterr()
    assert report.main(["--root", str(root)]) == 1
    assert "red on sentiment is in one and in two" in capsys.readouterr().err
    second["cases"][-1] = {**second["cases"][-1], "method": "road", "steps": 200}
    made.write(folders[1], {"quality": second})
    assert report.main(["--root", str(root)]) == 1
    assert "two: road on sentiment has steps 200, and red has 400" in capsys.readouterr().err


def test_every_table_has_its_columns(root):
    page = performance(load(root / "benchmarks/results"), root / "docs")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    width = None
    for before, line in zip([None, *page.splitlines()], page.splitlines(), strict=False):
        if line.startswith("|"):
            count = len(re.findall(r"(?<!\\)\|", line))
            assert width is None or not (before or "").startswith("|") or count == width, line
            width = count
    assert len(rows) > 100


def test_pictures_are_shown_where_they_are(root):
    pytest.importorskip("matplotlib")
    folder = root / "benchmarks/results/b-gpu"
    written = write_plots(folder)
    names = {path.name for path in written}
    assert names == {
        *("bandwidth-bf16.png", "bandwidth-fp32.png", "step-time.png", "step-memory.png", "growth.png", "quality.png")
    }
    assert {path.name for path in folder.glob("*.png")} == names
    page = performance(load(root / "benchmarks/results"), root / "docs")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert len(shown) == len(names)
    assert all((root / "docs" / name).resolve().is_file() for name in shown)
    first = {path: path.read_bytes() for path in written}
    assert all(content.startswith(b"\x89PNG") and 2000 < len(content) < 120_000 for content in first.values())
    assert not any(b"Software" in content or b"tIME" in content for content in first.values())
    assert {path: path.read_bytes() for path in write_plots(folder)} == first


def test_pictures_of_few_and_of_quick_results(tmp_path):
    pytest.importorskip("matplotlib")
    assert write_plots(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    empty = made.frame("step", [])
    assert write_plots(made.write(tmp_path / "empty", {"step": empty})) == []
    quick = made.frame("step", [made.step_case("some", 8, 0.1)])
    quick["quick"] = True
    for case in quick["cases"]:
        case["peak_bytes"] = {}
        case["seconds"] = {"a-method": made.timing(0.1), "red": made.timing(0.2)}
    alone = made.frame("ops", [one_case(cpu=1.0)])
    written = write_plots(made.write(tmp_path / "quick", {"step": quick, "ops": alone}))
    assert [path.name for path in written] == ["bandwidth-bf16.png", "step-time.png"]


def test_without_matplotlib_the_remedy_is_named(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        write_plots(root / "benchmarks/results/a-cpu")


def test_every_name_has_a_look_of_its_own():
    implementations = ("cuda", "triton", *made.PEERS, "quack", "flash-attention", "apex")
    for names in (
        implementations,
        ("red", "red-compile", "naive", "naive-compile", "lora-qv", "lora-all", "ia3", "bitfit", "full"),
    ):
        looks = [LOOKS[name] for name in names]
        assert len({(look.color, look.line) for look in looks}) == len(looks)
        assert len({look.marker for look in looks}) == len(looks)
        assert len({look.hatch for look in looks}) == len(looks)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quick": True}, "ops.json is a quick run"),
        ({"job": "step"}, "ops.json is of job 'step', expected 'ops'"),
        ({"schema": 99}, "is not a file of results of schema"),
    ],
)
def test_files_that_no_report_is_made_from(root, change, said, capsys):
    path = root / "benchmarks/results/a-cpu/ops.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert report.main(["--root", str(root)]) == 1
    assert said in capsys.readouterr().err
    assert (root / "README.md").read_text() == README


@pytest.mark.parametrize("text", ["none", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{BEGIN}\n{END}\n"])
def test_a_readme_without_one_pair_of_marks_is_refused(root, text, capsys):
    (root / "README.md").write_text(text)
    assert report.main(["--root", str(root)]) == 1
    assert "expected one of each, in order" in capsys.readouterr().err
    assert not (root / "docs/performance.md").exists()


def test_nothing_measured_yet(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(README)
    results = tmp_path / "results"
    assert report.main(["--root", str(tmp_path), "--results", str(results)]) == 1
    assert "is no folder" in capsys.readouterr().err
    results.mkdir()
    (results / "old.json").write_text("{}")
    (results / "folder").mkdir()
    assert report.main(["--root", str(tmp_path), "--results", str(results)]) == 0
    assert (tmp_path / "README.md").read_text() == put_block(README, NOTHING)
    assert NOTHING in (tmp_path / "docs/performance.md").read_text()


def test_numbers_as_text():
    assert [number(x) for x in (0, 1234.5, 99.95, 9.876, 0.01234, 123_456)] == [
        "0",
        "1,234",
        "100.0",
        "9.88",
        "0.0123",
        "123,456",
    ]
    assert [ratio(x) for x in (0.94, 1.0094, 1.06, 22.0)] == ["0.94", "1.009", "1.06", "22.00"]
    assert [time(x) for x in (2.0, 0.0123, 1.5e-5)] == ["2.00 s", "12.3 ms", "15.0 us"]
    assert table(("a", "b"), [("x|y", "two\nlines")]) == "| a | b |\n| --- | --- |\n| x\\|y | two lines |"
