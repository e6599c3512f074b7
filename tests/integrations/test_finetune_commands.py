"""The commands beside finetune: evaluate, generate, sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from finetune_helpers import causal, classify, make_folders, results

import red_kernels as rk
from red_kernels import cli
from red_kernels.finetune.sweep import rungs
from red_kernels.support.base_models import in_dtype


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model twice, with other rates, and a classifier."""
    root = tmp_path_factory.mktemp("runs")
    arguments = {
        "mild": causal(folders, root / "mild", "--steps", "2"),
        "strong": causal(folders, root / "strong", "--steps", "12", "--lr", "0.1"),
        "labels": classify(folders, root / "labels", "--steps", "6"),
    }
    for own in arguments.values():
        assert cli.main([*own, "--no-compare"]) == 0
    return {name: root / name for name in arguments}


# ---- evaluate


@pytest.mark.parametrize("name", ["mild", "labels"])
def test_a_run_is_evaluated_on_what_it_held_out(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    assert cli.main(["evaluate", str(runs[name]), "--device", "cpu", "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    wanted = results(runs[name])
    assert found["with edits"]["loss"] == pytest.approx(wanted["after"]["loss"], rel=1e-5)
    assert found["with edits"]["targets"] == wanted["after"]["targets"]
    if name == "mild":
        assert found["base model"]["loss"] == pytest.approx(wanted["before"]["loss"], rel=1e-5)
    else:
        assert found["with edits"]["f1"] == pytest.approx(wanted["after"]["f1"])
        assert "base model" not in found


def test_half_precision_is_that_of_transformers(folders: dict[str, Path], tmp_path: Path) -> None:
    """What a model computes from its configuration, as frequencies, stays fp32: a run and those who load it agree."""
    base, _ = rk.load_base_model(str(folders["llama"]), dtype=torch.bfloat16)
    wanted = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.bfloat16)
    buffers = dict(wanted.named_buffers())
    assert any(own.dtype == torch.float32 for own in buffers.values())
    for name, own in base.named_buffers():
        assert own.dtype == buffers[name].dtype
        assert torch.equal(own, buffers[name])
    assert {own.dtype for own in base.parameters()} == {torch.bfloat16}
    # As from a GGUF file, whose weights are unpacked in fp32.
    whole = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    assert torch.equal(in_dtype(whole, torch.bfloat16)(ids).logits, wanted(ids).logits)

    run, figures = tmp_path / "run", tmp_path / "figures.json"
    assert cli.main([*causal(folders, run, "--steps", "2", "--dtype", "bf16"), "--no-compare"]) == 0
    assert cli.main(["evaluate", str(run), "--device", "cpu", "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["base model"]["loss"] == pytest.approx(results(run)["before"]["loss"], rel=1e-6)
    assert found["with edits"]["loss"] == pytest.approx(results(run)["after"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "task", "own"),
    [
        ("labels", "causal-lm", "classification"),
        ("labels", "regression", "classification"),
        ("mild", "classification", "causal-lm"),
    ],
)
def test_evaluate_for_another_task(
    name: str,
    task: str,
    own: str,
    runs: dict[str, Path],
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "aaaa abab\t1\nzzzz zyzy\t2\n" * 20)
    wanted = ["evaluate", str(runs[name]), "--data", str(data), "--task", task, "--device", "cpu"]
    assert cli.main(wanted) == cli.EXIT_ERROR
    assert f"for '{own}'; pass --task {own}" in capsys.readouterr().err


def test_evaluate_on_other_data(
    runs: dict[str, Path], folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = str(runs["labels"] / "edits")
    few = tmp_path / "few.tsv"
    few.write_text("text\tlabel\naaaa abab\tgood\nzzzz zyzy\tbad\nzzzz\tbad\n")
    wanted = ["--task", "classification", "--data", str(few), "--device", "cpu", "--json", str(tmp_path / "f.json")]
    assert cli.main(["evaluate", edits, *wanted]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["with edits"]["targets"] == 3
    few.write_text("text\tlabel\naaaa abab\tgood\nzzzz zyzy\tugly\n")
    assert cli.main(["evaluate", edits, *wanted]) == cli.EXIT_ERROR
    assert "has the label 'ugly', expected a label of the model: bad, good" in capsys.readouterr().err
    assert cli.main(["evaluate", edits]) == cli.EXIT_ERROR
    assert "is not a run's folder, which would name its data; pass --data" in capsys.readouterr().err


# ---- generate


def test_edits_by_name(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Each name says what its own edits alone say, and the base what the model says without any."""
    said = {}
    for name in ("mild", "strong"):
        assert (
            cli.main(["generate", str(runs[name]), "--prompt", "line 1", "--new-tokens", "12", "--device", "cpu"]) == 0
        )
        said[name] = capsys.readouterr().out
    both = ["generate", f"a={runs['mild']}", f"b={runs['strong'] / 'edits'}", "--base", "--prompt", "line 1"]
    assert cli.main([*both, "--new-tokens", "12", "--device", "cpu"]) == 0
    found = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines(keepends=True))
    assert list(found) == ["base", "a", "b"]
    assert (found["a"], found["b"]) == (said["mild"], said["strong"])
    assert found["b"] not in (found["a"], found["base"])


@pytest.mark.parametrize(("more", "message"), [
    (["{mild}", "{mild}"], "the name 'mild' is taken"),
    (["={mild}"], "expected SOURCE or NAME=SOURCE"),
    (["{mild}", "--new-tokens", "0"], "new_tokens: got 0, expected at least 1"),
    (["{mild}", "--temperature", "0"], "temperature: got 0.0, expected a number above 0"),
    (["{labels}"], "which generates no text"),
])  # fmt: skip
def test_what_generate_refuses(
    more: list[str], message: str, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(**runs) for word in more]
    assert cli.main(["generate", *words, "--prompt", "line"]) == cli.EXIT_ERROR
    assert message in capsys.readouterr().err


# ---- sweep


def test_the_rungs() -> None:
    assert rungs(4, 40) == [(4, 10), (2, 20), (1, 40)]
    assert rungs(5, 30) == [(5, 3), (3, 7), (2, 15), (1, 30)]
    assert rungs(2, 1) == [(2, 1), (1, 1)]


def test_a_sweep(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best rate of those that trained on; its run is that of the rate alone; a sweep that is broken off goes on."""
    output = tmp_path / "sweep"
    words = [
        *causal(folders, output, "--steps", "8", "--save-every", "2")[1:],
        "--rates",
        "1e-5",
        "3e-2",
        "1e-4",
        "1e38",
    ]
    assert cli.main(["sweep", *words]) == 0
    shown = capsys.readouterr().out
    assert "Best: --learning-rate 0.03" in shown
    assert "diverged" in shown
    record = json.loads((output / "sweep.json").read_text())["losses"]
    assert {rate: set(losses) for rate, losses in record.items()} == {
        "1e-05": {"2"}, "0.0001": {"2", "4"}, "0.03": {"2", "4", "8"}, "1e+38": {"2"},
    }  # fmt: skip
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*causal(folders, tmp_path / "alone", "--steps", "8", "--lr", "3e-2"), "--no-compare"]) == 0
    assert results(tmp_path / "alone")["after"] == results(output / "lr-0.03")["after"]

    assert cli.main(["sweep", *words]) == cli.EXIT_ERROR
    assert "holds a sweep; continue it by --resume" in capsys.readouterr().err
    (output / "sweep.png").unlink()
    assert cli.main(["sweep", *words, "--resume"]) == 0
    assert "held-out loss 0" not in capsys.readouterr().out.replace("Held-out", "")
    assert (output / "sweep.png").exists()
    assert cli.main(["sweep", *words, "--resume", "--batch-size", "2"]) == cli.EXIT_ERROR
    assert "was started with other settings" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "message"), [
    (["--rates", "1e-2"], "expected two or more different numbers"),
    (["--rates", "1e-2", "-1"], "expected two or more different numbers"),
    (["--schedule", "linear"], "schedule: a run that continues for more steps needs a constant schedule"),
])  # fmt: skip
def test_what_a_sweep_refuses(
    more: list[str], message: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", *causal(folders, tmp_path / "out")[1:], *more]) == cli.EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
