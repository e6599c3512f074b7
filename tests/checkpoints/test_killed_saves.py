"""Saves that are killed, fail, or meet others: a folder holds the former state or the new one, whole."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from checkpoint_helpers import as_earlier, every_vector, patched, trained
from killed import counted, each_kill
from torch import nn

import red_kernels as rk
from red_kernels.checkpoints import checkpoint
from red_kernels.checkpoints.authors import CLASSIFIER_NAME, VECTORS_NAME
from red_kernels.checkpoints.checkpoint import CONFIG_NAME, HEAD_NAME, TENSORS_NAME, save_with_head
from red_kernels.checkpoints.peft_write import PEFT_NAMES
from red_kernels.support import files as _files


@functools.cache
def with_head(value: float, **options: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A patched model with a head of three labels, all of its values made of `value`."""
    model = patched("roberta", **options)
    head = {name: own for name, own in model.named_parameters() if name.startswith("classifier.")}
    with torch.no_grad():
        for own in (*every_vector(model), *head.values()):
            own.fill_(value)
    model.config.id2label = {number: f"{value} {number}" for number in range(model.config.num_labels)}  # type: ignore
    return model, head


def save(kind: str, folder: Path) -> None:
    """Save one of a few states."""
    if kind == "all":
        rk.save_edits(with_head(2.0)[0], folder)
    elif kind == "bias":
        rk.save_edits(with_head(3.0, kind="bias")[0], folder)
    elif kind == "head":
        model, head = with_head(4.0)
        save_with_head(model, folder, None, head)
    elif kind == "other head":
        model, head = with_head(5.0, kind="bias")
        save_with_head(model, folder, None, head)
    elif kind.startswith("earlier"):
        save("head" if kind == "earlier with head" else "all", folder)
        as_earlier(folder)


def state(folder: Path) -> Any:
    """All that a reader finds, in a form that can be compared; the version of the form is left out."""
    found = checkpoint.read(folder)
    vectors = {(site, part): own.tolist() for site, parts in found.vectors.items() for part, own in parts.items()}
    head = found.trained and ({name: own.tolist() for name, own in found.trained.values.items()}, found.trained.labels)
    return rk.saved_config(folder), vectors, head


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files_of(kind: str) -> list[str]:
    return sorted([TENSORS_NAME, *PEFT_NAMES, *([HEAD_NAME] if "head" in kind else [])])


