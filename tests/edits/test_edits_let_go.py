"""What is kept of former calls neither grows with the number of edits nor keeps a deleted edit alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import model_zoo as zoo
import pytest
import torch

import red_kernels as rk
from red_kernels.edits.module import RedEdit
from red_kernels.edits.vectors import EditVectors
from red_kernels.fusion.scopes import SCOPE

HOW = ("eval", "no_grad", "train", "rows")


def call(model: Any, how: str, name: str) -> None:
    """Use an edit, in one of the modes that are remembered apart."""
    batch = zoo.inputs("llama")
    rows = next(iter(batch.values())).shape[0]
    rk.switch_edit(model, name)
    model.train(how == "train")
    if how == "train":
        for _ in range(3):  # what is known is found in the first, and used in the later ones
            model(**batch).logits.square().mean().backward()
    elif how == "rows":
        with rk.use_edits(model, [name] * rows):
            model(**batch)
    else:
        for _ in range(3):
            with torch.set_grad_enabled(how == "eval"):
                model(**batch)
    rk.switch_edit(model, "default")


@pytest.mark.parametrize("position", ["ffn", "more", "res"])
@pytest.mark.parametrize("how", HOW)
def test_a_deleted_edit_is_gone(how: str, position: str) -> None:
    model = zoo.tiny("llama")
    rk.patch(model, rk.RedConfig(position=position))
    for other in HOW:
        call(model, other, "default")
    names = [f"edit{number}" for number in range(4)]
    for name in names:
        rk.add_edit(model, name)
    for name in names:
        call(model, how, name)
    holders = [
        weakref.ref(holder)
        for own in model.modules()
        if isinstance(own, RedEdit)
        for name, holder in own._modules.items()
        if name in names
    ]
    assert holders
    for name in names:
        rk.delete_edit(model, name)
    gc.collect()
    assert not [one for one in holders if one() is not None]
    call(model, how, "default")


def test_what_each_call_looks_at_does_not_grow_with_the_edits() -> None:
    model = zoo.tiny("llama")
    rk.patch(model, rk.RedConfig(position="more"))
    sizes = []
    for count in (0, 50):
        for number in range(count):
            rk.add_edit(model, f"edit{number}")
        for how in HOW:
            call(model, how, "default")
        verdicts = [module.__dict__[SCOPE] for module in model.modules() if SCOPE in module.__dict__]
        sizes.append([(len(one.tree), len(one.inside), len(one.sites)) for one in verdicts])
        assert not any(type(module) is EditVectors for one in verdicts for module in one.inside)
    assert sizes[0] == sizes[1]
    assert any(sites for _, _, sites in sizes[0])
