"""A model with several edits, asked which of them it applies where."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from row_cases import inputs, several

import red_kernels as rk
from red_kernels.edits.module import RedEdit

HOW = ["a", "b", "off"]


class Served:
    """A model, and what each edit gives for one batch."""

    def __init__(self, **changes):
        _, self.model, _ = several("llama", **changes)
        self.batch = inputs("llama", 1)
        self.wanted = {}
        for name in ("a", "b", "default"):
            rk.switch_edit(self.model, name)
            self.wanted[name] = self.run()
        with rk.disable_edits(self.model):
            self.wanted["off"] = self.run()

    def run(self):
        with torch.no_grad():
            return self.model(**self.batch).logits

    def said(self):
        """Which edit the model applies now."""
        found = self.run()
        return next(name for name, wanted in self.wanted.items() if torch.allclose(found, wanted))

    def block(self, how):
        return rk.disable_edits(self.model) if how == "off" else rk.use_edits(self.model, [how])

    def stream(self, how):
        with self.block(how):
            while True:
                yield self.said()


def thread_of(function):
    found: list = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    return thread, found


@pytest.fixture(scope="module")
def shared() -> Served:
    return Served()


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    yield shared
    gc.collect()
    assert shared.said() == "default"
    own = next(module for module in shared.model.modules() if isinstance(module, RedEdit))
    assert own.selection.open == []
    assert own.selection.shifting == 0