def fresh(folder: Path, kind: str | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if kind is not None:
        save(kind, folder)


FORMER = (None, "all", "head", "other head", "earlier", "earlier with head")
# Each former and each new, and every way in which the files of the one are others than those of the other.
KILLED = (
    *((None, "all"), (None, "head"), ("all", "bias"), ("all", "head"), ("head", "all"), ("head", "other head")),
    *(("other head", "bias"), ("earlier", "bias"), ("earlier", "head"), ("earlier with head", "all")),
    ("earlier with head", "other head"),
)
MORE = [pair for pair in itertools.product(FORMER, ("all", "bias", "head", "other head")) if pair not in KILLED]


@pytest.mark.parametrize(("former", "new"), [*KILLED, *(pytest.param(*pair, marks=pytest.mark.long) for pair in MORE)])
def test_a_kill_leaves_the_former_state_or_the_new_one(former: str | None, new: str, tmp_path: Path) -> None:
    folder = tmp_path / "edits"
    states = []
    for kind in (former, new):
        fresh(folder, kind)
        states.append(None if kind is None else state(folder))
    seen = set()
    for number in each_kill(lambda: save(new, folder), lambda: fresh(folder, former)):
        if former is None and not (folder / TENSORS_NAME).exists():
            seen.add(0)
        else:
            found = state(folder)
            assert found in states, number
            seen.add(states.index(found))
        save(new, folder)  # and what the killed one left is gone
        assert names(folder) == files_of(new), number
        assert state(folder) == states[1]
    assert seen == ({0, 1} if states[0] != states[1] else {0})
    assert names(folder) == files_of(new)


@pytest.mark.sampled
@pytest.mark.parametrize("new", ["all", "head"])
@pytest.mark.parametrize("former", FORMER)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_former_state_or_the_new_one(
    former: str | None, new: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "edits"
    states = []
    for kind in (former, new):
        fresh(folder, kind)
        states.append(None if kind is None else state(folder))

    def fail() -> None:
        raise error

    number, failed = 0, True
    while failed:
        shutil.rmtree(tmp_path / "new")
        if former is not None:
            save(former, folder)
        before = names(folder) if former is not None else None
        with monkeypatch.context() as patch:
            fired: list[int] = []
            counted(patch, number, lambda fired=fired: (fired.append(1), fail()))  # type: ignore[misc]
            raised = False
            try:
                save(new, folder)
            except type(error):
                raised = True
            failed = bool(fired)
        if raised and (former is None or state(folder) == states[0] != states[1]):
            if former is None and not folder.exists():
                assert not (tmp_path / "new").exists(), "parent folders that were made for it stayed"
                (tmp_path / "new").mkdir()
            elif former is not None:
                assert names(folder) == before, number
        if folder.exists():
            assert state(folder) in states, number
            assert not [name for name in names(folder) if name.endswith(".tmp")], number
        number += 1
    assert number > 5


@pytest.mark.parametrize("former", [1.0, None])
def test_a_kill_while_writing_the_authors_form(former: float | None, tmp_path: Path) -> None:
    """Vectors and classifier are two files there as well; a reader never gets both of different saves."""

    def export(value: float) -> None:
        rk.export_authors(with_head(value)[0], tmp_path / "authors")

    def prepare() -> None:
        shutil.rmtree(tmp_path / "authors", ignore_errors=True)
        if former is not None:
            export(former)

    seen = set()
    for number in each_kill(lambda: export(2.0), prepare):
        if not (tmp_path / "authors" / VECTORS_NAME).exists():
            assert former is None
            seen.add(None)
            continue
        found = checkpoint.read(tmp_path / "authors")
        kept = [*(own for parts in found.vectors.values() for own in parts.values()), *found.head.values()]
        values = {float(value) for own in kept for value in own.flatten()}
        assert len(values) == 1, number
        assert len(found.head) == 4
        seen |= values
    assert seen == {former, 2.0}
    assert names(tmp_path / "authors") == [CLASSIFIER_NAME, VECTORS_NAME]
    assert torch.load(tmp_path / "authors" / CLASSIFIER_NAME, weights_only=False)["dense.bias"][0] == 2.0


def together(*actions: Callable[[], object]) -> None:
    """Run actions in a thread each; raises what one of them raised."""
    errors: list[BaseException] = []

    def run(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("kinds", [("all", "bias"), ("head", "other head"), ("all", "other head")])
def test_two_writers_and_two_readers(kinds: tuple[str, str], tmp_path: Path) -> None:
    wanted = []
    for kind in kinds:
        fresh(tmp_path, kind)
        wanted.append(state(tmp_path))

    def write(kind: str) -> None:
        for _ in range(15):
            save(kind, tmp_path)

    def read() -> None:
        for _ in range(40):
            found = checkpoint.read(tmp_path)
            vectors = {(s, part): own.tolist() for s, parts in found.vectors.items() for part, own in parts.items()}
            labels = found.trained and found.trained.labels
            assert (vectors, labels) in [(state[1], state[2] and state[2][1]) for state in wanted]
            assert rk.saved_config(tmp_path) in [state[0] for state in wanted]

    together(lambda: write(kinds[0]), lambda: write(kinds[1]), read, read)
    assert state(tmp_path) in wanted
    assert names(tmp_path) in [files_of(kind) for kind in kinds]


def test_a_reader_while_the_form_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the vectors of the earlier form and their description another process writes the new form."""
    save("earlier with head", tmp_path)
    from red_kernels.checkpoints import folder as _saved_folder

    real = _saved_folder._read_config
    once = [True]

    def meanwhile(folder: Path) -> Any:
        if once:
            once.clear()
            save("bias", folder)
        return real(folder)

    monkeypatch.setattr(_saved_folder, "_read_config", meanwhile)
    assert state(tmp_path)[0] == rk.RedConfig(kind="bias")
    save("earlier", tmp_path)
    once.append(True)
    assert rk.saved_config(tmp_path) == rk.RedConfig(kind="bias")


# ---- temporary files


def temporary(folder: Path, pid: int, host: str | None = None) -> Path:
    path = folder / f".{TENSORS_NAME}.red-{host or _files._host()}-{pid}-0123456789abcdef.tmp"
    path.write_bytes(b"half")
    return path


def dead() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


def test_leftovers_go_and_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = [temporary(tmp_path, dead()), temporary(tmp_path, os.getpid())]  # of a former process of our number
    kept = [temporary(tmp_path, os.getppid()), temporary(tmp_path, dead(), "elsewhere")]
    mine = [tmp_path / ".notes.tmp", tmp_path / ".red_edits.safetensors.tmp", tmp_path / "thesis.txt"]
    for path in mine:
        path.write_text("mine")
    folder = tmp_path / f".{TENSORS_NAME}.red-{_files._host()}-{dead()}-0123456789abcdee.tmp"
    folder.mkdir()
    save("all", tmp_path)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in [*kept, *mine, folder])
    former = tmp_path / f".{CONFIG_NAME}.123-0123abcd.tmp"  # as earlier versions named them
    former.write_text("half")
    save("all", tmp_path)
    assert former.exists()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 2 * 86_400)
    save("all", tmp_path)
    assert not any(path.exists() for path in [*kept, former])
    assert all(path.exists() for path in mine)


def test_another_thread_is_not_taken_for_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = _files._write_synced

    def meanwhile(path: Path, content: bytes) -> None:
        real(path, content)
        _files.remove_leftovers(path.parent)
        seen.append(path.exists())

    monkeypatch.setattr(_files, "_write_synced", meanwhile)
    save("head", tmp_path)
    assert seen == [True] * len(files_of("head"))


def test_names_say_host_and_process(tmp_path: Path) -> None:
    with _files.temporary(tmp_path / "x") as first, _files.temporary(tmp_path / "x") as second:
        assert first != second
        assert f"-{os.getpid()}-" in first.name
        assert socket.gethostname()[:8].replace("-", "_").replace(".", "_") in first.name
    with _files.temporary(tmp_path / ("x" * 250)) as path:
        path.write_text("fits")


def test_a_lock_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("all", tmp_path)
    before = (tmp_path / TENSORS_NAME).read_bytes()
    monkeypatch.setattr(_files, "_PATIENCE", 0.0)
    with (
        _files.locked(tmp_path),
        pytest.raises(TimeoutError, match=r"cannot write to the folder .*held the lock of the folder"),
    ):
        save("bias", tmp_path)
    assert (tmp_path / TENSORS_NAME).read_bytes() == before
    monkeypatch.setattr(_files, "fcntl", None)  # a system without locks
    save("bias", tmp_path)
    assert rk.saved_config(tmp_path).kind == "bias"


# ---- marks


def test_a_head_of_another_save_is_refused(tmp_path: Path) -> None:
    save("head", tmp_path / "one")
    save("other head", tmp_path / "two")
    shutil.copy(tmp_path / "two" / HEAD_NAME, tmp_path / "one" / HEAD_NAME)
    with pytest.raises(ValueError, match=r"red_head\.safetensors: is of another save than red_edits\.safetensors"):
        checkpoint.read(tmp_path / "one")
    (tmp_path / "one" / HEAD_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"red_head\.safetensors does not exist; .*saved with a trained head"):
        checkpoint.read(tmp_path / "one")
    assert checkpoint.read(tmp_path / "one" / TENSORS_NAME).trained is None


def test_authors_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        rk.export_authors(with_head(value)[0], tmp_path / str(value))
    shutil.copy(tmp_path / "1.0" / CLASSIFIER_NAME, tmp_path / "2.0" / CLASSIFIER_NAME)
    with pytest.raises(ValueError, match=r"classifier\.pth: is missing, or of another save"):
        checkpoint.read(tmp_path / "2.0")
    state = torch.load(tmp_path / "1.0" / CLASSIFIER_NAME, weights_only=True)
    torch.save(state, tmp_path / "2.0" / CLASSIFIER_NAME)  # by another program: taken
    assert len(checkpoint.read(tmp_path / "2.0").head) == 4


def test_the_same_content_gives_the_same_files(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        save("head", tmp_path / folder)
        rk.export_authors(with_head(1.0)[0], tmp_path / folder)
    for name in names(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


@pytest.mark.parametrize("mark", ["../../secret", "x", "", 5])
def test_a_mark_is_no_path(mark: object, tmp_path: Path) -> None:
    import json

    from checkpoint_helpers import assert_refused, describe, description

    rk.save_edits(trained(), tmp_path)
    describe(tmp_path, json.dumps({**description(tmp_path), "head": mark}))
    assert_refused(tmp_path, "'head'")


def test_numbers_in_names_that_are_none(tmp_path: Path) -> None:
    """Digits of other scripts, and thousands of them, in the name of a site."""
    import safetensors.torch

    sites = [f"layers.{number}.mlp" for number in ("²", "9" * 5_000, "٣", "10", "2", "007")]
    tensors = {f"{site}.red_edit.scale": torch.ones(zoo.HIDDEN) for site in sites}
    safetensors.torch.save_file(tensors, tmp_path / "edits.safetensors")
    found = list(checkpoint.read(tmp_path / "edits.safetensors").vectors)
    numbered = [site for site in found if site.split(".")[1] in ("2", "007", "10")]
    assert numbered == ["layers.2.mlp", "layers.007.mlp", "layers.10.mlp"]
    assert set(found) == set(sites)
    with pytest.raises(ValueError, match="none of its sites"):
        rk.load_edits(patched(), tmp_path / "edits.safetensors")


def test_a_new_run_removes_its_own_files_only(tmp_path: Path) -> None:
    from red_kernels.finetune.run_folder import RunFolder

    for kind in ("head", "earlier with head"):
        save(kind, tmp_path / "edits")
        (tmp_path / "edits" / "thesis.txt").write_text("years")
        RunFolder(tmp_path, {}, {}).begin()
        assert names(tmp_path / "edits") == ["thesis.txt"]
    (tmp_path / "edits" / "thesis.txt").unlink()
    save("all", tmp_path / "edits")
    RunFolder(tmp_path, {}, {}).begin()
    assert names(tmp_path) == ["run.json"]
