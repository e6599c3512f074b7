"""The authors' checkpoints: files of their form, their own where they are at hand, and the matching of site names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_zoo
import pytest
import torch
import transformers
from checkpoint_helpers import WIDTH, assert_refused, authors_state, every_vector, patched, same, trained, values
from transformers.initialization import no_init_weights

from red_kernels._site_names import match_sites
from red_kernels.checkpoint import AUTHORS_NAME, load_edits, save_edits
from red_kernels.config import RedConfig
from red_kernels.patch import edit_parameters, patch

OFFICIAL = Path(__file__).resolve().parents[1] / ".." / "shared" / "official"


# ---- the authors' form


@pytest.mark.parametrize(
    ("name", "prefix"), [("llama", ""), ("gpt2", ""), ("roberta", "roberta."), ("t5", ""), ("bert", "bert.")]
)
@pytest.mark.parametrize("as_folder", [True, False])
def test_authors_form(name: str, prefix: str, as_folder: bool, tmp_path: Path) -> None:
    source, target = trained(name), patched(name)
    state = authors_state(source, prefix)
    assert not prefix or not any(key.startswith(prefix) for key in state)
    torch.save(state, tmp_path / AUTHORS_NAME)
    before = every_vector(target)
    report = load_edits(target, tmp_path if as_folder else tmp_path / AUTHORS_NAME)
    assert same(values(source), values(target))
    assert all(old is new for old, new in zip(before, every_vector(target), strict=True))
    assert set(report.loaded.values()) == set(edit_parameters(target))


def test_authors_half_precision_stays_exact_in_fp32(tmp_path: Path) -> None:
    source, target = trained(), patched()
    torch.save(authors_state(source, dtype=torch.bfloat16), tmp_path / AUTHORS_NAME)
    load_edits(target, tmp_path)
    assert same([value.bfloat16().float() for value in values(source)], values(target))


def test_authors_names_with_more_than_the_model_has(tmp_path: Path) -> None:
    """A file named from a model with a head, loaded into the bare inner model."""
    source = trained("gpt2")
    torch.save(authors_state(source), tmp_path / AUTHORS_NAME)
    inner: Any = model_zoo.tiny("gpt2").transformer
    patch(inner, RedConfig())
    report = load_edits(inner, tmp_path)
    assert report.loaded["transformer.h.0.mlp.c_proj"] == "h.0.mlp.c_proj"
    assert same(values(source), values(inner))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda value: value[0], r"shape \(32,\), expected \[1, width\]"),
        (lambda value: value.expand(2, -1), r"shape \(2, 32\)"),
        (lambda value: value.int(), "torch.int32"),
        (lambda value: value.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda value: value.bool(), "torch.bool"),
        (lambda value: 3, "int, expected a floating-point tensor"),
        (lambda value: value[:, :-1], "width"),
    ],
)
def test_authors_form_gone_wrong(change: Any, match: str, tmp_path: Path) -> None:
    state: dict[str, Any] = authors_state(trained())
    last = list(state)[-1]
    state[last] = change(state[last])
    torch.save(state, tmp_path / AUTHORS_NAME)
    assert_refused(tmp_path, match)


def test_authors_norm_kind_isassert_refused(tmp_path: Path) -> None:
    state = authors_state(trained())
    state["model.layers.0.mlp.down_proj.delta_vector.activation_ln.weight"] = torch.ones(1, WIDTH)
    torch.save(state, tmp_path / AUTHORS_NAME)
    assert_refused(tmp_path, "kind 'ln'")


# ---- the authors' own files, where they are at hand

ARCHITECTURES: dict[str, Any] = {
    "roberta_base_mnli": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(vocab_size=50, intermediate_size=8, max_position_embeddings=20)
    ),
    "gpt2_medium_e2e": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=1024, n_layer=24, n_head=16, n_inner=8, n_positions=20)
    ),
    "t5_base_qqp": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=768, d_ff=8, num_layers=12, num_decoder_layers=12, num_heads=12)
    ),
    "llama2_7b_ultrafeedback": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=4096, intermediate_size=8, num_hidden_layers=32, num_attention_heads=32
        )
    ),
}
PARAMETERS = {
    "roberta_base_mnli": 18_432,
    "gpt2_medium_e2e": 49_152,
    "t5_base_qqp": 36_864,
    "llama2_7b_ultrafeedback": 262_144,
}


def _official(name: str) -> Path:
    path = OFFICIAL / name / AUTHORS_NAME
    if not path.exists():
        pytest.skip(f"the authors' checkpoint {name} is not at hand")
    return path


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_official_checkpoints(name: str, tmp_path: Path) -> None:
    """The real names and widths, with FFNs cut down and Llama's other weights on the meta device."""
    path = _official(name)
    big = name.startswith("llama")
    with torch.device("meta" if big else "cpu"), no_init_weights():
        model = ARCHITECTURES[name]()
    patch(model, RedConfig())
    if big:  # 32 layers of width 4096: only the vectors get memory
        for parts in edit_parameters(model).values():
            for part in parts:
                assert parts[part].is_meta
        for module in list(model.modules()):
            if module.__class__.__name__ == "RedEdit":
                module.to_empty(device="cpu")
    report = load_edits(model, path)
    raw = torch.load(path, map_location="cpu", weights_only=True)
    assert sum(vector.numel() for vector in every_vector(model)) == PARAMETERS[name]
    parameters = edit_parameters(model)
    assert len(report.loaded) * 2 == len(raw)
    for site, target in report.loaded.items():
        for part, suffix in (("scale", "scaling"), ("bias", "bias")):
            saved = raw[f"{site}.delta_vector.activation_{suffix}"]
            assert torch.equal(parameters[target][part].detach(), saved[0].float())
    save_edits(model, tmp_path)
    assert load_edits(model, tmp_path).loaded == {site: site for site in parameters}


