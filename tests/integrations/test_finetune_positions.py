"""The finetune job at positions that are no linear layer's output, and with a norm behind the edit."""

from __future__ import annotations

import pytest
import tiny_folders
import torch

import red_kernels as rk
from red_kernels.cli import main
from red_kernels.patching.naive import naive_edit


@pytest.mark.parametrize(("position", "kind", "peer"), [("res_with_attn", "bias", False), ("res", "ln", True)])
def test_finetune(position, kind, peer, tmp_path, capsys):
    model = tiny_folders.tiny_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text, with {i * i} words in it.\n" for i in range(100)))
    arguments = ["finetune", "--model", str(model), "--data", str(text), "--output", str(tmp_path / "out")]
    arguments += ["--steps", "2", "--length", "16", "--batch-size", "2", "--position", position, "--kind", kind]
    assert main(arguments) == 0
    saved = rk.saved_config(tmp_path / "out" / "edits")
    assert (saved.position, saved.kind) == (position, kind)
    # An edit inside of a layer's forward has no peer made of hooks: the frozen model alone is compared with.
    assert ("eager edit" in capsys.readouterr().out) == peer


def test_naive_edit_of_a_tuple_with_a_norm():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x), "more"

    model, x = torch.nn.Sequential(Layer()), torch.randn(3, 4)
    before = model(x)[0]
    with pytest.raises(ValueError, match=r"sites: '0' is a Layer, whose width is unknown; pass it in widths"):
        naive_edit(model, ["0"], "ln")
    with naive_edit(model, ["0"], "ln", widths={"0": 4}) as naive:
        parts = naive.parameters["0"]
        with torch.no_grad():
            for part in parts.values():
                part.add_(torch.randn(4))
        shifted = before * parts["scale"] + parts["bias"]
        wanted = torch.nn.functional.layer_norm(shifted, (4,), parts["norm_weight"], parts["norm_bias"], 1e-5)
        found, more = model(x)
        assert torch.equal(found, wanted)
        assert more == "more"
