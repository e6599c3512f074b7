"""Models of timm, torchvision, diffusers and sentence-transformers, with random weights, held to plain forward hooks.

`make test-extra` installs these libraries in a folder of their own. There a library that is missing is a failure.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from hooked import held_to_hooks, paired
from torch import nn

import red_kernels as rk

REQUIRED = os.environ.get("RED_KERNELS_TEST_EXTRA") == "1"


def library(name: str) -> types.ModuleType:
    """The library; without it the test is skipped, or fails in `make test-extra`."""
    installed = name.partition(".")[0]
    if not REQUIRED and importlib.util.find_spec(installed) is None:
        pytest.skip(f"{installed} is not installed: make test-extra installs it and runs this test")
    # This module describes operators (nms, ...) of torchvision's compiled library. On Linux the library from PyPI loads
    # beside a torch for CUDA only; else the import fails with "operator torchvision::nms does not exist". No model here
    # uses these operators.
    stub = "torchvision._meta_registrations"
    sys.modules.setdefault(stub, types.ModuleType(stub))
    return importlib.import_module(name)


class Case(NamedTuple):
    """A model and its batch, and regular expressions for its sites.

    Attributes:
        ffn: the sites of position ffn.
        attn: the sites of position attn.
        alone: the sites behind whose addition there is no norm of the same tensor. Others are fused with both.
    """

    make: Callable[[], nn.Module]
    batch: Any
    ffn: str
    attn: str
    alone: str = "none"


def timm(name: str, size: int, alone: str = "none", **arguments: Any) -> Case:
    def make() -> nn.Module:
        return library("timm").create_model(name, img_size=size, **arguments)

    return Case(make, torch.randn(2, 3, size, size), r".*\.mlp\.fc2", r".*\.attn\.proj", alone)


def flat(name: str, size: int = 32, **arguments: Any) -> Case:
    """Three layers of one width."""
    return timm(name, size, depth=3, embed_dim=48, num_heads=2, **arguments)


def stages(name: str, size: int, alone: str = "none") -> Case:
    """Two stages of two layers."""
    shape = {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4)}
    return timm(name, size, alone, **shape, drop_path_rate=0.0)


def torchvision_vit() -> nn.Module:
    models = library("torchvision.models")
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


def dit() -> Case:
    def make() -> nn.Module:
        return library("diffusers").DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=3, sample_size=8, patch_size=2,
            num_embeds_ada_norm=10,
        )  # fmt: skip

    batch = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([1, 2]),
    }
    return Case(make, batch, r".*\.ff\.net\.2", r".*\.attn1\.to_out\.0")


def flux() -> Case:
    """Layers of two streams, then of one, which are the two in a row: the norm behind takes another tensor."""

    def make() -> nn.Module:
        return library("diffusers").FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip

    batch = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    single = r"single_transformer_blocks\.\d\.proj_out"
    return Case(
        make,
        batch,
        rf"transformer_blocks\.\d\.ff(_context)?\.net\.2|{single}",
        r"transformer_blocks\.\d\.attn\.(to_out\.0|to_add_out)",
        rf"transformer_blocks\.1\.ff(_context)?\.net\.2|{single}",
    )


def sd3(alone: str = "none", **arguments: Any) -> Case:
    def make() -> nn.Module:
        return library("diffusers").SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, out_channels=4,
            pos_embed_max_size=8, **arguments,
        )  # fmt: skip

    batch = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([1, 700]),
    }
    return Case(make, batch, r".*\.ff(_context)?\.net\.2", r".*\.attn2?\.(to_out\.0|to_add_out)", alone)


CASES: dict[str, Callable[[], Case]] = {
    "timm-vit": lambda: flat("vit_tiny_patch16_224"),
    "timm-vit-stochastic-depth": lambda: flat("vit_tiny_patch16_224", drop_path_rate=0.3),
    "timm-deit3": lambda: flat("deit3_small_patch16_224"),
    # The mean over the tokens is taken before the last norm.
    "timm-eva": lambda: flat("eva_giant_patch14_224", 28, alone=r"blocks\.2\.mlp\.fc2"),
    "timm-eva02": lambda: flat("eva02_tiny_patch14_224", 28, alone=r"blocks\.2\.mlp\.fc2"),
    "timm-beit": lambda: flat("beit_base_patch16_224", alone=r"blocks\.2\.mlp\.fc2"),
    # Between its stages, neighbours are merged before the norm.
    "timm-swin": lambda: stages("swin_tiny_patch4_window7_224", 56, r"layers\.0\.blocks\.1\.mlp\.fc2"),
    "timm-swinv2": lambda: stages("swinv2_tiny_window8_256", 64),  # each branch ends in a norm of its own
    "torchvision-vit": lambda: Case(torchvision_vit, torch.randn(2, 3, 32, 32), r".*\.mlp\.3", r".*\.self_attention"),
    "diffusers-dit": dit,
    "diffusers-flux": flux,
    "diffusers-sd3": sd3,
    # Its first layers have two attentions, and between their additions there is no norm.
    "diffusers-sd3.5": lambda: sd3(r".*\.[01]\.attn\.to_out\.0", dual_attention_layers=(0, 1), qk_norm="rms_norm"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("position", ["ffn", "attn"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:not edited")
def test_a_model(name: str, position: str, training: bool) -> None:
    """Every edit is fused with its addition, and with the norm behind where there is one."""
    case = CASES[name]()
    model = varied(case.make())
    pattern = {"ffn": case.ffn, "attn": case.attn}[position]
    wanted = {site for site, _ in model.named_modules() if re.fullmatch(pattern, site)}
    report = held_to_hooks(model, case.batch, position, training)
    fused = {site.site: str(site.fused) for site in report.sites}
    assert fused.keys() == wanted
    assert wanted
    # The layers of Flux that have one stream have one output for attention and MLP together: position ffn edits it.
    assert bool(report.warnings) is ((name, position) == ("diffusers-flux", "attn"))
    for site, found in fused.items():
        assert "residual add" in found, report
        assert ("LayerNorm" in found) is not bool(re.fullmatch(case.alone, site)), report


def varied(model: nn.Module) -> nn.Module:
    """Noise where all values are the same: behind a layer scale of 1e-6 an edit changes next to nothing."""
    with torch.no_grad():
        for own in model.parameters():
            if own.numel() > 1 and (own == own.flatten()[0]).all():
                own.add_(0.2 * torch.randn_like(own))
    return model


@pytest.fixture(scope="session")
def sentence_transformers() -> types.ModuleType:
    """Imported before any test looks at the environment, where scikit-learn sets variables."""
    return library("sentence_transformers")


@pytest.fixture
def sentences(sentence_transformers: types.ModuleType, tmp_path: Path) -> nn.Module:
    """A SentenceTransformer around a tiny BERT, with a tokenizer of few words."""
    modules = library("sentence_transformers.sentence_transformer.modules")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "model", "of", "many", "words"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    bert = modules.Transformer(str(tmp_path))
    return sentence_transformers.SentenceTransformer(modules=[bert, modules.Pooling(32)], device="cpu")


TEXTS = ["a small model", "of many many words"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("position", ["ffn", "attn"])
def test_sentence_transformers(sentences: nn.Module, position: str, training: bool) -> None:
    report = held_to_hooks(sentences, (dict(sentences.preprocess(TEXTS)),), position, training)
    assert len(report.sites) == 3
    assert all(site.fused == "residual add + LayerNorm" for site in report.sites), report


def test_sentence_transformers_encodes_and_saves(sentences: nn.Module, tmp_path: Path) -> None:
    plain = copy.deepcopy(sentences)
    unedited = sentences.encode(TEXTS)
    paired(sentences, plain)
    edited = sentences.encode(TEXTS)
    assert np.abs(edited - unedited).max() > 0.1
    np.testing.assert_allclose(edited, plain.encode(TEXTS), rtol=1e-5, atol=1e-5)

    folder = tmp_path / "saved"
    with pytest.warns(UserWarning, match="no edits; they are next to it"):
        sentences.save_pretrained(str(folder))
    again = type(sentences)(str(folder), device="cpu")
    np.testing.assert_allclose(again.encode(TEXTS), unedited, rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the folder is not the one that the base model came from
        rk.patch(again, rk.saved_config(folder))
        rk.load_edits(again, folder)
    np.testing.assert_allclose(again.encode(TEXTS), edited, rtol=1e-6, atol=1e-6)
