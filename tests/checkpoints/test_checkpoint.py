"""Saving and loading edits: our own folders, the authors' files, and everything that can be wrong with either."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_zoo
import pytest
import safetensors.torch
import torch
from checkpoint_helpers import (
    WIDTH,
    as_earlier,
    assert_refused,
    authors_state,
    change_base,
    describe,
    description,
    every_vector,
    patched,
    same,
    trained,
    values,
)
from places import python_path
from torch import nn

from red_kernels.checkpoints import checkpoint
from red_kernels.checkpoints.authors import VECTORS_NAME
from red_kernels.checkpoints.checkpoint import CONFIG_NAME, TENSORS_NAME, load_edits, save_edits, saved_config
from red_kernels.checkpoints.peft_write import PEFT_NAMES
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch

# ---- our own form


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "t5"])
@pytest.mark.parametrize("kind", ["all", "scaling", "bias"])
def test_round_trip(name: str, kind: str, tmp_path: Path) -> None:
    source = trained(name, kind=kind)
    assert save_edits(source, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    target = model_zoo.tiny(name)
    patch(target, saved_config(tmp_path / "new" / "folder"))
    before = every_vector(target)
    report = load_edits(target, tmp_path / "new" / "folder")
    assert same(values(source), values(target))
    assert all(old is new for old, new in zip(before, every_vector(target), strict=True)), "Parameters were replaced"
    assert set(report.loaded) == set(edit_parameters(source))
    assert not report.checkpoint_only
    assert not report.model_only


def test_optimizer_goes_on_after_loading(tmp_path: Path) -> None:
    save_edits(trained(), tmp_path)
    model = patched()
    optimizer = torch.optim.AdamW(every_vector(model), lr=0.5, weight_decay=0.0)
    load_edits(model, tmp_path)
    loaded = values(model)
    batch = model_zoo.inputs("llama")
    model(**batch).logits.square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(loaded, values(model), strict=True))


def test_files_are_small_and_say_what_they_are(tmp_path: Path) -> None:
    model: Any = trained(layers=range(1, 3))
    model.config._name_or_path = "some/base-model"
    save_edits(model, tmp_path)
    assert _leftovers(tmp_path) == sorted([TENSORS_NAME, *PEFT_NAMES])
    said = description(tmp_path)
    assert said["format_version"] == 1
    assert said["base_model_name"] == "some/base-model"
    assert (said["position"], said["kind"], said["layers"]) == ("ffn", "all", [1, 2])
    assert said["sites"] == {
        f"model.layers.{layer}.mlp.down_proj": {"width": WIDTH, "vectors": ["scale", "bias"]} for layer in (1, 2)
    }
    tensors = safetensors.torch.load_file(tmp_path / TENSORS_NAME)
    assert set(tensors) == {name for name in model.state_dict() if ".red_edit." in name}
    assert all(tensor.dtype == torch.float32 and tensor.shape == (WIDTH,) for tensor in tensors.values())
    assert saved_config(tmp_path) == RedConfig(layers=[1, 2])


def test_saved_config_keeps_site_patterns_and_dtype(tmp_path: Path) -> None:
    config = RedConfig(sites="*.down_proj", kind="bias", dtype=torch.bfloat16)
    model = model_zoo.tiny("llama")
    patch(model, config)
    save_edits(model, tmp_path)
    assert saved_config(tmp_path) == config


def test_a_single_safetensors_file_loads(tmp_path: Path) -> None:
    source, target = trained(), patched()
    save_edits(source, tmp_path)
    load_edits(target, tmp_path / TENSORS_NAME)
    assert same(values(source), values(target))


def test_saving_again_replaces(tmp_path: Path) -> None:
    save_edits(trained(), tmp_path)
    source, target = trained(layers=[0]), patched(layers=[0])
    save_edits(source, tmp_path)
    load_edits(target, tmp_path)
    assert same(values(source), values(target))


def test_nan_and_infinity_are_carried_through(tmp_path: Path) -> None:
    source, target = trained(), patched()
    with torch.no_grad():
        every_vector(source)[0][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    save_edits(source, tmp_path)
    load_edits(target, tmp_path)
    assert same(values(source), values(target))
    assert every_vector(target)[0][0].isnan()


def test_vectors_of_another_dtype_are_converted(tmp_path: Path) -> None:
    source, target = trained(), patched(dtype=torch.bfloat16)
    save_edits(source, tmp_path)
    load_edits(target, tmp_path)
    assert same([value.bfloat16() for value in values(source)], values(target))


def test_a_wrapper_around_the_model(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = model

    source, target = trained(), Wrapper(patched())
    save_edits(source, tmp_path / "inner")
    load_edits(target, tmp_path / "inner")
    assert same(values(source), values(target))
    save_edits(target, tmp_path / "wrapped")
    inner = patched()
    load_edits(inner, tmp_path / "wrapped")
    assert same(values(source), values(inner))


# ---- what does not fit


def test_an_unpatched_model_is_told_to_patch(tmp_path: Path) -> None:
    save_edits(trained(), tmp_path)
    model = model_zoo.tiny("llama")
    with pytest.raises(ValueError, match=r"not patched.*saved_config"):
        load_edits(model, tmp_path)
    with pytest.raises(ValueError, match="not patched"):
        save_edits(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_unmatched_sites_are_named(tmp_path: Path) -> None:
    save_edits(trained(layers=[0, 1]), tmp_path)
    model = patched(layers=[1, 2])
    before = values(model)
    with pytest.raises(ValueError, match=r"checkpoint only: model\.layers\.0.*model only: model\.layers\.2"):
        load_edits(model, tmp_path)
    assert same(before, values(model)), "a refused load changed the model"
    report = load_edits(model, tmp_path, strict=False)
    assert report.checkpoint_only == ("model.layers.0.mlp.down_proj.scale", "model.layers.0.mlp.down_proj.bias")
    assert report.model_only == ("model.layers.2.mlp.down_proj.scale", "model.layers.2.mlp.down_proj.bias")
    assert report.loaded == {"model.layers.1.mlp.down_proj": "model.layers.1.mlp.down_proj"}
    assert "in the checkpoint only: model.layers.0" in str(report)
    assert same(values(model)[2:], before[2:])
    assert not same(values(model)[:2], before[:2])


def test_another_kind_is_named_vector_by_vector(tmp_path: Path) -> None:
    save_edits(trained(), tmp_path)
    model = patched(kind="scaling")
    with pytest.raises(ValueError, match=r"checkpoint only: model\.layers\.0\.mlp\.down_proj\.bias"):
        load_edits(model, tmp_path)
    assert len(load_edits(model, tmp_path, strict=False).checkpoint_only) == model_zoo.LAYERS


def test_nothing_in_common_is_an_error_even_if_not_strict(tmp_path: Path) -> None:
    save_edits(trained("gpt2"), tmp_path)
    with pytest.raises(ValueError, match="none of its sites"):
        load_edits(patched("llama"), tmp_path, strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_wrong_widths_change_nothing(strict: bool, tmp_path: Path) -> None:
    save_edits(trained(), tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS_NAME)
    last = list(tensors)[-1]
    tensors[last] = tensors[last][:-1].clone()
    safetensors.torch.save_file(tensors, tmp_path / TENSORS_NAME, {"red_kernels": json.dumps(description(tmp_path))})
    model = patched()
    before = values(model)
    with pytest.raises(ValueError, match=r"width \(31,\).*\(32,\)"):
        load_edits(model, tmp_path, strict=strict)
    assert same(before, values(model))


def test_meta_models_are_refused(tmp_path: Path) -> None:
    model = patched()
    save_edits(model, tmp_path)
    meta = copy.deepcopy(model).to("meta")
    with pytest.raises(ValueError, match="meta device"):
        load_edits(meta, tmp_path)
    with pytest.raises(ValueError, match="meta device"):
        save_edits(meta, tmp_path / "other")


def test_another_position_is_refused(tmp_path: Path) -> None:
    save_edits(trained(), tmp_path)
    describe(tmp_path, json.dumps({**description(tmp_path), "position": "res"}))
    for path in (tmp_path, tmp_path / TENSORS_NAME):
        with pytest.raises(ValueError, match="position 'res'"):
            load_edits(patched(), path)


# ---- damaged and foreign files


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files(keep: int, tmp_path: Path) -> None:
    model = trained()
    save_edits(model, tmp_path)
    content = (tmp_path / TENSORS_NAME).read_bytes()
    (tmp_path / TENSORS_NAME).write_bytes(content[:keep])
    assert_refused(tmp_path, "damaged")

    torch.save(authors_state(model), tmp_path / VECTORS_NAME)
    content = (tmp_path / VECTORS_NAME).read_bytes()
    (tmp_path / VECTORS_NAME).write_bytes(content[: keep if keep >= 0 else -200])
    assert_refused(tmp_path / VECTORS_NAME, "damaged")


@pytest.mark.parametrize("earlier", [False, True])
def test_damaged_description(earlier: bool, tmp_path: Path) -> None:
    save_edits(trained(), tmp_path)
    good = description(tmp_path)
    if earlier:
        as_earlier(tmp_path)
    for content, match in (
        ("{", "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        ("[" * 100_000, "damaged"),
        ("9" * 5_000, "damaged"),
        ("[]", "not a description"),
        ('{"format": "other"}', "not a description"),
        (json.dumps({**good, "format_version": 2}), "format version 2"),
        (json.dumps({key: value for key, value in good.items() if key != "kind"}), "'kind'"),
        (json.dumps({**good, "sites": []}), "'sites'"),
        (json.dumps({**good, "dtype": "nn"}), "is not a dtype"),
        (json.dumps({**good, "sites": dict(list(good["sites"].items())[1:])}), "do not match"),
    ):
        if earlier:
            (tmp_path / CONFIG_NAME).write_bytes(content if isinstance(content, bytes) else content.encode())
        elif isinstance(content, str):
            describe(tmp_path, content)
        else:
            continue  # metadata is text
        where = CONFIG_NAME if earlier else TENSORS_NAME
        assert_refused(tmp_path, match)
        if match != "do not match":
            with pytest.raises(ValueError, match=rf"{where}: .*{match}"):
                saved_config(tmp_path)


def test_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither"):
        load_edits(patched(), tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_edits(patched(), tmp_path / "absent")
    save_edits(trained(), tmp_path)
    as_earlier(tmp_path)
    (tmp_path / CONFIG_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"red_config\.json"):
        load_edits(patched(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"red_config\.json"):
        saved_config(tmp_path)


def test_foreign_files(tmp_path: Path) -> None:
    model = model_zoo.tiny("llama")
    safetensors.torch.save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert_refused(tmp_path / "model.safetensors", r"not a file of edits.*model\.norm\.weight")
    safetensors.torch.save_file({}, tmp_path / "empty.safetensors")
    assert_refused(tmp_path / "empty.safetensors", "empty")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path / "pytorch_model.bin", "not a file of edits")
    torch.save([1, 2], tmp_path / "list.pth")
    assert_refused(tmp_path / "list.pth", "expected a dict")
    torch.save({1: torch.ones(1)}, tmp_path / "numbers.pth")
    assert_refused(tmp_path / "numbers.pth", "expected a dict")
    (tmp_path / "note.pth").write_text("hello")
    assert_refused(tmp_path / "note.pth", "damaged")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Attack()}))
    assert_refused(tmp_path / "evil.pth", "is damaged, or torch.load")
    torch.save({"x": Attack()}, tmp_path / "evil2.pth")
    assert_refused(tmp_path / "evil2.pth", "is damaged, or torch.load")
    assert not (tmp_path / "attacked").exists()


# ---- folders that cannot be written to


def _leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_full_disk_leaves_the_former_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained()
    save_edits(first, tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_edits(trained(kind="bias"), tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(OSError, match="No space left"):
        save_edits(first, tmp_path / "new")
    monkeypatch.undo()
    assert not (tmp_path / "new").exists()
    assert _leftovers(tmp_path) == sorted([TENSORS_NAME, *PEFT_NAMES])
    target = patched()
    load_edits(target, tmp_path)
    assert same(values(first), values(target))


def test_a_write_cut_short_by_the_system(tmp_path: Path) -> None:
    """A real failing write, half of the file already on the disk: the size of files is limited in a child process."""
    script = """
