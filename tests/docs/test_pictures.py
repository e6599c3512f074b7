"""The pictures of README.md and docs/ are those that their script draws, and their counts are PyTorch's."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import torch
from places import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tools import pictures


def test_the_files_are_what_the_script_draws():
    drawn = pictures.draw()
    assert {path.name for path in pictures.FOLDER.glob("*.svg")} == set(drawn)
    for name, text in drawn.items():
        assert (pictures.FOLDER / name).read_text(encoding="utf-8") == text, f"{name}: run {pictures.__name__}"
        ElementTree.fromstring(text)


def test_each_picture_is_shown_in_both_versions():
    pages = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    for name in pictures.draw():
        assert re.search(rf"pictures/{name}\"", pages), name


class Traffic(TorchDispatchMode):
    """Counts the activations that operations read and write: tensors of so many elements."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.moved = elements, 0

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        self.moved += sum(
            isinstance(one, torch.Tensor) and one.numel() == self.elements for one in (*arguments, result)
        )
        return result


def test_eager_pytorch_moves_what_the_picture_says():
    h, residual, vector = torch.randn(4, 8), torch.randn(4, 8), torch.ones(8)
    with torch.no_grad(), Traffic(h.numel()) as edit:
        z = residual + (vector * h + vector)
    with torch.no_grad(), Traffic(h.numel()) as norm:
        torch.nn.functional.rms_norm(z, (8,), vector)
    moved = [len(reads) + len(writes) for _, reads, writes in pictures.EAGER]
    assert edit.moved == sum(moved[:-1])
    assert norm.moved >= moved[-1]  # a fused norm's; several kernels move more


def test_a_site_that_runs_by_itself_is_no_picture(monkeypatch):
    """The picture would claim a pass that is not there."""
    import pytest
    import transformers

    import red_kernels as rk

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    patch = rk.patch

    def unfused(model, config):
        report = patch(model, config)
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: output.clone())
        return report

    monkeypatch.setattr(rk, "patch", unfused)
    with pytest.raises(ValueError, match="expected every site fused"):
        pictures.layer_steps(model, "model.layers", torch.zeros(1, 3, dtype=torch.long))
