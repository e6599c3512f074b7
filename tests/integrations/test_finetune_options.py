"""How long a run trains, what it watches meanwhile, and where its settings come from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from finetune_helpers import assert_equal_runs, causal, classify, make_folders, record, results, trained_tensors
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from red_kernels import cli
from red_kernels.finetune.settings import Settings, as_options, from_options
from red_kernels.integrations.trainer import checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


def history(output: Path) -> list[dict[str, float]]:
    state = json.loads((checkpoints(output)[-1] / "trainer_state.json").read_text())
    found: list[dict[str, float]] = state["log_history"]
    return found


def run(arguments: list[str], *more: str) -> None:
    assert cli.main([*arguments, "--no-compare", *more]) == 0


# ---- how long


@pytest.mark.parametrize(("items", "batch", "accumulate", "epochs", "steps"), [
    (100, 4, 1, 1.0, 25), (102, 4, 1, 2.0, 50), (102, 4, 2, 1.0, 13), (3, 4, 1, 2.0, 2), (100, 4, 1, 0.5, 13),
])  # fmt: skip
def test_epochs_are_so_many_steps(items: int, batch: int, accumulate: int, epochs: float, steps: int) -> None:
    settings = Settings(epochs=epochs, batch_size=batch, accumulate=accumulate).filled()
    assert settings.total_steps(items) == steps


@pytest.mark.parametrize(("warmup", "said"), [("2", False), ("3", True), ("0.5", False)])
def test_a_warm_up_that_never_ends_is_said(
    warmup: str, said: bool, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(causal(folders, tmp_path / "out", "--steps", "3", "--warmup", warmup, "--learning-rate", "0.02"))
    text = "Note: the rate never reaches 0.02: its warm-up takes 3 steps, the run 3."
    assert (text in capsys.readouterr().out) == said


def test_epochs(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps that were foretold are those of the passes that Trainer counts; what they leave out is said."""
    run(classify(folders, tmp_path / "out", "--epochs", "2", "--batch-size", "8", "--accumulate", "2"))
    assert results(tmp_path / "out")["steps"] == 14  # 108 texts, 13 full batches, 7 steps of two, the last one of one
    assert history(tmp_path / "out")[-1]["epoch"] == pytest.approx(2)
    assert (
        "Each pass over the data leaves out 4 items, others each time: batches are of 8, and" in capsys.readouterr().out
    )


def test_accumulated_batches_are_one_large_one(folders: dict[str, Path], tmp_path: Path) -> None:
    more = ("--steps", "4", "--lr", "3e-2", "--save-every", "4")
    run(causal(folders, tmp_path / "one", *more), "--batch-size", "8")
    run(causal(folders, tmp_path / "parts", *more), "--batch-size", "2", "--accumulate", "4")
    one, parts = (trained_tensors(tmp_path / name / "edits") for name in ("one", "parts"))
    for name, value in one.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-4)
        assert not torch.allclose(value, torch.ones_like(value), atol=3e-2) or "bias" in name


def test_checkpointing_changes_no_number(folders: dict[str, Path], tmp_path: Path) -> None:
    run(causal(folders, tmp_path / "without", "--steps", "3"))
    run(causal(folders, tmp_path / "with", "--steps", "3"), "--checkpointing")
    one, other = (trained_tensors(tmp_path / name / "edits") for name in ("without", "with"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)


def test_warmup_and_clip(folders: dict[str, Path], tmp_path: Path) -> None:
    run(causal(folders, tmp_path / "out", "--steps", "4", "--warmup", "0.5", "--clip", "1e-9", "--lr", "0.1"))
    rates = [entry["learning_rate"] for entry in history(tmp_path / "out") if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.1])
    norms = [entry["grad_norm"] for entry in history(tmp_path / "out") if "grad_norm" in entry]
    assert all(norm > 1e-6 for norm in norms), "what is logged is the norm before it is clipped"
    moved = max(
        float((v - 1).abs().max()) for n, v in trained_tensors(tmp_path / "out" / "edits").items() if "scale" in n
    )
    assert moved < 0.05, "gradients of 1e-9 are next to Adam's epsilon"


# ---- what is watched


