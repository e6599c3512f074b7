"""PEFT's form beside our own in a folder of `rk.save_edits`: where it is, and that it never lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from checkpoint_helpers import every_vector
from killed import each_kill
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import red_kernels as rk
from red_kernels.checkpoints.card import CARD_NAME
from red_kernels.checkpoints.convert import convert
from red_kernels.checkpoints.folder import TENSORS_NAME, remove_saved
from red_kernels.checkpoints.peft_write import PEFT_NAMES
from red_kernels.edits.config import POSITIONS
from red_kernels.integrations.peft import RedPeftConfig

IDS = torch.tensor([[3, 4, 5, 6]])
WHOLE_LAYERS = ("res", "res_with_attn")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.tiny_llama(tmp_path_factory.mktemp("base") / "llama")


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def edited(llama: Path, value: float | None = None, **options: Any) -> Any:
    """A patched model; its vectors have one value, or random ones."""
    model = base(llama)
    rk.patch(model, rk.RedConfig(**options))
    with torch.no_grad():
        for own in every_vector(model):
            own.copy_(torch.rand(own.shape) if value is None else torch.full(own.shape, value))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("position", [name for name in POSITIONS if name not in WHOLE_LAYERS])
def test_every_position(position: str, llama: Path, tmp_path: Path) -> None:
    model = edited(llama, position=position)
    rk.save_edits(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(llama), tmp_path)), logits(model))


@pytest.mark.parametrize("position", WHOLE_LAYERS)
def test_whole_layers_have_no_such_form(position: str, llama: Path, tmp_path: Path) -> None:
    rk.save_edits(edited(llama), tmp_path)
    model = edited(llama, position=position)
    rk.save_edits(model, tmp_path)
    assert names(tmp_path) == {TENSORS_NAME}  # that of the former save is gone
    assert torch.equal(logits(rk.from_pretrained(tmp_path)), logits(model))


def test_both_forms_are_of_the_last_save(llama: Path, tmp_path: Path) -> None:
    for options in ({}, {"kind": "bias"}, {"position": "more"}):
        model = edited(llama, **options)
        rk.save_edits(model, tmp_path)
        assert names(tmp_path) == {TENSORS_NAME, *PEFT_NAMES}
        assert torch.equal(logits(PeftModel.from_pretrained(base(llama), tmp_path)), logits(model))
        assert torch.equal(logits(rk.from_pretrained(tmp_path)), logits(model))
    rk.save_edits(model, tmp_path, peft=False)
    assert names(tmp_path) == {TENSORS_NAME}


def test_the_same_save_gives_the_same_files(llama: Path, tmp_path: Path) -> None:
    model = edited(llama)
    contents = []
    for name in ("first", "second"):
        rk.save_edits(model, tmp_path / name)
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]


def test_an_adapter_of_something_else_stays(llama: Path, tmp_path: Path) -> None:
    get_peft_model(base(llama), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    get_peft_model(base(llama), RedPeftConfig()).save_pretrained(tmp_path / "red")
    for folder in (tmp_path / "lora", tmp_path / "red"):
        before = {name: (folder / name).read_bytes() for name in PEFT_NAMES}
        model = edited(llama)
        rk.save_edits(model, folder)
        assert {name: (folder / name).read_bytes() for name in PEFT_NAMES} == before
        assert torch.equal(logits(rk.from_pretrained(folder)), logits(model))
        rk.save_edits(model, folder, peft=False)
        remove_saved(folder)
        assert {name: (folder / name).read_bytes() for name in PEFT_NAMES} == before


def test_the_folder_of_a_model_stays_one(llama: Path, tmp_path: Path) -> None:
    model = edited(llama)
    rk.save_edits(model, tmp_path)
    with pytest.warns(UserWarning, match="they are next to it"):
        model.save_pretrained(tmp_path)
    rk.save_edits(model, tmp_path)
    assert not names(tmp_path) & set(PEFT_NAMES)
    assert torch.equal(logits(base(tmp_path)), logits(base(llama)))  # not the base model of an adapter


@pytest.mark.parametrize("damage", ["cut", "empty", "no header", "not json"])
def test_a_damaged_file_of_peft_is_not_taken_for_ours(damage: str, llama: Path, tmp_path: Path) -> None:
    model = edited(llama)
    rk.save_edits(model, tmp_path)
    path = tmp_path / PEFT_NAMES[0]
    content = path.read_bytes()
    path.write_bytes({"cut": content[:40], "empty": b"", "no header": b"\xff" * 8, "not json": b"1" * 99}[damage])
    damaged = path.read_bytes()
    rk.save_edits(model, tmp_path)
    assert path.read_bytes() == damaged
    assert torch.equal(logits(rk.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["all", "bias"])
def test_a_kill_leaves_each_form_whole(kind: str, llama: Path, tmp_path: Path) -> None:
    models = [edited(llama, 0.5), edited(llama, 2.0, kind=kind)]
    wanted = [logits(model) for model in models]

    def found(model: Any) -> int:
        return next(index for index, one in enumerate(wanted) if torch.equal(logits(model), one))

    seen = set()
    folder = tmp_path / "edits"
    for _ in each_kill(lambda: rk.save_edits(models[1], folder), lambda: rk.save_edits(models[0], folder)):
        own = found(rk.from_pretrained(folder))
        peft = found(PeftModel.from_pretrained(base(llama), folder)) if (folder / PEFT_NAMES[1]).exists() else None
        assert peft is None or peft <= own
        seen.add((own, peft))
    assert {(0, 0), (1, 0), (1, 1)} <= seen
    assert ((1, None) in seen) == (kind == "bias")  # a config of another kind goes first


def test_a_run_that_begins_anew_leaves_neither(llama: Path, tmp_path: Path) -> None:
    rk.save_edits(edited(llama), tmp_path / "edits")
    remove_saved(tmp_path / "edits")
    assert not (tmp_path / "edits").exists()


def test_convert_writes_both_and_says_so(llama: Path, tmp_path: Path) -> None:
    get_peft_model(base(llama), RedPeftConfig()).save_pretrained(tmp_path / "adapter")
    done = convert(tmp_path / "adapter", tmp_path / "own")
    assert {path.name for path in done.files} == names(tmp_path / "own") == {TENSORS_NAME, *PEFT_NAMES}


def test_the_config_says_nothing_that_peft_does_not_know(llama: Path, tmp_path: Path, recwarn: Any) -> None:
    rk.save_edits(edited(llama), tmp_path)
    RedPeftConfig.from_pretrained(tmp_path)
    assert not recwarn.list
    assert json.loads((tmp_path / PEFT_NAMES[1]).read_text())["peft_type"] == "RED"


def test_the_card_says_that_peft_takes_them(llama: Path, tmp_path: Path) -> None:
    for name, peft in (("both", True), ("own", False)):
        rk.save_edits(edited(llama), tmp_path / name, peft=peft)
        rk.write_model_card(tmp_path / name)
        card = (tmp_path / name / CARD_NAME).read_text()
        assert ("PeftModel.from_pretrained" in card) == peft
