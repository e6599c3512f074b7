"""The authors' own checkpoints, where they are at hand, on models of the real architecture with random weights.

Depths, widths and heads are the real ones. Cut are the vocabulary, the FFN's inner size, and Llama's heads (to one), so
that the 7B model fits into a test. The weights are random, larger than they are before training, so that every edited
output is large enough for its scale to matter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import authors_forms
import model_zoo as zoo
import pytest
import torch
import transformers
from places import ROOT
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from red_kernels.checkpoints.authors import VECTORS_NAME, export_authors
from red_kernels.checkpoints.checkpoint import load_edits, save_edits, saved_config
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch, unpatch

OFFICIAL = ROOT / ".." / "shared" / "official"
LENGTH = 6


def _roberta() -> nn.Module:
    config = transformers.RobertaConfig(
        vocab_size=50, intermediate_size=8, max_position_embeddings=20, num_labels=3, type_vocab_size=1
    )
    return transformers.RobertaForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_embd=1024, n_layer=24, n_head=16, n_inner=8, n_positions=20)
    return transformers.GPT2LMHeadModel(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=50, d_model=768, d_ff=8, d_kv=64, num_layers=12, num_decoder_layers=12, num_heads=12
    )
    return transformers.T5ForConditionalGeneration(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=4096,
        intermediate_size=8,
        num_hidden_layers=32,
        num_attention_heads=1,
        head_dim=128,
        max_position_embeddings=20,
    )
    return transformers.LlamaForCausalLM(config)


# name -> model, position, sites, parameters
CHECKPOINTS: dict[str, tuple[Any, str, str, int, int]] = {
    "roberta_base_mnli": (_roberta, "roberta", "ffn", 12, 18_432),
    "roberta_base_qnli_plusplus": (_roberta, "roberta", "more", 60, 92_160),
    "gpt2_medium_e2e": (_gpt2, "gpt2", "ffn", 24, 49_152),
    "gpt2_medium_e2e_plusplus": (_gpt2, "gpt2", "more", 72, 245_760),
    "t5_base_qqp": (_t5, "t5", "ffn", 24, 36_864),
    "llama2_7b_ultrafeedback": (_llama, "llama", "ffn", 32, 262_144),
}


def official(name: str) -> Path:
    path = OFFICIAL / name
    if not (path / VECTORS_NAME).exists():
        pytest.skip(f"the authors' checkpoint {name} is not at hand")
    return path


def _random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, min(parameter.shape) ** -0.5, generator=generator)
            else:
                parameter.normal_(1.0 if "norm" in name.lower() or "ln_" in name else 0.0, 0.2, generator=generator)
                if name.endswith("norm.bias") or name.endswith("LayerNorm.bias"):
                    parameter.sub_(1.0)
    return model.eval()


def _logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 50, (2, LENGTH), generator=torch.Generator().manual_seed(8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if hasattr(model, "decoder"):
        batch["decoder_input_ids"] = ids.flip(1)
    with torch.no_grad():
        return model(**batch).logits


def _in_float64(model: nn.Module) -> nn.Module:
    """In place: two copies of a model of this size would be slow."""
    model.double()
    for module in model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "T5LayerNorm"):
            module.forward = zoo._exact_rms_norm(module, 0.0)
    return model


def _without(raw: dict[str, Tensor], suffix: str) -> dict[str, Tensor]:
    return {key: value for key, value in raw.items() if not key.endswith(suffix)}


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_outputs_are_those_of_the_formulas(name: str, tmp_path: Path) -> None:
    folder = official(name)
    make, family, position, sites, parameters = CHECKPOINTS[name]
    raw = torch.load(folder / VECTORS_NAME, map_location="cpu", weights_only=True)
    with no_init_weights():
        model = _random(make())
    with authors_forms.composed(model, family, raw):
        unfused = _logits(model)

    patch(model, RedConfig(position=position))
    report = load_edits(model, folder)
    own = edit_parameters(model)
    assert len(report.loaded) == len(own) == sites
    assert sum(vector.numel() for parts in own.values() for vector in parts.values()) == parameters
    for site, target in report.loaded.items():
        for part, suffix in authors_forms.SUFFIXES.items():
            if part in own[target]:
                value = raw.pop(f"{site}.delta_vector.{suffix}")
                assert torch.equal(own[target][part].detach(), value[0].float())
    assert not raw, "keys that were not loaded"
    found = _logits(model)

    # Written and read again, in both forms
    raw = torch.load(folder / VECTORS_NAME, map_location="cpu", weights_only=True)
    written = torch.load(export_authors(model, tmp_path / "authors") / VECTORS_NAME, weights_only=True)
    assert written.keys() == raw.keys()
    assert all(torch.equal(written[key], raw[key].float()) for key in raw)
    save_edits(model, tmp_path / "own")
    assert saved_config(tmp_path / "own") == RedConfig(position=position)
    assert load_edits(model, tmp_path / "own").loaded == {site: site for site in own}

    unpatch(model)
    with authors_forms.composed(_in_float64(model), family, raw):
        truth = _logits(model)
    zoo.assert_as_exact("logits", found, unfused, truth)
    # The comparison is only worth something if it sees a vector that is left out.
    trained = [suffix for suffix in ("scaling", "bias") if any(_is_trained(raw, suffix))]
    assert "bias" in trained
    for suffix in trained:
        with authors_forms.composed(model, family, _without(raw, suffix)):
            lacking = _logits(model)
        with pytest.raises(AssertionError, match="error"):
            zoo.assert_as_exact(suffix, lacking, unfused, truth)


def _is_trained(raw: dict[str, Tensor], suffix: str) -> list[bool]:
    start = (
        1.0 if suffix == "scaling" else 0.0
    )  # Llama's scales were never trained: an update was less than half a step
    return [bool((value != start).any()) for key, value in raw.items() if key.endswith(suffix)]


@pytest.mark.parametrize("name", ["roberta_base_qnli_plusplus", "gpt2_medium_e2e_plusplus"])
def test_another_position_is_refused(name: str) -> None:
    folder = official(name)
    with torch.device("meta"):
        model = CHECKPOINTS[name][0]()
    patch(model, RedConfig())
    for module in list(model.modules()):
        if module.__class__.__name__ == "RedEdit":
            module.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"checkpoint only: .*model only: nothing"):
        load_edits(model, folder)
