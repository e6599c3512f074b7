"""Where `red-kernels merge` writes to: two at once, killed, or pointed at the wrong place, nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_folders
import torch
from killed import each_kill

import red_kernels as rk
from red_kernels.checkpoints import base
from red_kernels.cli import main
from red_kernels.merging import folder as merged_folder
from red_kernels.support import files as _files
from red_kernels.support import replaced as _replaced
from red_kernels.support import swap as _swap
from red_kernels.support.replaced import MARKER, OutputFolder

_OWN = '{"format": "red_kernels merged model", "files": %s}'
CONTENT = {"config.json": "{}", "deep/er": "weights"}


def write(target: Path, text: str, overwrite: bool = False) -> list[str]:
    output = OutputFolder(target, overwrite)
    with output.written() as folder:
        for name, content in CONTENT.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + text)
    return output.notes


def held(target: Path) -> str | None:
    """Which output is there; raises if it is not whole."""
    if not target.exists():
        return None
    said = json.loads((target / MARKER).read_text())
    assert sorted(said["files"]) == sorted(CONTENT)
    texts = {(target / name).read_text().removeprefix(content) for name, content in CONTENT.items()}
    assert len(texts) == 1
    return texts.pop()


@pytest.fixture(params=["in one step", "in two"])
def steps(request, monkeypatch):
    """With the system's exchange of names, and with two renames where it is missing."""
    if request.param == "in two":
        monkeypatch.setattr(_swap, "_renameat2", lambda source, target, flag: False)


@pytest.mark.parametrize("former", ["former", None])
def test_a_kill_leaves_the_former_output_or_the_new_one(former, steps, tmp_path):
    target = tmp_path / "deep" / "merged"

    def prepare():
        shutil.rmtree(tmp_path / "deep", ignore_errors=True)
        if former is not None:
            write(target, former)

    seen = set()
    for number in each_kill(lambda: write(target, "new", overwrite=True), prepare):
        # The next merge looks at its output, and finds one or the other.
        try:
            OutputFolder(target, overwrite=False)
            assert held(target) is None
            assert former is None, number
        except FileExistsError:
            assert held(target) in ("former", "new"), number
        seen.add(held(target))
        write(target, "later", overwrite=True)
        assert held(target) == "later"
        assert os.listdir(tmp_path / "deep") == ["merged"], number
    assert seen == {former, "new"}
    assert os.listdir(tmp_path / "deep") == ["merged"]


@pytest.mark.parametrize("former", ["former", None])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bad")])
def test_an_error_leaves_what_was_there(former, error, steps, tmp_path):
    target = tmp_path / "deep" / "er" / "merged"
    if former is not None:
        write(target, former)

    def fail():
        with OutputFolder(target, overwrite=True).written() as folder:
            (folder / "half").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert held(target) == former
    if former is None:
        assert os.listdir(tmp_path) == [], "parent folders that were made for it stayed"
    else:
        assert os.listdir(target.parent) == ["merged"]


@pytest.mark.parametrize(("former", "overwrite"), [(None, False), (None, True), ("former", True)])
def test_two_at_once(former, overwrite, steps, tmp_path):
    """The second ends while the first is writing: it wins, and the first says so and takes nothing away."""
    target = tmp_path / "merged"
    if former is not None:
        write(target, former)
    first = OutputFolder(target, overwrite)

    def run():
        with first.written() as folder:
            (folder / "config.json").write_text("first")
            write(target, "second", overwrite)
            assert (folder / "config.json").exists(), "the second has deleted the first's folder"

    with pytest.raises(FileExistsError, match=r"output: .*merged' (exists already|was changed)"):
        run()
    assert held(target) == "second"
    assert os.listdir(tmp_path) == ["merged"]


@pytest.mark.parametrize("former", ["former", None])
def test_the_second_comes_at_the_last_moment(former, tmp_path, monkeypatch):
    """Between the last look at the target and the rename."""
    target = tmp_path / "merged"
    if former is not None:
        write(target, former)
    output = OutputFolder(target, overwrite=True)
    real = output._check_unchanged

    def meanwhile():
        real()
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        (target / "thesis.txt").write_text("years")

    monkeypatch.setattr(output, "_check_unchanged", meanwhile)
    with pytest.raises(FileExistsError, match="by another process in the meantime"), output.written() as folder:
        (folder / "config.json").write_text("first")
    assert (target / "thesis.txt").read_text() == "years"
    assert os.listdir(tmp_path) == ["merged"]


