"""Files that a release wrote whose modules had other names, and whose edits had no kind, load and give what they gave.

`written_before/` was written by the commit 5b2366d: a Sequential with edits of all its modules (`sites="*"`), pickled
whole and by `rk.save_edits`, and what it gave. `fused.pt` is of the commit fa0dc3b, whose patched layers had forwards
of their own: a stack of two layers with their norms and dropouts, each in the class that it had then, and what it gave.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import red_kernels as rk
from red_kernels.fusion.former import INSIDE
from red_kernels.fusion.site import edit_hook
from red_kernels.patching.classes import is_patched

WRITTEN = Path(__file__).with_name("written_before")


def model_and_expected() -> tuple[Any, dict[str, torch.Tensor]]:
    model = torch.load(WRITTEN / "model.pt", weights_only=False)
    return model, torch.load(WRITTEN / "expected.pt", weights_only=True)


def test_a_pickled_model() -> None:
    model, expected = model_and_expected()
    assert rk.edit_names(model) == ("default", "second")
    with torch.no_grad():
        torch.testing.assert_close(model(expected["x"]), expected["y"])  # of another processor
    rk.switch_edit(model, "second")
    model(expected["x"]).sum().backward()
    assert all(v.grad is not None for parts in rk.edit_parameters(model).values() for v in parts.values())
    rk.merge(model)
    rk.unmerge(model)
    rk.unpatch(model)
    assert not any("red_edit" in name for name, _ in model.named_modules())


def test_saved_edits() -> None:
    model, expected = model_and_expected()
    with torch.no_grad():
        for name in ("default", "second"):
            for parts in rk.edit_parameters(model, name).values():
                for vector in parts.values():
                    vector.fill_(1.0)
        assert not torch.allclose(model(expected["x"]), expected["y"])
        rk.load_edits(model, WRITTEN / "edits")
        torch.testing.assert_close(model(expected["x"]), expected["y"])  # of another processor


def test_layers_with_forwards_of_their_own() -> None:
    written = torch.load(WRITTEN / "fused.pt", weights_only=False)
    model, x, y = written["model"], written["x"], written["y"]
    assert [type(module).__name__ for module in model[0][0].children()] == ["LayerNorm", "Linear", "Dropout"]
    for one in (model, pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            torch.testing.assert_close(one(x), y)
        one(x).sum().backward()
        assert all(v.grad is not None for parts in rk.edit_parameters(one).values() for v in parts.values())
        rk.unpatch(one)
        for module in one.modules():
            assert not is_patched(module)
            assert not module._forward_hooks
            assert not [name for name in module.__dict__ if name.startswith("_red_kernels")]


def test_a_layer_that_applied_an_edit_itself_says_that_it_does_not() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    rk.patch(model, rk.RedConfig(sites="0.0"))
    site = model[0][0]
    site._forward_hooks.clear()
    site.red_edit.inside = True
    nn.Module.register_forward_hook(model[0], edit_hook, prepend=True)
    model[0].__dict__[INSIDE] = ("0",)
    with pytest.raises(RuntimeError, match=r"cannot apply its edit of the stream behind 0; call rk\.save"):
        model(torch.randn(2, 4))
    rk.unpatch(model)
    assert model(torch.ones(2, 4)).shape == (2, 4)
    assert INSIDE not in model[0].__dict__