def test_the_best_edits_are_kept(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With far too high a rate the loss rises again: the training stops, and the result is what was best."""
    output = tmp_path / "out"
    more = ("--steps", "60", "--lr", "0.4", "--eval-every", "2", "--patience", "2")
    run(causal(folders, output, *more))
    found = results(output)
    losses = {int(step): said["loss"] for step, said in found["evaluated"].items()}
    assert found["best_step"] == min(losses, key=losses.__getitem__)
    assert found["steps"] == found["best_step"] + 4 < 60
    assert found["after"]["loss"] == pytest.approx(losses[found["best_step"]], rel=1e-5)
    best = output / f"checkpoint-{found['best_step']}"
    assert {n: v.tolist() for n, v in trained_tensors(best).items()} == {
        n: v.tolist() for n, v in trained_tensors(output / "edits").items()
    }
    shown = capsys.readouterr().out
    assert "2 evaluations brought no lower loss" in shown
    assert f"The edits are those of step {found['best_step']}" in shown


@pytest.mark.parametrize("patience", [(), ("--patience", "2")])
def test_a_run_that_died_at_its_end_has_the_same_result(
    patience: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Killed behind its last checkpoint: the best edits are found again, and nobody trains on who had stopped."""
    output = tmp_path / "out"
    run(causal(folders, output, "--steps", "20", "--lr", "0.4", "--eval-every", "2", "--sample", "line", *patience))
    whole, edits = results(output), trained_tensors(output / "edits")
    assert whole["best_step"] < whole["steps"]
    (output / "run.json").write_text(json.dumps({**record(output), "state": "running"}))
    (output / "edits" / "red_edits.safetensors").unlink()
    assert cli.main(["finetune", "--output", str(output), "--resume"]) == 0
    again = results(output)
    for name in ("best_step", "steps", "after", "evaluated", "samples"):
        assert again[name] == whole[name], name
    assert {n: v.tolist() for n, v in trained_tensors(output / "edits").items()} == {
        n: v.tolist() for n, v in edits.items()
    }


def test_other_evaluations_from_a_resume_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """What was not given does not come back as a setting: checkpoints follow the evaluations."""
    output = tmp_path / "out"
    run(causal(folders, output, "--steps", "4", "--eval-every", "2"))
    assert record(output)["settings"]["save_every"] is None
    assert cli.main(["finetune", "--output", str(output), "--resume", "--steps", "12", "--eval-every", "4"]) == 0
    assert list(results(output)["evaluated"]) == ["2", "4", "8", "12"]


def test_samples(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--steps", "4", "--eval-every", "2", "--sample", "line 1", "--sample", "line 2")
    run(causal(folders, tmp_path / "out", *more))
    samples = results(tmp_path / "out")["samples"]
    assert [(own["step"], own["prompt"]) for own in samples] == [
        (step, prompt) for step in (0, 2, 4) for prompt in ("line 1", "line 2")
    ]
    shown = capsys.readouterr().out
    assert all(repr(own["text"]) in shown for own in samples)


class Recorded(TrainerCallback):
    """In place of another package's."""

    logs: ClassVar[list[dict[str, float]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


def test_a_run_reports(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", Recorded)
    Recorded.logs.clear()
    run(causal(folders, tmp_path / "out", "--steps", "2", "--eval-every", "2", "--report-to", "wandb"))
    names = [set(logs) & {"loss", "eval_loss"} for logs in Recorded.logs]
    assert names[:3] == [{"loss"}, {"loss"}, {"eval_loss"}]


def missing() -> None:
    raise RuntimeError("it needs a package that is not there")


def test_what_cannot_be_reported_to(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error before anything is loaded."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", missing)
    for name, message in (("nothing", "report_to: got 'nothing', expected"), ("wandb", "it needs a package")):
        assert cli.main(causal(folders, tmp_path / "out", "--report-to", name)) == cli.EXIT_ERROR
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_scores_of_a_classifier(folders: dict[str, Path], tmp_path: Path) -> None:
    run(classify(folders, tmp_path / "out", "--steps", "30", "--lr", "3e-2"))
    after = results(tmp_path / "out")["after"]
    assert after["accuracy"] > 0.7
    assert 0.7 < after["f1"] <= 1
    assert 0.4 < after["matthews"] <= 1


# ---- where settings come from

YES_OR_NO = ("packing", "checkpointing", "fsdp", "overwrite", "no-compare", "no-header")


def test_a_run_from_its_own_config(folders: dict[str, Path], tmp_path: Path) -> None:
    """`config.yaml` is complete: another folder gets the same run from it alone."""
    run(causal(folders, tmp_path / "first", "--steps", "3", "--layers", "1", "--lr", "2e-2"))
    config = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(config.read_text())["layers"] == [1]
    assert cli.main(["finetune", "--config", str(config), "--output", str(tmp_path / "second")]) == 0
    assert_equal_runs(tmp_path / "first", tmp_path / "second")
    options = cli.main(["finetune", "--config", str(config), "--output", str(tmp_path / "third"), "--steps", "2"])
    assert options == 0
    assert results(tmp_path / "third")["steps"] == 2


def test_settings_come_back_from_their_options() -> None:
    settings = Settings(
        data="d.csv", layers=(0, 2), epochs=1.5, sample=("a", "b"), compare=False, held_out=0.2
    ).filled()
    assert from_options({k: v for k, v in as_options(settings).items() if v is not None}).filled() == settings
    assert from_options({"learning-rate": "1e-2", "layers": "0-2", "sample": "a", "no_header": True}) == Settings(
        learning_rate=1e-2, layers=(0, 1, 2), sample=("a",), columns=type(Settings().columns)(header=False)
    )


@pytest.mark.parametrize(("content", "message"), [
    ("stpes: 3", "stpes: is no setting of finetune, expected one of .*steps"),
    ("- a", "expected names of settings with their values"),
    ("a: [", "cannot be read"),
    ("save-every: 3\nsave_every: 3", "save-every twice"),
    ("steps: many", "steps: got 'many', expected an integer of at least 1"),
    ("patience: 2", "patience: got 2 without eval_every"),
    ("eval-every: 4\nsave-every: 6", "save_every: got 6, expected 4, the value of eval_every"),
    ("steps: 3\nepochs: 1", "steps and epochs: got 3 and 1, expected one"),
    ("warmup: -1", "warmup: got -1, expected a number, 0 or more"),
    ("schedule: sudden", "schedule: got 'sudden', expected one of"),
    *((f"{name}: 'no'", f"{name.replace('-', '_')}: got 'no', expected true or false") for name in YES_OR_NO),
    *((f"{name}: 3", f"{name}: got 3, expected a text") for name in ("model", "template", "device", "output")),
    ("sample: 3", "sample: got 3, expected texts"),
    ("text-column: [a]", "text_column: got .'a'., expected a text"),
    ("validation: [a.txt, 5]", "validation: got .'a.txt', 5., expected texts"),
    ("seed: abc", "seed: got 'abc', expected an integer"),
    ("seed: -1", "seed: got -1, expected an integer"),
])  # fmt: skip
def test_a_config_that_is_wrong(
    content: str, message: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    arguments = ["finetune", "--config", str(tmp_path / "run.yaml"), "--data", str(folders["text"])]
    output = [] if content.startswith("output") else ["--output", str(tmp_path / "out")]
    assert cli.main([*arguments, *output]) == cli.EXIT_ERROR
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_no_data_is_not_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("data: []\n")
    arguments = ["finetune", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--steps", "1"]) == cli.EXIT_ERROR
    assert "data: got (), expected one or several files" in capsys.readouterr().err


def test_resume_alone(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run goes on for more steps, by its own settings, and is what a longer run would have been."""
    output = tmp_path / "out"
    run(causal(folders, output, "--steps", "3", "--save-every", "3", "--lr", "2e-2"))
    assert cli.main(["finetune", "--output", str(output), "--resume", "--steps", "6"]) == 0
    run(causal(folders, tmp_path / "whole", "--steps", "6", "--save-every", "3", "--lr", "2e-2"))
    assert_equal_runs(output, tmp_path / "whole")
    assert record(output)["settings"]["learning_rate"] == 2e-2


def test_patience_that_is_new_in_a_resumed_run(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It begins to count there; and a run that was broken off cannot end before the steps that it has done."""
    output = tmp_path / "out"
    run(causal(folders, output, "--steps", "3", "--save-every", "3", "--lr", "1e-9"))
    more = ["--steps", "7", "--eval-every", "1", "--save-every", "1", "--patience", "2"]
    assert cli.main(["finetune", "--output", str(output), "--resume", *more]) == 0
    assert results(output)["steps"] < 7

    broken_off = {**record(output), "state": "interrupted"}
    (output / "run.json").write_text(json.dumps(broken_off))
    assert cli.main(["finetune", "--output", str(output), "--resume", "--steps", "2"]) == cli.EXIT_ERROR
    assert "steps already, and 2 were requested" in capsys.readouterr().err
    assert record(output) == broken_off


def test_a_run_of_an_older_version_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its record knows one source of data, and none of the options that came since."""
    output = tmp_path / "out"
    run(causal(folders, output, "--steps", "3", "--save-every", "3"))
    former = record(output)
    known = ("task", "model", "data", "subset", "columns", "learning_rate", "schedule", "steps", "batch_size", "length")
    settings = {name: former["settings"][name] for name in (*known, "dtype", "position", "kind", "seed", "held_out")}
    settings |= {"data": settings["data"][0], "layers": None, "sites": None}
    (output / "run.json").write_text(json.dumps({**former, "settings": settings}))
    assert cli.main([*causal(folders, output, "--steps", "5", "--resume"), "--no-compare"]) == 0
    assert cli.main(["finetune", "--output", str(output), "--resume", "--steps", "6"]) == 0
    assert results(output)["steps"] == 6


def test_resume_refuses(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(folders["text"].read_text())
    output = tmp_path / "out"
    run(causal({**folders, "text": text}, output, "--steps", "3"))
    again = ["finetune", "--output", str(output), "--resume"]
    for more, message in (
        ([], "is finished; --steps N or --epochs N with a larger N"),
        (["--steps", "2"], "has done 3 steps already, and 2 were requested"),
        (["--steps", "5", "--lr", "1"], "learning_rate was 0.01, is 1.0"),
    ):
        assert cli.main([*again, *more]) == cli.EXIT_ERROR
        assert message in capsys.readouterr().err
    text.write_text(text.read_text().replace("line 7 ", "line seven "))
    assert cli.main([*again, "--steps", "5"]) == cli.EXIT_ERROR
    assert "differs from the start of the run in" in capsys.readouterr().err
    assert record(output)["state"] == "finished"