def test_foreign_files_are_named(tmp_path):
    target = tmp_path / "merged"
    write(target, "former")
    for name in ("thesis.txt", "deep/notes", "empty/", "deep/link"):
        path = target / name
        if name.endswith("/"):
            path.mkdir()
        elif name.endswith("link"):
            path.symlink_to(tmp_path)
        else:
            path.write_text("mine")
        with pytest.raises(FileExistsError, match=rf"did not write: {name.removesuffix('/')}"):
            OutputFolder(target, overwrite=True)
        if name.endswith("/"):
            path.rmdir()
        else:
            path.unlink()
    assert held(target) == "former"
    write(target, "new", overwrite=True)
    assert held(target) == "new"


def test_files_that_were_changed_after_the_merge_stay(steps, tmp_path):
    """Someone has trained the merged model on and saved it in its place: the marker still names these files."""
    target = tmp_path / "merged"

    def own(name):
        path = target / name
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")

    (tmp_path / "elsewhere").write_text("{}former")
    changes = {
        "other content": lambda: (target / "deep" / "er").write_text("my own weights"),
        "as long": lambda: (target / "config.json").write_text("{}FORMER"),
        "added to": lambda: (target / "config.json").open("a").write("x"),
        "a link": lambda: own("config.json"),
    }
    for name, change in changes.items():
        shutil.rmtree(target, ignore_errors=True)
        write(target, "former")
        change()
        before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
        with pytest.raises(FileExistsError, match=r"changed after the merge: (config\.json|deep/er)"):
            OutputFolder(target, overwrite=True)
        assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before, name
    # Copied or touched is not changed.
    shutil.rmtree(target)
    write(tmp_path / "first", "former")
    shutil.copytree(tmp_path / "first", target, copy_function=shutil.copyfile)
    os.utime(target / "config.json")
    write(target, "new", overwrite=True)
    assert held(target) == "new"


def test_a_file_that_is_changed_while_the_new_one_is_written(steps, tmp_path):
    target = tmp_path / "merged"
    write(target, "former")
    output = OutputFolder(target, overwrite=True)

    def run():
        with output.written() as folder:
            (folder / "config.json").write_text("new")
            (target / "config.json").write_text("notes")

    with pytest.raises(FileExistsError, match="changed after the merge"):
        run()
    assert (target / "config.json").read_text() == "notes"
    assert os.listdir(tmp_path) == ["merged"]


@pytest.mark.parametrize(
    "marker",
    [None, "", "[]", "{", '{"format": "x", "files": []}', "[" * 100_000, '{"files": 3}', _OWN % "3", _OWN % "[]"],
)
def test_other_folders_are_no_merged_models(marker, tmp_path):
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.txt").write_text("one")
    if marker is not None:
        (target / MARKER).write_text(marker)
    with pytest.raises(FileExistsError, match=r"not a merged model of this command"):
        OutputFolder(target, overwrite=True)
    assert (target / "chapter.txt").read_text() == "one"


def test_a_marker_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "precious").write_text("x")
    target = tmp_path / "merged"
    write(target, "former")
    said = json.loads((target / MARKER).read_text())
    said["files"] |= dict.fromkeys(["../precious", str(tmp_path / "precious")], "0" * 64)
    (target / MARKER).write_text(json.dumps(said))
    write(target, "new", overwrite=True)
    assert (tmp_path / "precious").read_text() == "x"


def test_empty_folders_files_and_links(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        OutputFolder(tmp_path / "empty", overwrite=False)
    write(tmp_path / "empty", "new", overwrite=True)
    assert held(tmp_path / "empty") == "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file, expected a folder"):
        OutputFolder(tmp_path / "file", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write(tmp_path / "link", "newer", overwrite=True)
    assert held(tmp_path / "empty") == "newer"
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    write(tmp_path / "dangling", "there")
    assert held(tmp_path / "later") == "there"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "empty", "file", "later", "link"]


