"""`red-kernels convert`: the authors' form into our own folders and back, and all that it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import authors_forms
import model_zoo as zoo
import pytest
import safetensors.torch
import torch
from authors_forms import CLASSIFIER, VECTORS
from checkpoint_helpers import as_earlier, description, every_vector, same, trained, values
from torch import Tensor, nn

from red_kernels import cli, models
from red_kernels.checkpoints import infer as _infer
from red_kernels.checkpoints.authors import export_authors
from red_kernels.checkpoints.checkpoint import (
    CONFIG_NAME,
    HEAD_NAME,
    TENSORS_NAME,
    load_edits,
    save_edits,
    saved_config,
)
from red_kernels.checkpoints.convert import convert
from red_kernels.checkpoints.peft_write import PEFT_NAMES
from red_kernels.edits.config import POSITIONS, RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch

CASES = [(name, position) for name, positions in authors_forms.SITES.items() for position in positions]


def load(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(path / VECTORS, weights_only=True)
    return found


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def source(tmp_path: Path, name: str = "llama", position: str = "ffn", kind: str = "all", **more: Any) -> Path:
    return authors_forms.write(tmp_path / "source", authors_forms.state(zoo.tiny(name), name, position, kind), **more)


def config_of(tmp_path: Path, name: str) -> Path:
    """A folder with the `config.json` of a tiny model."""
    model: Any = zoo.tiny(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fresh(name: str, folder: Path) -> nn.Module:
    """A tiny model with the edits of a converted folder."""
    model = zoo.tiny(name)
    patch(model, saved_config(folder))
    load_edits(model, folder)
    return model


# ---- from the authors' form


@pytest.mark.parametrize("kind", list(authors_forms.PARTS))
@pytest.mark.parametrize(("name", "position"), CASES)
def test_from_names_alone_and_back(name: str, position: str, kind: str, tmp_path: Path) -> None:
    folder = source(tmp_path, name, position, kind)
    done = convert(folder, tmp_path / "own")
    assert saved_config(tmp_path / "own") == RedConfig(position=position, kind=kind)
    assert done.sites == len(authors_forms.names(name, position))
    assert f"position {position!r} (inferred from the names), kind {kind!r}" in str(done)
    wanted = zoo.tiny(name)
    patch(wanted, RedConfig(position=position, kind=kind))
    load_edits(wanted, folder)
    assert same(values(wanted), values(fresh(name, tmp_path / "own")))
    convert(tmp_path / "own", tmp_path / "back")
    assert equal(load(tmp_path / "back"), load(folder))


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(("name", "position"), [(name, position) for name, position in CASES if position != "res"])
def test_from_a_model_and_back(name: str, position: str, as_file: bool, tmp_path: Path) -> None:
    """The folder then has the model's own names, and remembers what the authors' leave out."""
    folder, base = source(tmp_path, name, position), config_of(tmp_path, name)
    convert(folder, tmp_path / "own", str(base / "config.json" if as_file else base))
    assert saved_config(tmp_path / "own") == RedConfig(position=position)
    model = fresh(name, tmp_path / "own")
    tensors = safetensors.torch.load_file(tmp_path / "own" / TENSORS_NAME)
    assert set(tensors) == {key for key in model.state_dict() if ".red_edit." in key}
    assert description(tmp_path / "own")["inner_prefix"] == authors_forms.INNER.get(name, "")
    convert(tmp_path / "own", tmp_path / "back")
    assert equal(load(tmp_path / "back"), load(folder))


@pytest.mark.parametrize("with_model", [True, False])
def test_some_layers(with_model: bool, tmp_path: Path) -> None:
    state = {
        key: value for key, value in authors_forms.state(zoo.tiny("llama"), "llama", "ffn").items() if ".0." not in key
    }
    folder = authors_forms.write(tmp_path / "source", state)
    done = convert(folder, tmp_path / "own", str(config_of(tmp_path, "llama")) if with_model else None)
    assert saved_config(tmp_path / "own") == RedConfig(layers=(1, 2))
    assert "in the layers 1, 2" in str(done)
    assert len(edit_parameters(fresh("llama", tmp_path / "own"))) == 2


def test_half_precision_becomes_fp32(tmp_path: Path) -> None:
    state = {key: value.bfloat16() for key, value in authors_forms.state(zoo.tiny("llama"), "llama", "ffn").items()}
    convert(authors_forms.write(tmp_path / "source", state), tmp_path / "own")
    tensors = safetensors.torch.load_file(tmp_path / "own" / TENSORS_NAME)
    assert all(value.dtype == torch.float32 for value in tensors.values())
    assert saved_config(tmp_path / "own").dtype == torch.float32
    convert(tmp_path / "own", tmp_path / "back")
    assert equal(load(tmp_path / "back"), {key: value.float() for key, value in state.items()})


def test_a_position_that_is_said(tmp_path: Path) -> None:
    """Names of an unknown family tell their layers; the position is what was said."""
    value = torch.ones(1, 4)
    state = {f"tower.{layer}.project.delta_vector.activation_scaling": value for layer in range(2)}
    folder = authors_forms.write(tmp_path / "source", state)
    with pytest.raises(ValueError, match=r"no position of a known family edits project in each layer; pass --model"):
        convert(folder, tmp_path / "own")
    convert(folder, tmp_path / "own", position="attn")
    assert saved_config(tmp_path / "own") == RedConfig(position="attn", kind="scaling")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda state: state.pop("model.layers.1.mlp.down_proj.delta_vector.activation_bias"),
            "expected one kind at all sites",
        ),
        (
            lambda state: (
                state.update({"head.delta_vector.activation_scaling": torch.ones(1, 4)})
                or state.update({"head.delta_vector.activation_bias": torch.ones(1, 4)})
            ),
            "the site 'head' names no layer",
        ),
        (
            lambda state: state.update({"model.layers.1.mlp.down_proj.delta_vector.activation_bias": torch.ones(1, 4)}),
            "differ in width",
        ),
        (
            lambda state: [
                state.update({key.replace("down_proj", "up_proj"): state.pop(key)})
                for key in list(state)
                if ".1." in key
            ],
            r"no position of a known family edits mlp\.down_proj, mlp\.up_proj",
        ),
        (lambda state: state.clear(), "is empty"),
        (lambda state: state.update({"other": torch.ones(2)}), "not a file of edits: has other"),
    ],
)
def test_names_that_do_not_say_it(change: Any, match: str, tmp_path: Path) -> None:
    state = authors_forms.state(zoo.tiny("llama"), "llama", "ffn")
    change(state)
    with pytest.raises(ValueError, match=match):
        convert(authors_forms.write(tmp_path / "source", state), tmp_path / "own")
    assert not (tmp_path / "own").exists()


def test_a_kind_that_does_not_exist(tmp_path: Path) -> None:
    state = authors_forms.state(zoo.tiny("llama"), "llama", "ffn", "ln")
    state = {key: value for key, value in state.items() if not key.endswith("activation_bias")}
    with pytest.raises(ValueError, match="no kind of edit has scale, norm_weight, norm_bias alone; kinds: 'all'"):
        convert(authors_forms.write(tmp_path / "source", state), tmp_path / "own")


def test_names_that_say_two_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = models.Family(name="Other", layers=("OtherLayer",), sites={"attn": ("mlp.down_proj",)})
    monkeypatch.setattr(_infer, "FAMILIES", [*models.FAMILIES, other])
    with pytest.raises(ValueError, match=r"its sites are those of position 'ffn' of .*, 'attn' of Other; pass --model"):
        convert(source(tmp_path), tmp_path / "own")
    convert(tmp_path / "source", tmp_path / "own", position="attn")
    assert saved_config(tmp_path / "own").position == "attn"


@pytest.mark.parametrize("position", list(POSITIONS))
@pytest.mark.parametrize("family", models.FAMILIES, ids=lambda family: family.name)
def test_no_two_positions_of_known_families_have_the_same_names(family: models.Family, position: str) -> None:
    if any(place not in family.sites for place in POSITIONS[position]):
        pytest.skip(f"{family.name} has no position {position}")
    entries = [entry for place in POSITIONS[position] for entry in family.sites[place]]
    for chosen in (entries, [entry for entry in entries if not entry.endswith("?")] or entries):
        paths = [entry.removesuffix("?").split("|")[0].partition(" with ")[0].replace("-1", "7") for entry in chosen]
        names = [f"stack.{layer}.{path}".rstrip(".") for layer in range(2) for path in paths]
        vectors = {name: {"scale": torch.ones(2)} for name in names}
        assert _infer.config_from_names(Path("file"), vectors) == RedConfig(position=position, kind="scaling")


def test_layers_that_differ_between_stacks(tmp_path: Path) -> None:
    state = authors_forms.state(zoo.tiny("t5"), "t5", "ffn")
    state = {key: value for key, value in state.items() if not key.startswith("encoder.block.0.")}
    folder = authors_forms.write(tmp_path / "source", state)
    with pytest.raises(ValueError, match=r"in decoder\.block, encoder\.block not the same ones.*--model"):
        convert(folder, tmp_path / "own")
    with pytest.raises(
        ValueError, match=r"'ffn': in the checkpoint only: nothing; in the model only: encoder\.block\.0"
    ):
        convert(folder, tmp_path / "own", str(config_of(tmp_path, "t5")))


def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    folder = source(tmp_path)
    with pytest.raises(
        ValueError, match=r"no position of this GPT2LMHeadModel has these sites: 'ffn': in the checkpoint"
    ):
        convert(folder, tmp_path / "own", str(config_of(tmp_path, "gpt2")))
    with pytest.raises(ValueError, match=r"no position of this LlamaForCausalLM has these sites: 'attn':"):
        convert(folder, tmp_path / "own", str(config_of(tmp_path, "llama")), position="attn")
    state = {key: value[:, :-1].clone() for key, value in load(folder).items()}
    with pytest.raises(ValueError, match=r"down_proj has width 31, model.* in the LlamaForCausalLM 32"):
        convert(authors_forms.write(tmp_path / "cut", state), tmp_path / "own", str(config_of(tmp_path, "llama")))
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "has no config.json"),
        ("{", "no usable configuration"),
        ('{"model_type": "x"}', "no usable configuration"),
    ],
)
def test_a_model_that_is_none(content: str | None, match: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    if content is not None:
        (base / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=match):
        convert(source(tmp_path), tmp_path / "own", str(base))
    with pytest.raises(OSError, match="is no file or folder, and could not be found on the hub"):
        convert(tmp_path / "source", tmp_path / "own", "no id of a hub!")


# ---- to the authors' form


def test_own_folders_say_what_the_authors_names_leave_out(tmp_path: Path) -> None:
    model = trained("roberta")
    save_edits(model, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "converted")
    export_authors(model, tmp_path / "exported")
    assert equal(load(tmp_path / "converted"), load(tmp_path / "exported"))


@pytest.mark.parametrize("as_file", [True, False])
def test_files_that_do_not_say_it_need_the_model(as_file: bool, tmp_path: Path) -> None:
    model = trained("roberta")
    save_edits(model, tmp_path / "own")
    as_earlier(tmp_path / "own")
    said = json.loads((tmp_path / "own" / CONFIG_NAME).read_text())
    del said["inner_prefix"]  # as the first versions wrote it
    (tmp_path / "own" / CONFIG_NAME).write_text(json.dumps(said))
    path = tmp_path / "own" / TENSORS_NAME if as_file else tmp_path / "own"
    with pytest.raises(ValueError, match=r"such as roberta\.encoder.*pass --model"):
        convert(path, tmp_path / "converted")
    convert(path, tmp_path / "converted", str(config_of(tmp_path, "roberta")))
    export_authors(model, tmp_path / "exported")
    assert equal(load(tmp_path / "converted"), load(tmp_path / "exported"))
    target = fresh("roberta", tmp_path / "own")
    load_edits(target, tmp_path / "converted")
    assert same(values(model), values(target))


def test_a_position_is_not_for_this_way(tmp_path: Path) -> None:
    save_edits(trained(), tmp_path / "own")
    with pytest.raises(ValueError, match="position: got 'ffn', but the authors' form does not hold one"):
        convert(tmp_path / "own", tmp_path / "converted", position="ffn")
    with pytest.raises(ValueError, match="position: got 'nowhere', supported: 'ffn'"):
        convert(source(tmp_path), tmp_path / "converted", position="nowhere")


# ---- the classifier head


def test_the_head_goes_along_both_ways(tmp_path: Path) -> None:
    trainer = pytest.importorskip("red_kernels.integrations.trainer")
    head = authors_forms.classifier()
    folder = source(tmp_path, "roberta", head=head)
    done = convert(folder, tmp_path / "own", str(config_of(tmp_path, "roberta")))
    assert [path.name for path in done.files] == [TENSORS_NAME, HEAD_NAME, *PEFT_NAMES]
    model: Any = zoo.tiny("roberta")
    patch(model, saved_config(tmp_path / "own"))
    model.classifier.requires_grad_(True)
    trainer.load_trained(model, tmp_path / "own")  # as a run of finetune reads it
    assert all(torch.equal(value, head[key]) for key, value in model.classifier.named_parameters())
    convert(tmp_path / "own", tmp_path / "back")
    assert equal(torch.load(tmp_path / "back" / CLASSIFIER, weights_only=True), head)
    again: Any = zoo.tiny("roberta")
    patch(again, RedConfig())
    assert len(load_edits(again, tmp_path / "back").head) == 4
    assert same(
        [*every_vector(model), *model.classifier.parameters()], [*every_vector(again), *again.classifier.parameters()]
    )


def test_a_head_beside_a_single_file_is_named(tmp_path: Path) -> None:
    folder = source(tmp_path, "roberta", head=authors_forms.classifier())
    done = convert(folder / VECTORS, tmp_path / "alone")
    assert "note: classifier.pth next to the file was not converted" in str(done)
    assert not (tmp_path / "alone" / HEAD_NAME).exists()
    convert(folder, tmp_path / "own")
    base = str(config_of(tmp_path, "roberta"))
    assert f"note: {HEAD_NAME} next to" in str(convert(tmp_path / "own" / TENSORS_NAME, tmp_path / "back", base))
    assert not (tmp_path / "back" / CLASSIFIER).exists()


def test_what_the_authors_form_has_no_place_for(tmp_path: Path) -> None:
    save_edits(trained("bert"), tmp_path / "own")
    safetensors.torch.save_file({"bert.pooler.dense.bias": torch.ones(3)}, tmp_path / "own" / HEAD_NAME)
    with pytest.raises(ValueError, match=r"holds bert\.pooler\.dense\.bias, for which the authors' form has no place"):
        convert(tmp_path / "own", tmp_path / "converted")
    (tmp_path / "own" / HEAD_NAME).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        convert(tmp_path / "own", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


# ---- files and the command


def test_former_files(tmp_path: Path) -> None:
    folder, own = source(tmp_path, "roberta", head=authors_forms.classifier()), tmp_path / "own"
    convert(folder, own)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    with pytest.raises(FileExistsError, match=r"has red_edits\.safetensors, red_head\.safetensors.*--overwrite"):
        convert(folder, own)
    convert(folder, own, overwrite=True)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    # A head of before does not stay beside vectors that have none.
    (folder / CLASSIFIER).unlink()
    with pytest.raises(ValueError, match=r"has red_head\.safetensors, which would not belong to the new files"):
        convert(folder, own, overwrite=True)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    with pytest.raises(ValueError, match="is the folder of the source"):
        convert(folder, folder, overwrite=True)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert(tmp_path / "absent", tmp_path / "new")
    with pytest.raises(OSError, match="cannot write to the folder"):
        convert(folder, folder / VECTORS / "below")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source(tmp_path)
    assert cli.main(["convert", str(folder), str(tmp_path / "own"), "--model", str(config_of(tmp_path, "llama"))]) == 0
    shown = capsys.readouterr().out
    assert "192 parameters at 3 sites; position 'ffn' (inferred from LlamaForCausalLM), kind 'all'" in shown
    assert f"wrote {tmp_path / 'own' / TENSORS_NAME}" in shown
    assert cli.main(["convert", str(tmp_path / "own"), str(tmp_path / "back")]) == 0
    assert "in the authors' form" in capsys.readouterr().out
    assert equal(load(tmp_path / "back"), load(folder))
    assert cli.main(["convert", str(folder), str(tmp_path / "own")]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: output: ")
    assert "--overwrite" in error
    assert cli.main(["convert", str(folder), str(tmp_path / "own"), "--overwrite", "--position", "ffn"]) == 0
    assert cli.main(["convert", str(tmp_path / "absent"), str(tmp_path / "new")]) == cli.EXIT_ERROR
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
