"""RED in PEFT: weighted combinations, what is never merged, and PEFT's folders for the commands."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_folders
import torch
import transformers
from peft import PeftModel, get_peft_model

import red_kernels as rk
from red_kernels import cli
from red_kernels.checkpoints import peft_folder
from red_kernels.integrations.peft import RedLayer, RedPeftConfig


def llama(tied: bool = False) -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def with_adapters(**configs: RedPeftConfig) -> Any:
    """A model with these adapters, of random vectors."""
    model = None
    for name, config in configs.items():
        config.init_weights = False
        config.task_type = "CAUSAL_LM"
        if model is None:
            model = get_peft_model(llama(), config, name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def layers(model: Any) -> dict[str, RedLayer]:
    return {name: own for name, own in model.base_model.model.named_modules() if isinstance(own, RedLayer)}


def vectors(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {
        f"{site}.{part}": value.detach()
        for site, layer in layers(model).items()
        if name in layer.red_edit
        for part, value in layer.red_edit.holder(name)._parameters.items()
        if value is not None
    }


CASES = {
    "alike": {"a": {}, "b": {}},
    "two kinds": {"a": {"kind": "scaling"}, "b": {"kind": "bias"}},
    "a kind alone": {"a": {"kind": "bias"}, "b": {"kind": "bias"}},
    "two positions": {"a": {"position": "attn"}, "b": {"position": "ffn"}},
    "other layers": {"a": {"layers_to_transform": [0]}, "b": {"layers_to_transform": [1], "kind": "scaling"}},
    "a layer and all": {"a": {}, "b": {"layers_to_transform": 1}},
    "names": {"a": {"target_modules": ["o_proj", "down_proj"]}, "b": {"target_modules": r".*\.0\.mlp\.down_proj"}},
    "with exclusions": {"a": {"target_modules": ["o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]}, "b": {}},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [2.0, -1.5]])
def test_a_weighted_combination(case: str, weights: list[float], tmp_path: Path) -> None:
    model = with_adapters(**{name: RedPeftConfig(**fields) for name, fields in CASES[case].items()})
    parts = {name: vectors(model, name) for name in "ab"}
    expected = {}
    for key in {**parts["a"], **parts["b"]}:
        start = 1.0 if key.endswith(".scale") else 0.0
        total = sum(
            w * (parts[name][key].double() - start) for name, w in zip("ab", weights, strict=True) if key in parts[name]
        )
        expected[key] = (start + total).float()
    model.add_weighted_adapter(["a", "b"], weights, "c")
    found = vectors(model, "c")
    identity = {key: value for key, value in found.items() if key not in expected}
    assert found.keys() >= expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(torch.equal(value, torch.full_like(value, key.endswith(".scale"))) for key, value in identity.items())
    assert model.active_adapter == "a"
    assert not any(own.requires_grad for name, own in model.named_parameters() if ".c." in name)

    ids = torch.randint(3, 32, (2, 5))
    model.set_adapter("c")
    with torch.no_grad():
        combined = model(input_ids=ids).logits
        model.save_pretrained(tmp_path, selected_adapters=["c"])
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "c").eval()
        assert torch.equal(loaded(input_ids=ids).logits, combined)
        model.delete_adapter("c")
        model.set_adapter("a")
        assert vectors(model, "a").keys() == parts["a"].keys()


def test_it_is_what_combine_edits_makes() -> None:
    model = with_adapters(a=RedPeftConfig(), b=RedPeftConfig())
    model.add_weighted_adapter(["a", "b"], [0.3, 0.9], "c")
    plain = llama()
    rk.patch(plain)
    for name in "ab":
        rk.add_edit(plain, name)
        with torch.no_grad():
            for site, parts in rk.edit_parameters(plain, name).items():
                for part, own in parts.items():
                    own.copy_(vectors(model, name)[f"{site}.{part}"])
    rk.combine_edits(plain, {"a": 0.3, "b": 0.9}, "c")
    for site, parts in rk.edit_parameters(plain, "c").items():
        for part, own in parts.items():
            assert torch.equal(own, vectors(model, "c")[f"{site}.{part}"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a", "x"], [1, 1], "c"), ValueError, "'x' does not exist, expected some of 'a', 'b', 'n'"),
        (([], [], "c"), TypeError, "adapters: got"),
        (("ab", [1, 1], "c"), TypeError, "adapters: got 'ab'"),
        ((["a", "b"], [1], "c"), ValueError, "weights: got"),
        ((["a"], 1.0, "c"), ValueError, "weights: got"),
        ((["a", "b"], [1, math.nan], "c"), TypeError, "weights: got nan"),
        ((["a", "b"], [1, math.inf], "c"), TypeError, "weights: got inf"),
        ((["a", "b"], [1, True], "c"), TypeError, "weights: got True"),
        ((["a", "b"], [1, "1"], "c"), TypeError, "weights: got '1'"),
        ((["a", "b"], [1, 1], "a"), ValueError, "has an adapter 'a' already"),
        ((["a", "b"], [1, 1], "a.b"), ValueError, "cannot be the name"),
        ((["a", "b"], [1, 1], ""), ValueError, "cannot be the name"),
        ((["a", "b"], [1, 1], "forward"), ValueError, "cannot be the name"),
        ((["a", "b"], [1, 1], "c", "svd"), ValueError, "combination_type: got 'svd'"),
        ((["a", "n"], [1, 1], "c"), ValueError, "'n' is of kind 'ln'"),
    ],
)
def test_wrong_combinations_change_nothing(arguments: Any, error: type[Exception], message: str) -> None:
    model = with_adapters(a=RedPeftConfig(), b=RedPeftConfig(), n=RedPeftConfig(kind="ln"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["a", "b", "n"]
    assert model.state_dict().keys() == before.keys()


def test_modules_to_save() -> None:
    model = with_adapters(a=RedPeftConfig(modules_to_save=["lm_head"]), b=RedPeftConfig())
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["a"].weight.fill_(0.25)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert torch.equal(head.modules_to_save["c"].weight, head.modules_to_save["a"].weight)
    assert model.peft_config["c"].modules_to_save == ["lm_head"]
    both = with_adapters(a=RedPeftConfig(modules_to_save=["lm_head"]), b=RedPeftConfig(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save, which cannot be combined"):
        both.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert list(both.peft_config) == ["a", "b"]


# ---- what is never merged


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "layer"])
def test_shared_parameters_are_refused(target: str, how: str) -> None:
    config = RedPeftConfig(target_modules=[target], kind="scaling", init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(llama(tied=True), config).eval()
    ids = torch.randint(3, 32, (2, 5))
    with torch.no_grad():
        before = model(input_ids=ids).logits
    merge = next(iter(layers(model).values())).merge if how == "layer" else getattr(model, how)
    with pytest.raises(ValueError, match=r"embed_tokens.*lm_head.* share one Parameter"):
        merge()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    untied = get_peft_model(llama(), config).eval()
    with torch.no_grad():
        expected = untied(input_ids=ids).logits
        torch.testing.assert_close(untied.merge_and_unload()(input_ids=ids).logits, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "layer"])
@pytest.mark.parametrize("safe", [False, True])
def test_what_is_not_finite_is_refused(value: float, how: str, safe: bool) -> None:
    model = with_adapters(a=RedPeftConfig(kind="scaling"))
    last = list(layers(model).values())[-1]
    with torch.no_grad():
        last.red_edit.holder("a").scale[2] = value
    state = {name: own.clone() for name, own in model.state_dict().items()}
    merge = last.merge if how == "layer" else getattr(model, how)
    with pytest.raises(ValueError, match=r"adapter a seems to be broken: the weight would have \d+"):
        merge(safe_merge=safe)
    now = model.state_dict()
    assert all(torch.equal(own.nan_to_num(), now[name].nan_to_num()) for name, own in state.items())


def test_an_overflow_is_refused() -> None:
    model = with_adapters(a=RedPeftConfig(kind="scaling")).half()
    with torch.no_grad():
        next(iter(layers(model).values())).red_edit.holder("a").scale.fill_(1e8)
    with pytest.raises(ValueError, match=r"the weight would have \d+ infinite values in torch\.float16"):
        model.merge_adapter()


# ---- folders


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folders.tiny_llama(tmp_path / "base")


def saved(base: Path, folder: Path, safe: bool = True, **fields: Any) -> Any:
    """An adapter with random vectors, saved by PEFT; the model."""
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    model = get_peft_model(model, RedPeftConfig(task_type="CAUSAL_LM", init_weights=False, **fields)).eval()
    model.save_pretrained(folder, safe_serialization=safe)
    return model


FOLDERS: dict[str, dict[str, Any]] = {
    "ffn": {},
    "a layer": {"layers_to_transform": [1]},
    "scaling of all projections": {"position": "more", "kind": "scaling"},
    "by names": {"target_modules": ["up_proj", "q_proj"], "kind": "scaling"},
    "a norm": {"target_modules": ["norm"], "kind": "scaling"},
    "a pickle": {"safe": False},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_merging_a_folder_of_peft(name: str, base: Path, tmp_path: Path) -> None:
    model = saved(base, tmp_path / "adapter", **FOLDERS[name])
    words = ["--model", str(base), "--edits", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert cli.main(["merge", *words]) == 0
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.randint(3, 200, (2, 6))
    with torch.no_grad():
        wanted = model.merge_and_unload()(input_ids=ids).logits
        assert torch.equal(merged(input_ids=ids).logits, wanted)


@pytest.mark.parametrize("name", FOLDERS)
def test_converting_a_folder_of_peft(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(base, tmp_path / "adapter", **FOLDERS[name])
    assert cli.main(["convert", str(tmp_path / "adapter"), str(tmp_path / "own")]) == 0
    assert "from an adapter of PEFT" in capsys.readouterr().out
    plain = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    rk.patch(plain, rk.saved_config(tmp_path / "own"))
    rk.load_edits(plain, tmp_path / "own")
    found = {f"{site}.{part}": own for site, parts in rk.edit_parameters(plain).items() for part, own in parts.items()}
    wanted = vectors(model, "default")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert cli.main(["convert", str(tmp_path / "adapter"), str(tmp_path / "own")]) == cli.EXIT_ERROR
    monkeypatch.setitem(sys.modules, "peft", None)  # PEFT is not needed to read its folders
    assert cli.main(["convert", str(tmp_path / "adapter"), str(tmp_path / "own"), "--overwrite"]) == 0


def test_a_trained_head_comes_along(base: Path, tmp_path: Path) -> None:
    model = saved(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    found = peft_folder.read_peft(tmp_path / "adapter").trained
    assert found is not None
    head = found.values
    assert list(head) == ["lm_head.weight"]
    assert torch.equal(head["lm_head.weight"], model.base_model.model.lm_head.modules_to_save["default"].weight)


@pytest.mark.parametrize("command", ["merge", "convert"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", json.dumps({"peft_type": "LORA"}).encode(), "the method 'LORA', expected 'RED'"),
        ("adapter_config.json", b"{", "adapter_config.json: is not JSON"),
        ("adapter_config.json", b"[" * 100_000, "adapter_config.json"),
        ("adapter_model.safetensors", b"\xff" * 90, "adapter_model.safetensors: is damaged"),
        ("adapter_model.safetensors", None, "holds neither"),
        ("adapter_model.safetensors", {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, "it is empty"),
        ("adapter_model.safetensors", {"base_model.model.x.red_edit.other": torch.ones(2)}, "x.red_edit.other"),
        ("adapter_model.safetensors", {"base_model.model.x.red_edit.scale": torch.ones(2, 2)}, "has shape (2, 2)"),
    ],
)
def test_folders_out_of_form(
    command: str, name: str, content: Any, message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else safetensors.torch.save(content))
    out = str(tmp_path / "out")
    words = {
        "convert": ["convert", str(tmp_path / "adapter"), out],
        "merge": ["merge", "--model", str(base), "--edits", str(tmp_path / "adapter"), "--output", out],
    }
    assert cli.main(words[command]) == cli.EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("site", "change", "message"),
    [
        ("layers.0", lambda own: own[:3], "has width (3,), the model's is"),
        ("layers.0", lambda own: own * float("nan"), "is not finite"),
        ("lm_head", lambda own: own * float("inf"), "lm_head.weight is not finite"),
    ],
)
def test_messages_name_the_file_of_the_adapter(
    site: str, change: Any, message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    changed = {name: change(own) if site in name else own for name, own in tensors.items()}
    path.write_bytes(safetensors.torch.save(changed))
    words = ["--model", str(base), "--edits", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    assert cli.main(["merge", *words]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert "red-kernels-" not in error
    if "edit 'default'" not in error:  # which the model holds
        assert str(path) in error


@pytest.mark.parametrize("output", ["adapter", "."])
def test_the_folder_of_the_edits_is_no_output(
    output: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(base, tmp_path / "w" / "adapter")
    words = ["--model", str(base), "--edits", str(tmp_path / "w" / "adapter"), "--output", str(tmp_path / "w" / output)]
    assert cli.main(["merge", *words, "--overwrite"]) == cli.EXIT_ERROR
    assert (tmp_path / "w" / "adapter" / "adapter_config.json").exists()
    if output == "adapter":
        source = str(tmp_path / "w" / "adapter")
        assert cli.main(["convert", source, source, "--overwrite"]) == cli.EXIT_ERROR
        assert "is the folder of the source" in capsys.readouterr().err
