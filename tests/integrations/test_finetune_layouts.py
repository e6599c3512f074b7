"""The command with a model in parts on several processes: by tensor parallelism, FSDP2, or both.

Each run is that of one process with the same batches, to rounding, and any other number of processes goes on with it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folders
import transformers
from finetune_helpers import assert_near, causal, classify, launched, make_folders, record, results

from red_kernels import cli
from red_kernels.finetune import processes
from red_kernels.finetune.parallel import split_weights
from red_kernels.finetune.processes import check_layout
from red_kernels.integrations.trainer import checkpoints

HERE = Path(__file__).resolve().parent
NEAR = 3e-5
# Of a head beside the edits, of sites that tensor parallelism splits and others, of a rate that falls, of evaluations.
LABELLED = ("--position", "more", "--steps", "4", "--accumulate", "2", "--schedule", "linear", "--eval-every", "2")
TEXT = ("--position", "more", "--steps", "4", "--save-every", "2", "--sample", "line 3")
WILD = ("--steps", "30", "--save-every", "1", "--lr", "3e37", "--warmup", "20")
LAYOUTS = {
    "split over two": (2, ("--tp", "2")),
    "two copies, each split over two": (4, ("--tp", "2")),
    "in parts": (2, ("--fsdp",)),
    "split over two, and these parts in parts": (4, ("--fsdp", "--tp", "2")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model's output layer has the weight of its embedding."""
    root = tmp_path_factory.mktemp("tiny")
    found = make_folders(root)
    llama = tiny_folders.tiny_llama(root / "split", num_key_value_heads=2, tie_word_embeddings=True)
    return {**found, "llama": llama, "bert": llama, "encoder": found["bert"], "odd": found["llama"]}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process, of four steps and of six."""
    root = tmp_path_factory.mktemp("alone")
    assert cli.main(classify(folders, root / "labelled", *LABELLED, "--dtype", "fp32", "--no-compare")) == 0
    assert cli.main(causal(folders, root / "text", *TEXT, "--no-compare")) == 0
    for name in ("labelled", "text"):
        (root / f"{name} 4").mkdir()
        for file in (root / name / "edits").iterdir():
            (root / f"{name} 4" / file.name).write_bytes(file.read_bytes())
        assert cli.main(["finetune", "--output", str(root / name), "--resume", "--steps", "6"]) == 0
    return root


def parts(folder: Path, rank: int) -> dict[str, tuple[bool, int, int]]:
    """What one process held a part of: name to whether it was trained, elements here, and all."""
    lines = [line.split() for line in (folder / f"{rank}.txt").read_text().splitlines()]
    return {name: (trained == "True", int(here), int(whole)) for name, trained, here, whole in lines}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_one_run(layout: str, folders: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    count, options = LAYOUTS[layout]
    output = tmp_path / "labelled"
    arguments = classify(folders, output, *LABELLED, "--dtype", "fp32", *options)
    done = launched(arguments, count, [str(HERE / "layout_worker.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "merge will refuse" not in done.stdout  # it takes the files, which are whole
    assert_near(alone / "labelled 4", output / "edits", NEAR)
    found, expected = results(output), record(alone / "labelled")["results"]
    assert found["reloaded"]["targets"] == expected["before"]["targets"]
    assert found["before"]["loss"] == pytest.approx(expected["before"]["loss"], rel=1e-5)
    for step in ("2", "4"):
        assert found["evaluated"][step]["loss"] == pytest.approx(expected["evaluated"][step]["loss"], rel=1e-4)
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]

    held = [parts(tmp_path, rank) for rank in range(count)]
    mlp = "model.layers.0.mlp.down_proj.weight"
    _, here, whole = held[0][next(name for name in held[0] if name.endswith(mlp.removeprefix("model.")))]
    assert here * (count if "--fsdp" in options else 2) == whole
    assert all(own.keys() == held[0].keys() for own in held)
    assert any(trained for trained, _, _ in held[0].values())

    more = ["finetune", "--output", str(output), "--resume", "--steps", "6", "--tp", "1", "--no-fsdp"]
    assert cli.main(more) == 0
    assert_near(alone / "labelled" / "edits", output / "edits", NEAR)


def test_another_layout_goes_on(folders: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    """One process, then two that split the model; and the base of the edits is known alike."""
    output = tmp_path / "text"
    assert cli.main(causal(folders, output, *TEXT, "--no-compare")) == 0
    done = launched(["finetune", "--output", str(output), "--resume", "--steps", "6", "--tp", "2"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert_near(alone / "text" / "edits", output / "edits", NEAR)
    assert [own["step"] for own in results(output)["samples"]] == [0, 4, 6]
    assert "tokens/s" in done.stdout
    assert "merge will refuse" not in done.stdout
    assert record(output)["settings"]["tp"] == 2  # as a run that goes on without the option takes it


def test_a_model_with_too_few_heads(folders: dict[str, Path], tmp_path: Path) -> None:
    done = launched(causal({**folders, "llama": folders["odd"]}, tmp_path / "out", "--tp", "2"))
    assert done.returncode != 0
    assert "does not run when split over that many" in done.stderr
    assert "num_attention_heads 2, num_key_value_heads 1" in done.stderr
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_model_without_a_plan(folders: dict[str, Path]) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders["encoder"])
    with pytest.raises(ValueError, match="tp: got 2, and BertForSequenceClassification has no plan for it"):
        split_weights(model, processes.Processes(2, tp=2))


@pytest.mark.parametrize("name", [row[0] for row in processes._CONFIGURED])
def test_what_accelerate_is_configured_for(
    name: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It would train in another way than the command says: mixed precision gave edits that did not do as they did."""
    monkeypatch.setenv(name, "bf16" if "PRECISION" in name else "inductor" if "DYNAMO" in name else "true")
    assert cli.main(causal(folders, tmp_path / "out")) == cli.EXIT_ERROR
    assert "accelerate's configuration requests" in (said := capsys.readouterr().err)
    assert name in said
    assert not (tmp_path / "out").exists()
    for nothing in ("no", "NO") if "USE" not in name else ("false", "False"):
        monkeypatch.setenv(name, nothing)
        processes._check_configuration()


def test_a_loss_that_is_no_number(folders: dict[str, Path], tmp_path: Path) -> None:
    """The last good checkpoint is the result, saved from its parts."""
    output = tmp_path / "out"
    done = launched(causal(folders, output, *WILD, "--tp", "2"))
    assert done.returncode != 0
    assert "the training diverged" in done.stderr
    (*_, good) = checkpoints(output)
    assert_near(good, output / "edits", 0.0)


@pytest.mark.parametrize(
    ("count", "options", "said"),
    [
        (1, {"tp": 2}, "tp: got 2, and there is one process; torchrun"),
        (3, {"tp": 2}, "tp: got 2, and there are 3 processes, no multiple of it"),
        (1, {"fsdp": True}, "fsdp: there is one process; torchrun"),
        (2, {"tp": 2, "fsdp": True}, "fsdp: all 2 processes share the model's weights"),
    ],
)
def test_layouts_that_cannot_be(count: int, options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_layout(count, **{"tp": 1, "fsdp": False, **options})
