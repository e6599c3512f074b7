"""Damaged and malicious files: `merge` and `finetune --resume` say in one line which file it is, and run no code."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_folders
import torch
from transformers import LlamaForCausalLM

import red_kernels as rk
from red_kernels import cli
from red_kernels.finetune import watching
from red_kernels.integrations.trainer import checkpoints


class Bomb:
    """Unpickled, it makes the folder that its argument names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and edits of it."""
    root = tmp_path_factory.mktemp("sources")
    tiny_folders.tiny_llama(root / "base")
    model = LlamaForCausalLM.from_pretrained(root / "base")
    rk.patch(model, rk.RedConfig(kind="scaling"))
    rk.save_edits(model, root / "edits")
    return root


def failing(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error that was explained."""
    capsys.readouterr()
    assert cli.main(words) == cli.EXIT_ERROR
    shown = capsys.readouterr().err.strip()
    assert len(shown.splitlines()) == 1, shown
    assert shown.startswith("error: ")
    assert len(shown) < 2000
    return shown


def merging(root: Path) -> list[str]:
    words = ["--model", str(root / "base"), "--edits", str(root / "edits"), "--output", str(root / "merged")]
    return ["merge", *words]


def change_config(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


def content(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def without_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    del tensors["model.norm.weight"]
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


def of_another_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["model.norm.weight"] = torch.ones(3)
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


DEEP = b"[" * 100_000 + b"]" * 100_000
BASES = {
    "weights cut in the header": (cut("model.safetensors", 100), "model.safetensors is damaged"),
    "weights cut in the data": (cut("model.safetensors", 5000), "model.safetensors is damaged"),
    "empty weights": (cut("model.safetensors", 0), "model.safetensors is damaged"),
    "weights of noise": (content("model.safetensors", b"\xff" * 4000), "model.safetensors is damaged"),
    "a weight missing": (without_a_weight, "lack the weights model.norm.weight"),
    "a weight of another shape": (of_another_shape, "could not be loaded"),
    "no architectures": (change_config(architectures=None), "names the class None"),
    "an empty list": (change_config(architectures=[]), "names the class []"),
    "architectures a text": (change_config(architectures="LlamaForCausalLM"), "architectures"),
    "architectures a number": (change_config(architectures=3), "architectures"),
    "architectures of numbers": (change_config(architectures=[3]), "architectures"),
    "a function of transformers": (change_config(architectures=["pipeline"]), "names the class ['pipeline']"),
    "a class that is no model": (change_config(architectures=["Trainer"]), "names the class ['Trainer']"),
    "a module": (change_config(architectures=["utils"]), "names the class ['utils']"),
    "a special name": (change_config(architectures=["__dict__"]), "names the class ['__dict__']"),
    "a width that is a text": (change_config(hidden_size="wide"), "could not be loaded"),
    "a width that is negative": (change_config(hidden_size=-3), "could not be loaded"),
    "a list for a number": (change_config(num_hidden_layers=[2]), "could not be loaded"),
    "quantised": (change_config(quantization_config={"quant_method": "bitsandbytes"}), "is quantised"),
    "quantised by a number": (change_config(quantization_config=3), "could not be loaded"),
    "an unknown model type": (change_config(model_type="nothing"), "could not be loaded"),
    "a model type that is a list": (change_config(model_type=["llama"]), "could not be loaded"),
    "a configuration cut": (cut("config.json", 40), "config.json"),
    "a configuration that is a list": (content("config.json", b"[]"), "config.json is damaged"),
    "a deep configuration": (content("config.json", DEEP), "config.json is damaged"),
    "a configuration of noise": (content("config.json", b"\xff\xfe\x00"), "config.json"),
    "a tokenizer cut": (cut("tokenizer.json", 300), "tokenizer.json is damaged"),
    "an empty tokenizer": (content("tokenizer.json", b"{}"), "the tokenizer of"),
    "a tokenizer of noise": (content("tokenizer.json", b"\xff\xfe"), "tokenizer.json is damaged"),
    "a deep tokenizer": (content("tokenizer_config.json", DEEP), "tokenizer_config.json is damaged"),
    "a tokenizer's settings cut": (cut("tokenizer_config.json", 20), "tokenizer_config.json is damaged"),
}


@pytest.mark.parametrize("name", BASES)
def test_merging_into_a_damaged_model(
    name: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    damage, message = BASES[name]
    damage(tmp_path / "base")
    assert message in failing(merging(tmp_path), capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "edits"]


def test_a_model_without_a_tokenizer_is_merged(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "base").glob("tokenizer*"):
        path.unlink()
    assert cli.main(merging(tmp_path)) == 0
    assert "note: no tokenizer was saved" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_beside_a_model_is_not_run(
    what: str, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that brings its own classes: nothing is imported, and nobody is asked on the terminal."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    base = tmp_path / "base"
    (base / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Own: pass\n")
    if what == "config":
        change_config(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})(base)
    else:
        path = base / "tokenizer_config.json"
        own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    failing(merging(tmp_path), capsys)
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_is_not_run(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('ran') }}"
    (tmp_path / "base" / "chat_template.jinja").write_text(escape)
    assert cli.main(merging(tmp_path)) == 0
    assert not Path("ran").exists()
    assert not (tmp_path / "ran").exists()


def test_a_pickle_among_the_weights_is_not_run(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(tmp_path / "ran")}, tmp_path / "base" / "pytorch_model.bin")
    assert "pytorch_model.bin" in failing(merging(tmp_path), capsys)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file can grow beyond 20 KB: writing more fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_found_first(
    sources: Path, tmp_path: Path, small_disk: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = merging(sources)
    words[words.index("--output") + 1] = str(tmp_path / "merged")
    assert f"cannot write to '{tmp_path / 'merged'}'" in failing(words, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up(
    sources: Path, tmp_path: Path, small_disk: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("red_kernels.merging.folder.check_output", lambda *arguments: None)
    words = merging(sources)
    words[words.index("--output") + 1] = str(tmp_path / "merged")
    assert f"{tmp_path / 'merged'}" in failing(words, capsys)
    assert list(tmp_path.iterdir()) == []


# ---- outputs


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("file", "is a file; expected a folder"),
        ("file/in/it", "is a file, and "),
        ("nowhere", "is a broken link"),
        ("x" * 300, "cannot write to"),
        ("a\0b", "expected the path of a folder"),
        ("", "expected the path of a folder"),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "merge"])
def test_an_output_that_cannot_be(
    command: str,
    output: str,
    message: str,
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is found out before the data and the model are read: neither is there."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    if command == "finetune":
        words = ["finetune", "--data", "absent.txt", "--model", "no/such/folder", "--device", "cpu"]
    else:
        words = ["merge", "--model", "no/such/folder", "--edits", str(sources / "edits"), "--overwrite"]
    assert message in failing([*words, "--output", output], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_may_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        place = Path("/proc")  # where root may not write either
    else:
        place = tmp_path / "closed"
        place.mkdir(mode=0o500)
    words = ["finetune", "--data", "absent.txt", "--model", "no/such/folder", "--device", "cpu"]
    assert "--output: cannot write to" in failing([*words, "--output", str(place / "out")], capsys)


# ---- a checkpoint to resume from


@pytest.fixture(scope="module")
def stopped(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that was killed after its second step of four, and its text beside it."""
    root = tmp_path_factory.mktemp("stopped")
    (root / "text.txt").write_text("a line of text, with some words.\n" * 100)
    words = resuming(sources, root)
    assert cli.main([*words[:-1], "--no-compare"]) == 0
    run = json.loads((root / "out" / "run.json").read_text())
    (root / "out" / "run.json").write_text(json.dumps({**run, "state": "running"}))
    for path in checkpoints(root / "out"):
        if path.name != "checkpoint-3":
            shutil.rmtree(path)
    return root


def resuming(sources: Path, root: Path) -> list[str]:
    where = ["--model", str(sources / "base"), "--data", str(root / "text.txt"), "--output", str(root / "out")]
    more = ["--length", "16", "--dtype", "fp32", "--device", "cpu", "--steps", "4", "--save-every", "1", "--no-compare"]
    return ["finetune", *where, *more, "--resume"]


def saved(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(value, folder / name)


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = torch.load(folder / name, weights_only=False)
        change(value)
        torch.save(value, folder / name)

    return apply


def change_state(**entries: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


def _set(part: str, value: Any) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        found["state"][0][part] = value

    return change


PICKLES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"{name} cut": (cut(name, 200), name) for name in PICKLES},
    **{f"{name} empty": (cut(name, 0), name) for name in PICKLES},
    **{f"{name} of noise": (content(name, b"PK\x03\x04" + b"\xfe" * 500), name) for name in PICKLES},
    **{f"{name} a pickle of text": (content(name, b"cos\nsystem\n(S'true'\ntR."), name) for name in PICKLES},
    **{f"{name} a list": (saved(name, [1, 2]), name) for name in PICKLES},
    **{f"{name} a tensor": (saved(name, torch.ones(2)), name) for name in PICKLES},
    **{f"{name} an empty dict": (saved(name, {}), name) for name in PICKLES},
    **{f"{name} gone": (lambda folder, name=name: (folder / name).unlink(), name) for name in PICKLES},
    "an optimizer of nothing": (saved("optimizer.pt", {"state": {}, "param_groups": []}), "optimizer.pt"),
    "another optimizer": (saved("optimizer.pt", {"state": {}, "param_groups": [{"params": [0]}]}), "optimizer.pt"),
    "groups of numbers": (saved("optimizer.pt", {"state": {}, "param_groups": [3]}), "optimizer.pt"),
    "a parameter's state that is a list": (
        changed("optimizer.pt", lambda found: found["state"].update({0: [1]})),
        "optimizer.pt",
    ),
    "a moment of another width": (changed("optimizer.pt", _set("exp_avg", torch.ones(3))), "optimizer.pt"),
    "a moment of NaN": (changed("optimizer.pt", _set("exp_avg", torch.full((16,), torch.nan))), "optimizer.pt"),
    "a moment of text": (changed("optimizer.pt", _set("exp_avg", "a")), "optimizer.pt"),
    "another rate": (changed("scheduler.pt", lambda found: found.update(base_lrs=[9.0])), "scheduler.pt"),
    "another step": (changed("scheduler.pt", lambda found: found.update(last_epoch=900)), "scheduler.pt"),
    "a random state of one byte": (changed("rng_state.pth", lambda s: s.update(cpu=torch.ones(1).byte())), "rng_state"),
    "a random state of text": (changed("rng_state.pth", lambda found: found.update(python="a")), "rng_state.pth"),
    "a random state without numpy's": (changed("rng_state.pth", lambda found: found.pop("numpy")), "rng_state.pth"),
    "a state cut": (cut("trainer_state.json", 30), "trainer_state.json"),
    "a state that is a list": (content("trainer_state.json", b"[]"), "trainer_state.json"),
    "a deep state": (content("trainer_state.json", DEEP), "trainer_state.json"),
    "a state with an unknown entry": (change_state(more=1), "trainer_state.json"),
    "a state of another step": (change_state(global_step=7), "trainer_state.json"),
    "a step of text": (change_state(global_step="3"), "trainer_state.json"),
    "a history of numbers": (change_state(log_history=[3]), "trainer_state.json"),
    "a loss of text": (change_state(log_history=[{"step": 1, "loss": "a"}]), "trainer_state.json"),
    "callbacks of a number": (change_state(stateful_callbacks=3), "trainer_state.json"),
    **{
        f"{entry} is {value!r:.20}": (change_state(**{entry: value}), "trainer_state.json")
        for entry in ("logging_steps", "save_steps", "total_flos", "train_batch_size", "num_train_epochs", "epoch")
        for value in (None, "x", [1], True, float("nan"))
    },
    **{
        f"best_model_checkpoint is {value!r:.20}": (change_state(best_model_checkpoint=value), "trainer_state.json")
        for value in (2**70, [1], {"a": 1}, 0.5)
    },
    "callbacks without Trainer's": (change_state(stateful_callbacks={"a": {}}), "trainer_state.json"),
    "a callback of a number": (change_state(stateful_callbacks={"TrainerControl": 3}), "trainer_state.json"),
    "a callback without entries": (change_state(stateful_callbacks={"TrainerControl": {}}), "trainer_state.json"),
    "edits cut": (cut("red_edits.safetensors", 60), "red_edits.safetensors"),
}


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of training fails the test."""

    def step(*arguments: Any, **named: Any) -> None:
        pytest.fail("a step was trained")

    monkeypatch.setattr(watching.JobTrainer, "training_step", step)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_resuming_from_a_damaged_checkpoint(
    name: str,
    sources: Path,
    stopped: Path,
    tmp_path: Path,
    no_training: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    damage, message = CHECKPOINTS[name]
    checkpoint = tmp_path / "out" / "checkpoint-3"
    words = resuming(sources, tmp_path)
    words[words.index("--data") + 1] = str(stopped / "text.txt")  # which is a setting that has to be the same
    damage(checkpoint)
    error = failing(words, capsys)
    assert message in error
    if "edits" not in name:
        assert f"{checkpoint}" in error
        assert "remove" in error
        assert "--overwrite" in error


@pytest.mark.parametrize(
    "before", [None, "x", [1], {"a": 1}, {"loss": "x", "targets": 3, "accuracy": None}, {"loss": 1.0, "targets": None}]
)
def test_a_record_with_other_results(
    before: Any, sources: Path, stopped: Path, tmp_path: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    words = resuming(sources, tmp_path)
    words[words.index("--data") + 1] = str(stopped / "text.txt")
    record = tmp_path / "out" / "run.json"
    run = json.loads(record.read_text())
    run["results"]["before"] = before
    record.write_text(json.dumps(run))
    assert f"--resume: {record} is damaged" in failing(words, capsys)


@pytest.mark.parametrize("name", [*PICKLES, "training_args.bin"])
def test_a_checkpoint_runs_no_code(
    name: str, sources: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    words = resuming(sources, tmp_path)
    words[words.index("--data") + 1] = str(stopped / "text.txt")
    torch.save({"state": Bomb(tmp_path / "ran")}, tmp_path / "out" / "checkpoint-3" / name)
    status = cli.main(words)
    assert status == (0 if name == "training_args.bin" else cli.EXIT_ERROR)
    assert not (tmp_path / "ran").exists()
    assert (name in capsys.readouterr().err) == (status != 0)
