"""Who takes whose folders: ours, PEFT's, the authors' and a run's, in all directions, with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import tiny_folders
import torch
from checkpoint_helpers import change_base, every_vector
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import red_kernels as rk
from red_kernels.checkpoints.convert import convert
from red_kernels.checkpoints.folder import TENSORS_NAME
from red_kernels.checkpoints.reading import RUN_EDITS
from red_kernels.cli import main
from red_kernels.finetune.run_folder import EDITS_NAME
from red_kernels.integrations.peft import RedPeftConfig
from red_kernels.integrations.trainer import save_trained
from red_kernels.support.base_models import PACKAGED

IDS = torch.tensor([[3, 4, 5, 6]])
FORMS = ("own", "run", "peft", "authors")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return tiny_folders.tiny_llama(tmp_path / "llama")


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def randomised(model: Any) -> Any:
    with torch.no_grad():
        for vector in every_vector(model):
            vector.add_(torch.randn(vector.shape) * 0.3)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def saved(form: str, llama: Path, folder: Path, **options: Any) -> tuple[Path, torch.Tensor]:
    """A folder of one of the forms, and the logits of the model that it came from."""
    if form == "peft":
        adapter = randomised(get_peft_model(base(llama), RedPeftConfig(**options)))
        adapter.save_pretrained(folder)
        return folder, logits(adapter)
    model = base(llama)
    rk.patch(model, rk.RedConfig(**options))
    randomised(model)
    if form == "authors":
        rk.export_authors(model, folder)
    else:
        rk.save_edits(model, folder / "edits" if form == "run" else folder)
    if form == "run":
        (folder / "run.json").write_text("{}")
    return folder, logits(model)


@pytest.mark.parametrize("form", FORMS)
def test_load_edits(form: str, llama: Path, tmp_path: Path) -> None:
    folder, wanted = saved(form, llama, tmp_path / "saved", position="ffn_attn")
    model = base(llama)
    rk.patch(model, rk.RedConfig("ffn_attn") if form == "authors" else rk.saved_config(folder))
    rk.load_edits(model, folder)
    assert torch.equal(logits(model.eval()), wanted)


@pytest.mark.parametrize("form", ["own", "run", "peft"])
def test_from_pretrained(form: str, llama: Path, tmp_path: Path) -> None:
    folder, wanted = saved(form, llama, tmp_path / "saved", position="ffn_attn")
    model = rk.from_pretrained(folder)
    assert torch.equal(logits(model), wanted)
    assert not model.training
    assert torch.equal(logits(rk.from_pretrained(str(folder), dtype=torch.float64)).float().argmax(), wanted.argmax())
    rk.save_edits(model, tmp_path / "again")
    assert torch.equal(logits(rk.from_pretrained(tmp_path / "again")), wanted)


def test_shared_vectors_of_an_adapter(llama: Path, tmp_path: Path) -> None:
    folder, wanted = saved("peft", llama, tmp_path / "saved", kind="gift:4")
    assert torch.equal(logits(rk.from_pretrained(folder)), wanted)


@pytest.mark.parametrize("form", ["own", "run", "peft"])
def test_merge(form: str, llama: Path, tmp_path: Path) -> None:
    folder, wanted = saved(form, llama, tmp_path / "saved", kind="scaling")
    output = tmp_path / "merged"
    assert main(["merge", "--model", str(llama), "--edits", str(folder), "--output", str(output)]) == 0
    torch.testing.assert_close(logits(base(output).eval()), wanted)


@pytest.mark.parametrize("to", ["own", "peft", "authors"])
@pytest.mark.parametrize("form", FORMS)
def test_convert(form: str, to: str, llama: Path, tmp_path: Path) -> None:
    folder, wanted = saved(form, llama, tmp_path / "saved", position="ffn_attn")
    output = tmp_path / "converted"
    arguments = ["convert", str(folder), str(output), "--to", to, "--model", str(llama)]
    if to == {"run": "own"}.get(form, form):
        assert main(arguments) == 2
        assert not output.exists()
        return
    assert main(arguments) == 0
    if to == "peft":
        loaded = PeftModel.from_pretrained(base(llama), output)
    else:
        loaded = base(llama)
        rk.patch(loaded, rk.RedConfig("ffn_attn") if to == "authors" else rk.saved_config(output))
        rk.load_edits(loaded, output)
    assert torch.equal(logits(loaded.eval()), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "scaling", "layers": (1,)},
        {"position": "ia3"},
        {"position": "ia3", "layers": (0,)},
        {"kind": "lowrank:2"},
        {"kind": "gift:4"},
        {"kind": "gift:4", "sites": ("model.layers.*.mlp.down_proj",)},
        {"sites": ("model.layers.*.mlp.up_proj",), "kind": "bias"},
        {"dtype": torch.float64},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_edits_of_all_sorts_as_an_adapter_of_peft(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    folder, wanted = saved("own", llama, tmp_path / "saved", **options)
    convert(folder, tmp_path / "adapter", to="peft")
    for adapter in (folder, tmp_path / "adapter"):
        loaded: Any = PeftModel.from_pretrained(base(llama), adapter).eval()
        assert torch.equal(logits(loaded), wanted)
        count = sum(own.numel() for own in every_vector(loaded))
        assert count == sum(own.numel() for own in every_vector(_own(folder)))
        with_base: Any = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
        assert torch.equal(logits(with_base), wanted)


def _own(folder: Path) -> Any:
    return rk.from_pretrained(folder)


def test_a_trained_head_as_modules_to_save_and_back(tmp_path: Path) -> None:
    bert = tiny_folders.tiny_bert(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    rk.patch(model, rk.RedConfig(train_head=True))
    randomised(model)
    save_trained(model, tmp_path / "edits")
    convert(tmp_path / "edits", tmp_path / "adapter", to="peft")
    for adapter in ("edits", "adapter"):
        fresh = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / adapter).eval()
        assert torch.equal(logits(loaded), logits(model))
    convert(tmp_path / "adapter", tmp_path / "own")
    assert torch.equal(logits(rk.from_pretrained(tmp_path / "own")), logits(model))
    assert torch.equal(logits(rk.from_pretrained(tmp_path / "adapter")), logits(model))


def test_a_head_stays_in_full_precision_in_a_base_model_of_half(tmp_path: Path) -> None:
    bert = tiny_folders.tiny_bert(tmp_path / "bert")
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3, dtype=torch.bfloat16)
    rk.patch(model, rk.RedConfig(train_head=True))
    randomised(model)
    with torch.no_grad():
        model.classifier.weight.add_(torch.randn(3, 32))
    save_trained(model, tmp_path / "edits")
    loaded = rk.from_pretrained(tmp_path / "edits", dtype=torch.bfloat16)
    assert loaded.classifier.weight.dtype == torch.float32
    assert torch.equal(logits(loaded), logits(model))
    assert set(rk.edit_parameters(loaded)) == set(rk.edit_parameters(model))
    trainable = {id(own) for own in loaded.parameters() if own.requires_grad}
    assert trainable == {id(own) for own in every_vector(loaded)}


def test_peft_is_told_the_command_where_it_cannot_read_a_folder(llama: Path, tmp_path: Path) -> None:
    model = base(llama)
    rk.patch(model)
    folder = rk.save_edits(model, tmp_path / "saved", peft=False)
    with pytest.raises(ValueError, match=r"red-kernels convert .* --to peft"):
        RedPeftConfig.from_pretrained(str(folder))
    with pytest.raises(ValueError, match="adapter_config"):
        PeftModel.from_pretrained(base(llama), folder)


def test_a_model_and_its_edits_in_one_folder(llama: Path, tmp_path: Path) -> None:
    model = base(llama)
    rk.patch(model)
    randomised(model)
    with pytest.warns(UserWarning, match="they are next to it"):
        model.save_pretrained(tmp_path / "both")
    for path in llama.iterdir():  # it is its own base model
        path.unlink()
    assert torch.equal(logits(rk.from_pretrained(tmp_path / "both")), logits(model))


def test_a_copy_of_the_base_model_is_no_other_one(llama: Path, tmp_path: Path, recwarn: Any) -> None:
    folder, wanted = saved("own", llama, tmp_path / "saved")
    llama.rename(tmp_path / "moved")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=dtype)
        rk.patch(model)
        assert rk.load_edits(model, folder).warnings == ()
    assert torch.equal(logits(rk.from_pretrained(folder, base=str(tmp_path / "moved"))), wanted)
    assert not [one for one in recwarn if "base model" in str(one.message)]
    change_base(model)
    with pytest.warns(UserWarning, match="trained on the base model"):
        rk.load_edits(model, folder)


def test_a_base_model_that_is_gone_or_not_named(llama: Path, tmp_path: Path) -> None:
    folder, _ = saved("own", llama, tmp_path / "saved")
    llama.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="which is not here; pass base="):
        rk.from_pretrained(folder)
    model = base(tmp_path / "moved")
    model.config._name_or_path = ""
    rk.patch(model)
    rk.save_edits(model, tmp_path / "nameless")
    with pytest.raises(ValueError, match="name no base model; pass base="):
        rk.from_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="holds a model and no edits"):
        rk.from_pretrained(tmp_path / "moved")
    with pytest.raises(ValueError, match="dtype: got 'bf16'"):
        rk.from_pretrained(folder, dtype="bf16")
    rk.export_authors(model, tmp_path / "authors")
    with pytest.raises(ValueError, match="red-kernels convert"):
        rk.from_pretrained(tmp_path / "authors")


def test_convert_says_what_is_wrong_with_the_form(llama: Path, tmp_path: Path) -> None:
    folder, _ = saved("own", llama, tmp_path / "saved")
    with pytest.raises(ValueError, match="to: got 'else', expected one of 'own', 'authors', 'peft'"):
        convert(folder, tmp_path / "out", to="else")
    with pytest.raises(ValueError, match="is in that form already"):
        convert(folder, tmp_path / "out", to="own")
    convert(folder, tmp_path / "out", to="peft")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(folder, tmp_path / "out", to="peft")
    convert(folder, tmp_path / "out", to="peft", overwrite=True)
    rk.save_edits(rk.from_pretrained(folder), tmp_path / "other")
    with pytest.raises(ValueError, match="would not belong to the new files"):  # which nobody would read
        convert(folder, tmp_path / "other", to="peft", overwrite=True)


def test_the_runs_folder_is_the_one_that_finetune_writes() -> None:
    assert RUN_EDITS == EDITS_NAME


# ---- packaged models, which the very first run trains


def _packaged(name: str) -> None:
    try:
        next(model for model in PACKAGED if model.name == name).locate()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def test_a_packaged_model_from_a_run_to_a_merged_folder(tmp_path: Path) -> None:
    name = "all-MiniLM-L6-v2"
    _packaged(name)
    model, tokenizer = rk.load_base_model(name, "classification", labels=["bad", "good"])
    rk.patch(model, rk.RedConfig(train_head=True))
    randomised(model)
    save_trained(model, tmp_path / "run" / "edits")
    assert rk.load_tokenizer(tmp_path / "run")("a text").input_ids == tokenizer("a text").input_ids
    whole = rk.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(whole), logits(model))
    output = tmp_path / "merged"
    assert main(["merge", "--model", name, "--edits", str(tmp_path / "run"), "--output", str(output)]) == 0
    alone = AutoModelForSequenceClassification.from_pretrained(output).eval()
    torch.testing.assert_close(logits(alone), logits(model), atol=1e-4, rtol=1e-4)
    assert alone.config.id2label == {0: "bad", 1: "good"}
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "adapter"), "--to", "peft", "--model", name]) == 0


@pytest.mark.parametrize(
    ("name", "sites", "width"),
    [
        ("SmolLM2-135M-Instruct", [f"model.layers.{layer}.mlp.down_proj" for layer in range(30)], 576),
        ("all-MiniLM-L6-v2", [f"encoder.layer.{layer}.output.dense" for layer in range(6)], 384),
    ],
)
def test_convert_takes_packaged_models(name: str, sites: list[str], width: int, tmp_path: Path, capsys: Any) -> None:
    _packaged(name)
    tensors = {f"{site}.delta_vector.activation_scaling": torch.rand(1, width) for site in sites}
    (tmp_path / "authors").mkdir()
    torch.save(tensors, tmp_path / "authors" / "delta_vector.pth")
    assert main(["convert", str(tmp_path / "authors"), str(tmp_path / "own"), "--model", name]) == 0
    assert "inferred from" in capsys.readouterr().out
    assert rk.saved_config(tmp_path / "own") == rk.RedConfig(kind="scaling")
    with safetensors.safe_open(tmp_path / "own" / TENSORS_NAME, "pt") as file:
        assert len(list(file.keys())) == len(sites)


def test_load_base_model_of_a_folder_and_what_it_refuses(llama: Path) -> None:
    model, tokenizer = rk.load_base_model(str(llama), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer.pad_token_id is not None
    with pytest.raises(ValueError, match="labels: got None, expected the names"):
        rk.load_base_model(str(llama), "classification")
    with pytest.raises(ValueError, match="labels: got"):
        rk.load_base_model(str(llama), labels=["a"])
    with pytest.raises(ValueError, match="task: got 'other'"):
        rk.load_base_model(str(llama), "other")
    with pytest.raises(ValueError, match="revision: got 'main'"):
        rk.load_base_model(str(llama), revision="main")
