"""Finding the autograd Functions whose `forward` is running: by the frame of `apply`, and where torch has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from red_kernels.edits import recompute

BY_APPLY = pytest.param(
    True,
    id="by the frame of apply",
    marks=pytest.mark.skipif(recompute._APPLY is None, reason="this torch's apply is no function of Python"),
)


class Inner(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, found: list[Any]) -> Tensor:
        found.append(([ctx], recompute._contexts()))
        return x.clone()


class Outer(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, found: list[Any], inside: Any) -> Tensor:
        def called() -> Tensor:
            return inside.apply(x, found)

        y = called()
        found[-1][0].append(context)
        return y


class Separate(torch.autograd.Function):
    """Its `forward` has no context."""

    @staticmethod
    def forward(x: Tensor, found: list[Any]) -> Tensor:
        found.append(([], recompute._contexts()))
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


def forward(ctx: Any) -> Any:
    """No Function's, whatever it is called."""
    return recompute._contexts()


@pytest.mark.parametrize("by_apply", [BY_APPLY, pytest.param(False, id="by the code")])
def test_contexts_of_running_functions(by_apply: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_apply:
        monkeypatch.setattr(recompute, "_APPLY", None)
    found: list[Any] = []
    x = torch.ones(2)
    for _ in range(2):  # the second time from what was kept
        assert forward(x) == ([], False)
        Inner.apply(x, found)
        Outer.apply(x, found, Inner)
        Outer.apply(x, found, Separate)
    assert len(found) == 6
    for number, (contexts, (seen, without)) in enumerate(found):
        assert [id(one) for one in seen] == [id(one) for one in contexts]
        assert without == (number % 3 == 2)
    assert forward(x) == ([], False)