@pytest.mark.parametrize(
    ("name", "base"),
    [("roberta_base_qnli_plusplus", "roberta_base_mnli"), ("gpt2_medium_e2e_plusplus", "gpt2_medium_e2e")],
)
def test_official_checkpoints_of_another_position_are_refused(name: str, base: str) -> None:
    path = _official(name)
    with torch.device("meta"):
        model = ARCHITECTURES[base]()
    patch(model, RedConfig())
    for parts in edit_parameters(model).values():
        assert parts
    for module in list(model.modules()):
        if module.__class__.__name__ == "RedEdit":
            module.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"checkpoint only: .*model only: nothing"):
        load_edits(model, path)


# ---- names


def test_match_sites() -> None:
    layers = [f"encoder.layer.{n}.output.dense" for n in range(12)]
    with_head = [f"roberta.{name}" for name in layers]
    assert match_sites(layers, layers) == dict(zip(layers, layers, strict=True))
    assert match_sites(layers, with_head) == dict(zip(layers, with_head, strict=True))
    assert match_sites(with_head, layers) == dict(zip(with_head, layers, strict=True))
    nested = [f"model.language_model.{name}" for name in layers]
    flat = [f"model.{name}" for name in layers]
    assert match_sites(flat, nested) == dict(zip(flat, nested, strict=True))
    assert match_sites([], layers) == {}


def test_exact_names_win_over_a_second_tower() -> None:
    sites = ["encoder.layer.0.dense", "encoder.layer.1.dense"]
    towers = [*sites, *(f"vision.{name}" for name in sites)]
    assert match_sites(sites, towers) == {name: name for name in sites}


def test_two_towers_are_ambiguous() -> None:
    sites = ["encoder.layer.0.dense", "encoder.layer.1.dense"]
    with pytest.raises(ValueError, match="more than one way"):
        match_sites(sites, [f"{tower}.{name}" for tower in ("text", "vision") for name in sites])


def test_no_layer_and_no_stack_stands_in_for_another() -> None:
    assert match_sites(["encoder.layers.0.fc2"], ["decoder.layers.0.fc2"]) == {}
    assert match_sites(["model.layers.3.mlp.down_proj"], ["model.layers.5.mlp.down_proj"]) == {}
    assert match_sites(["h.1.mlp.c_proj"], ["transformer.h.11.mlp.c_proj"]) == {}