import resource, signal, sys
from checkpoint_helpers import trained
from red_kernels.checkpoints.checkpoint import save_edits
model = trained()
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    save_edits(model, sys.argv[1])
except OSError as error:
    print("refused:", error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
    )
    assert "refused:" in run.stdout, run.stderr
    assert "File too large" in run.stdout
    assert _leftovers(tmp_path) == []


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):  # the superuser may write anywhere: let the system call refuse instead
        real = os.open

        def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, flags, *more, **named)

        monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="cannot write to the folder"):
        save_edits(trained(), tmp_path)
    monkeypatch.undo()
    tmp_path.chmod(0o755)
    assert _leftovers(tmp_path) == []


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="cannot write to the folder"):
        save_edits(trained(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "a file"
    with pytest.raises(OSError, match="cannot write to the folder"):
        save_edits(trained(), tmp_path / "taken" / "below")


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_edits(trained(), tmp_path)
    assert _leftovers(tmp_path) == []


def test_file_permissions_follow_the_umask(tmp_path: Path) -> None:
    former = os.umask(0o027)
    try:
        save_edits(trained(), tmp_path / "edits")
    finally:
        os.umask(former)
    assert (tmp_path / "edits" / TENSORS_NAME).stat().st_mode & 0o777 == 0o640


def test_module_names_are_public() -> None:
    assert set(checkpoint.__all__) == {"LoadReport", "load_edits", "save_edits", "saved_config"}


def test_a_folder_with_the_base_model_and_its_edits_warns_of_no_other_base(tmp_path: Path) -> None:
    base, both = tmp_path / "base", tmp_path / "both"
    model_zoo.tiny("llama").save_pretrained(base)
    model = type(model_zoo.tiny("llama")).from_pretrained(base)
    patch(model)
    with pytest.warns(UserWarning, match="they are next to it"):
        model.save_pretrained(both)
    again = type(model).from_pretrained(both)
    patch(again)
    assert load_edits(again, both).warnings == ()
    model.config._name_or_path = "somebody/else"
    change_base(model)
    with pytest.warns(UserWarning, match="trained on the base model"):
        load_edits(model, both)
