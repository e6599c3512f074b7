"""Files that a release wrote whose modules had other names, and whose edits had no kind, load and give what they gave.

`written_before/` was written by the commit 5b2366d: a Sequential with edits of all its modules (`sites="*"`), pickled
whole and by `rk.save_edits`, and what it gave.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import red_kernels as rk

WRITTEN = Path(__file__).with_name("written_before")


def model_and_expected() -> tuple[Any, dict[str, torch.Tensor]]:
    model = torch.load(WRITTEN / "model.pt", weights_only=False)
    return model, torch.load(WRITTEN / "expected.pt", weights_only=True)


def test_a_pickled_model() -> None:
    model, expected = model_and_expected()
    assert rk.edit_names(model) == ("default", "second")
    with torch.no_grad():
        assert torch.equal(model(expected["x"]), expected["y"])
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
        assert not torch.equal(model(expected["x"]), expected["y"])
        rk.load_edits(model, WRITTEN / "edits")
        assert torch.equal(model(expected["x"]), expected["y"])