def test_the_users_own_temporary_names_stay(tmp_path):
    for name in (".merged.tmp", ".merged.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    write(tmp_path / "merged", "new")
    write(tmp_path / "merged", "newer", overwrite=True)
    assert all((tmp_path / name / "mine").exists() for name in (".merged.tmp", ".merged.old"))


# ---- the command


@pytest.fixture
def work(tmp_path):
    """`w/base`, `w/edits` and `w/thesis.txt`."""
    tiny_folders.tiny_llama(tmp_path / "w" / "base")
    model = base.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w" / "base")
    rk.patch(model)
    rk.save_edits(model, tmp_path / "w" / "edits")
    (tmp_path / "w" / "thesis.txt").write_text("years")
    return tmp_path / "w"


def merge(work, output, *more):
    return main(
        ["merge", "--model", str(work / "base"), "--edits", str(work / "edits"), "--output", str(output), *more]
    )


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_the_output_is_not_the_input(work, overwrite, capsys, tmp_path):
    (tmp_path / "link").symlink_to(work)
    before = sorted(path for path in work.rglob("*"))
    for output, words in (
        (work, "contains the base model"),
        (work / "base", "is the base model"),
        (work / "edits", "is the folder of the edits"),
        (work / "base" / "merged", "is inside of the base model"),
        (work / "edits" / "a" / "b", "is inside of the folder of the edits"),
        (tmp_path / "link", "contains the base model"),
        (tmp_path / "link" / "base", "is the base model"),
        (work / "edits" / ".." / "base", "is the base model"),
        (tmp_path, "contains the base model"),
    ):
        assert merge(work, output, *overwrite) == 2
        assert words in capsys.readouterr().err, output
    assert sorted(path for path in work.rglob("*")) == before


def test_a_merge_beside_another(work, monkeypatch, capsys):
    """The whole command: the second runs while the first is about to write."""
    output = work / "merged"
    real = merged_folder.source_tokenizer
    codes = []

    def meanwhile(source):
        if not codes:
            codes.append(0)
            codes.append(merge(work, output))
        return real(source)

    monkeypatch.setattr(merged_folder, "source_tokenizer", meanwhile)
    assert merge(work, output) == 2
    assert codes == [0, 0]
    assert "exists already" in capsys.readouterr().err
    loaded = base.transformers.AutoModelForCausalLM.from_pretrained(output)
    assert torch.isfinite(loaded.model.embed_tokens.weight).all()
    assert sorted(os.listdir(work)) == ["base", "edits", "merged", "thesis.txt"]


def test_a_full_disk_and_damaged_files(work, monkeypatch, capsys):
    def check(*words):
        assert merge(work, work / "merged") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert any(one in error for one in words), error
        assert sorted(os.listdir(work)) == ["base", "edits", "thesis.txt"]

    def full(*args, **options):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(base.transformers.LlamaForCausalLM, "save_pretrained", full)
        check("Error while serializing")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        check("No space left on device")
    tokenizer = work / "base" / "tokenizer.json"
    good = tokenizer.read_bytes()
    tokenizer.write_bytes(good[:100])
    check("the tokenizer of")
    tokenizer.write_bytes(good)
    config = json.loads((work / "base" / "config.json").read_text())
    for change in ({"architectures": ["Nothing"]}, {"architectures": 3}, {"architectures": ["AutoTokenizer"]}):
        (work / "base" / "config.json").write_text(json.dumps({**config, **change}))
        check("names the class", "Field 'architectures' expected")  # transformers 5.17 refuses a number itself
    for change in ({"hidden_size": "16"}, {"num_hidden_layers": None}):
        (work / "base" / "config.json").write_text(json.dumps({**config, **change}))
        check("could not be loaded")
    (work / "base" / "config.json").write_text(json.dumps(config))
    weights = work / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    check("could not be loaded")


def test_a_folder_written_aside_is_removed_later(work, capsys):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    name = f".merged.red-{_files._host()}-{child}-0123456789abcdef"
    former = work / f"{name}.old"
    write(work / "x", "former")
    os.rename(work / "x", former)
    (work / f"{name}.tmp").mkdir()
    (work / f"{name}.tmp" / "half").write_text("half")
    other = work / f".other.red-{_files._host()}-{child}-0123456789abcdef.tmp"
    other.mkdir()
    assert merge(work, work / "merged") == 2  # it has been brought back, and nobody has asked to replace it
    assert held(work / "merged") == "former"
    assert merge(work, work / "merged", "--overwrite") == 0
    assert sorted(os.listdir(work)) == [other.name, "base", "edits", "merged", "thesis.txt"]
    assert _replaced.MARKER in os.listdir(work / "merged")
