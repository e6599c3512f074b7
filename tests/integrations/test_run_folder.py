"""The output folder of `red-kernels finetune`, and of RedTrainer: what they did not write, they do not remove."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

import red_kernels as rk
from red_kernels.finetune.run_folder import open_run
from red_kernels.finetune.settings import Settings
from red_kernels.integrations.trainer import RedTrainer, checkpoints

SETTINGS = Settings(model="m", data="d", steps=3)
AGAIN = replace(SETTINGS, overwrite=True)
OWN = ("red_edits.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with one checkpoint, edits and a picture."""
    folder = tmp_path / "out"
    open_run(folder, SETTINGS).write("finished")
    for name in (*(f"checkpoint-2/{name}" for name in OWN), "edits/red_edits.safetensors", "loss.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("own")
    return folder


def held(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_run_is_overwritten(run: Path) -> None:
    (run / "mine.txt").write_text("mine")
    open_run(run, AGAIN).begin()
    assert sorted(path.name for path in run.iterdir()) == ["mine.txt", "run.json"]


RECORDS = (
    '{"name": "of another program"}',
    "[]",
    "x",
    '{"state": "finished", "settings": {}, "results": {}}',
    '{"state": "finished", "settings": {"task": 1, "model": 2, "data": 3}, "results": {}}',
    "[" * 100_000,
)


@pytest.mark.parametrize("record", RECORDS)
def test_the_record_of_another_program(record: str, run: Path) -> None:
    (run / "run.json").write_text(record)
    before = held(run)
    with pytest.raises(ValueError, match=r"--overwrite: .*run\.json is damaged or of another program"):
        open_run(run, AGAIN)
    assert held(run) == before


@pytest.mark.parametrize("name", ["loss.png", "edits/a", "checkpoint-7/a"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_program(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="of another program; choose another folder"):
        open_run(tmp_path, replace(SETTINGS, overwrite=overwrite))
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "texts.csv", "notes/thesis.txt", "red_heads", "optimizer.pt.old"]
)
def test_others_files_in_a_checkpoint(name: str, run: Path) -> None:
    """The base model, the data or notes may lie there."""
    path = run / "checkpoint-2" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = held(run)
    with pytest.raises(ValueError, match=rf"checkpoint-2' has {name.partition('/')[0]}, which no run wrote; move away"):
        open_run(run, AGAIN)
    assert held(run) == before


def test_a_file_that_comes_while_the_model_is_loaded(run: Path) -> None:
    opened = open_run(run, AGAIN)
    (run / "checkpoint-2" / "thesis.txt").write_text("mine")
    opened.begin()
    assert [path.name for path in (run / "checkpoint-2").iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_is_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoint-9").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="checkpoint-9' is a link"):
        open_run(run, AGAIN)


@pytest.mark.parametrize("step", ["٣", "３", "²", "9" * 200, "", "-1", "1 ", "1\n"])
def test_names_that_are_no_checkpoints(step: str, tmp_path: Path) -> None:
    (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.linear(x) - labels).square().mean()}


@pytest.mark.parametrize("former", ["of another training", "of an earlier run"])
def test_a_checkpoint_of_the_same_step(former: str, tmp_path: Path) -> None:
    """One of another training, which may be the base model itself, keeps its files."""
    there = tmp_path / "checkpoint-1"
    (there / "deep").mkdir(parents=True)
    (there / "deep" / "model.safetensors").write_text("weights")
    if former == "of an earlier run":
        (there / "red_edits.safetensors").write_text("own")
    model = Tiny()
    rk.patch(model, rk.RedConfig(sites="linear"))
    options = {"max_steps": 1, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    data = [{"x": torch.ones(4), "labels": torch.ones(4)}] * 8
    RedTrainer(model=model, args=TrainingArguments(str(tmp_path), **options), train_dataset=data).train()
    assert (there / "deep" / "model.safetensors").exists() == (former == "of another training")
    assert rk.load_edits(model, there).loaded
    assert (there / "trainer_state.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
