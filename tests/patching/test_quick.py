"""What is as in an earlier call is done in C++: it must see what would change it, and be safe in any code."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
from hooked import paired
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import red_kernels as rk
from red_kernels.backends import nodes
from red_kernels.fusion.site import last_record
from red_kernels.fusion.waiting import Waiting

pytestmark = pytest.mark.skipif(nodes.load_error() is not None, reason=f"no nodes in C++: {nodes.load_error()}")
WIDTH = 16


def plus(x: Tensor, y: Any) -> Tensor:
    return x + y


class Layer(nn.Module):
    takes: Callable[[Tensor, Any], Tensor] = staticmethod(plus)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return type(self).takes(x, self.down(self.up(self.norm(x)).relu()))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(Layer() for _ in range(3)), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.last(x)
        return y


@torch.jit.script
def scripted(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def unasked(x: Tensor, y: Any) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x + torch.cat([y * 2, y])[: y.shape[0]]


def learnt(model: nn.Module, *given: Any, **named: Any) -> None:
    for _ in range(3):
        with torch.no_grad():
            model(*given, **named)


@pytest.mark.parametrize("takes", [scripted, unasked])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_code_that_does_not_ask_gets_the_edited_value(takes: Any, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Model()
    plain = copy.deepcopy(model)
    paired(model, plain)
    x = torch.randn(2, 3, WIDTH)
    with mode():
        for _ in range(3):
            model(x)
        monkeypatch.setattr(Layer, "takes", staticmethod(takes))
        for _ in range(3):
            torch.testing.assert_close(model(x), plain(x))


class Counting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.additions = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.additions += func in (Tensor.add, Tensor.__add__, Tensor.__radd__)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_as_many_additions_as_in_a_first_call() -> None:
    model = zoo.tiny("llama").eval()
    rk.patch(model)
    inputs = zoo.inputs("llama")
    counts = []
    for _ in range(4):
        with torch.no_grad(), Counting() as mode:
            model(**inputs)
        counts.append(mode.additions)
        learnt(model, **inputs)
    assert len(set(counts)) == 1


def test_a_default_device_is_no_such_mode() -> None:
    model = zoo.tiny("llama").eval()
    rk.patch(model)
    inputs = zoo.inputs("llama")
    learnt(model, **inputs)
    asked = []
    added = Waiting.__torch_function__
    with torch.no_grad(), torch.device("cpu"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Waiting, "__torch_function__", lambda *given, **named: asked.append(given) or added(*given, **named)
        )
        model(**inputs)
    assert not asked


def test_a_replaced_function_of_torch_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.tiny("bert", hidden_dropout_prob=0.5).train()
    report = rk.patch(model)
    inputs = zoo.inputs("bert")
    learnt(model, **inputs)
    assert all("dropout" in (site.fused or "") for site in report.sites)
    monkeypatch.setattr(nn.functional, "dropout", lambda x, *given, **named: x)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_an_exception_behind_a_sum_leaves_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    rk.patch(model)
    x = torch.randn(2, 3, WIDTH)
    for _ in range(3):
        model(x).sum().backward()
    sums: list[weakref.ref[Tensor]] = []

    def failing(x: Tensor, y: Any) -> Tensor:
        total = x + y
        sums.append(weakref.ref(total))
        if len(sums) == 2:
            raise ValueError("on the way")
        return total

    monkeypatch.setattr(Layer, "takes", staticmethod(failing))
    with pytest.raises(ValueError, match="on the way"):
        model(x)
    gc.collect()
    assert [reference() for reference in sums] == [None, None]
    monkeypatch.undo()
    model(x).sum().backward()


def test_a_hook_that_is_gone_is_forgotten() -> None:
    model = zoo.tiny("gpt2")
    rk.patch(model)
    inputs = zoo.inputs("gpt2")
    learnt(model, **inputs)
    own: Any = model.transformer.h[1].mlp.c_proj.red_edit
    before = last_record(own).what
    handle = model.transformer.h[1].ln_2.register_forward_hook(lambda *given: None)
    learnt(model, **inputs)
    handle.remove()
    learnt(model, **inputs)
    assert before is not None
    assert last_record(own).what == before


@pytest.mark.parametrize("quick", [True, False])
def test_a_hook_that_comes_with_a_module_sees_plain_tensors(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts a hook when it is registered; its module may come to a block later."""
    if not quick:
        for name in ("edited", "carried"):
            monkeypatch.setattr(nodes, name, lambda *given: None)
    model = zoo.tiny("bert")
    plain = copy.deepcopy(model)
    paired(model, plain)
    inputs = zoo.inputs("bert")
    output = model.bert.encoder.layer[1].output
    norm = copy.deepcopy(output.LayerNorm)
    seen: list[Any] = []
    norm.register_forward_hook(lambda module, given, found: seen.extend((type(given[0]), type(found))))
    learnt(model, **inputs)
    output.LayerNorm = norm
    learnt(model, **inputs)
    assert set(seen) == {Tensor}
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)


def test_threads_that_compute_in_other_modes() -> None:
    """Each replaces what the other has kept, while kernels run without the interpreter's lock."""
    model = Model().eval()
    rk.patch(model)
    x = torch.randn(64, 32, WIDTH)
    with torch.no_grad():
        wanted = model(x)
    wrong: list[Any] = []

    def run(mode: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        with mode():
            for _ in range(150):
                if not torch.equal(model(x), wanted):
                    wrong.append(mode)

    threads = [threading.Thread(target=run, args=(mode,)) for mode in (torch.no_grad, torch.inference_mode)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
