"""How far it is to a kernel, in frames of this package; and that a fused layer checks once what it has to know."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import model_zoo as zoo
import pytest
import torch
from op_cases import ARGUMENTS, OPERATIONS, arguments
from patch_helpers import learn
from torch import nn

import red_kernels as rk
from red_kernels.backends import cpu, nodes
from red_kernels.backends.arguments import affine_edit
from red_kernels.edits.module import RedEdit
from red_kernels.fusion.norms import norm_arguments
from red_kernels.fusion.record import Record
from red_kernels.fusion.waiting import Waiting, wait
from red_kernels.ops import checks
from red_kernels.patching.classes import patch_norm

PACKAGE = str(Path(rk.__file__).parent)
OPERATORS = str(Path(torch.__file__).parent / "_ops.py")
pytestmark = pytest.mark.skipif(cpu.load_error() is not None, reason=f"no CPU kernels: {cpu.load_error()}")


def ways(run: Callable[[], object]) -> list[list[str]]:
    """For each operator of ours that a call reaches in this thread, the functions of the package it came through last.

    A way begins where other code has called the package: what is above that are layers, and the model.
    """
    found: list[list[str]] = []

    def look(frame: FrameType, event: str, argument: object) -> None:
        way: list[str] = []
        above: FrameType | None = frame
        if event == "call" and frame.f_code.co_filename == OPERATORS and frame.f_code.co_name == "__call__":
            if "red_kernels" not in str(frame.f_locals.get("self")):
                return
        elif event != "c_call" or type(getattr(argument, "__self__", None)).__name__ != "Nodes":
            return
        while above is not None:
            if above.f_code.co_filename.startswith(PACKAGE):
                way.append(above.f_code.co_name)
            elif way:
                break
            above = above.f_back
        found.append(way[::-1])

    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("operation", OPERATIONS)
def test_five_frames_from_an_operation_to_its_kernel(operation: str) -> None:
    tensors = {name: None if t is None else t.requires_grad_() for name, t in arguments(operation, (3, 8)).items()}
    values = [tensors[name] for name in ARGUMENTS[operation]]
    (way,) = ways(lambda: getattr(rk, operation)(*values))
    assert way[0] == operation
    assert len(way) <= 5, way


# The functions of the package that the interpreter runs in a forward, once it is known what follows: hooks and the
# forwards of classes, which ask C++; and for each stack what it hands out, and its first norm, whose input has no note.
EACH_LAYER = {"carry_hook", "edit_hook", "forward"}
EACH_STACK = {"before_model", "collects", "take_note"}


@pytest.mark.skipif(nodes.load_error() is not None, reason=f"no nodes in C++: {nodes.load_error()}")
@pytest.mark.parametrize(
    ("name", "position"), [*((name, at) for name in ("llama", "gpt2", "bert") for at in ("ffn", "attn")), ("t5", "ffn")]
)
def test_a_learnt_forward_asks_nothing_in_python(name: str, position: str) -> None:
    model = zoo.tiny(name)
    report = rk.patch(model, rk.RedConfig(position=position))
    for _ in range(2):
        learn(model, name)
    called: Counter[str] = Counter()

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            called[frame.f_code.co_name] += 1

    inputs = zoo.inputs(name)
    sys.setprofile(look)
    try:
        model(**inputs)
    finally:
        sys.setprofile(None)
    assert all(site.fused for site in report.sites)
    assert called.keys() <= EACH_LAYER | EACH_STACK, called
    assert all(called[one] <= 2 for one in EACH_STACK), called


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_fused_layer_calls_no_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.tiny(name)
    rk.patch(model)
    called: list[str] = []
    for check in ("activation", "edit_vectors", "same_shape", "norm_vector", "norm", "epsilon", "number"):
        monkeypatch.setattr(checks, check, lambda *given, _check=check, **more: called.append(_check))
    model(**zoo.inputs(name))
    assert called == []


def damaged(change: str, own: nn.Module) -> None:
    if change == "width":
        own.scale = nn.Parameter(torch.ones(3))
    elif change == "dimensions":
        own.scale = nn.Parameter(torch.ones(2, own.scale.shape[0]))
    elif change == "dtype":
        own.bias = nn.Parameter(torch.zeros(own.bias.shape, dtype=torch.int64), requires_grad=False)
    else:
        own.bias = nn.Parameter(own.bias.detach().to("meta"))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("width", r"scale has shape \(3,\), expected \(\d+,\), the width of x"),
        ("dimensions", r"scale has shape \(2, \d+\), which needs edit_ids="),
        ("dtype", r"bias has dtype torch\.int64, expected float32"),
        ("device", r"bias is on meta, expected the device of x, cpu"),
    ],
)
def test_vectors_that_do_not_fit_are_named_before_a_kernel_reads_them(name: str, change: str, said: str) -> None:
    model = zoo.tiny(name)
    rk.patch(model)
    own: Any = next(module for module in model.modules() if isinstance(module, RedEdit))
    damaged(change, own)
    with pytest.raises((ValueError, TypeError), match=said):
        model(**zoo.inputs(name))


@pytest.mark.parametrize("eps", [torch.tensor(0.1), nn.Parameter(torch.tensor(0.1)), -1e-3, float("nan"), "0.1"])
def test_a_norm_whose_epsilon_is_no_number_computes_itself(eps: Any) -> None:
    norm = nn.LayerNorm(8)
    patch_norm(norm)
    x = torch.randn(4, 8)
    assert norm_arguments(norm, x, None) is not None
    norm.__dict__["eps"] = eps
    assert norm_arguments(norm, x, None) is None
    norm.__dict__["eps"] = 0
    assert norm_arguments(norm, x, None) is not None


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("edits", [None, 3])
def test_a_trace_of_torch_jit_takes_other_vectors(operation: str, edits: int | None) -> None:
    """And other ids: they are no constants."""

    def draw(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        tensors = arguments(operation, (3, 8), edits=edits, seed=seed)
        ids = torch.randint(0, 3, (3,), generator=torch.Generator().manual_seed(seed))
        return [tensors[name] for name in ARGUMENTS[operation]], ids

    def run(ids: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        found = getattr(rk, operation)(*values, edit_ids=None if edits is None else ids)
        return found[0] if isinstance(found, tuple) else found

    values, ids = draw(0)
    traced = torch.jit.trace(run, (ids, *values), check_trace=False)
    others, other_ids = draw(1)
    assert torch.equal(traced(other_ids, *others), run(other_ids, *others))


def test_a_residual_that_does_not_fit_is_added_as_torch_adds_it() -> None:
    """No fused operation reads beyond its end."""
    norm, x, scale = nn.LayerNorm(8), torch.randn(4, 8), torch.randn(8)
    for residual in (torch.randn(1, 8), torch.randn(8)):
        for first in (True, False):
            value = wait(x, affine_edit(scale), Record())
            assert type(value) is Waiting
            z = residual + value if first else value + residual
            assert torch.equal(z, residual + rk.edit(x, scale, None))
            assert torch.equal(norm(z), norm(residual + rk.edit(x, scale, None)))
