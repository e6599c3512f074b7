"""A value that waits, in the hands of code that knows nothing of it: what plain forward hooks have, and no leak."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hooked import paired
from torch import Tensor, nn
from torch.autograd import Function

from red_kernels.edits.config import RedConfig
from red_kernels.fusion.waiting import Waiting
from red_kernels.patching.patch import patch

WIDTH = 16
Way = Callable[["Layer", Tensor, Tensor], Any]


class Double(Function):
    """Of somebody's own: it never asks what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


class Layer(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.gain = nn.Parameter(torch.rand(WIDTH))
        self.kept: Any = None
        self.way = [way]

    def forward(self, x: Tensor) -> Any:
        return self.way[0](self, x, self.down(F.gelu(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(way) for _ in range(2))
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def in_place_on_a_view(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    rows = y.view(-1, WIDTH)
    rows += 1.0
    return x + y


def in_place_on_what_is_viewed(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    rows = y.view(-1, WIDTH)
    y += x
    return y + rows.view_as(y)


def residual_in_place(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    kept = z
    z += y
    return z + kept


def added_in_place_and_held(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    held = y
    y += x
    return y * held


def set_item(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    y[:, 0] = 0.0
    return x + y


def norm_twice(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    z = x + y
    return z + layer.norm(z) * 0.5 + layer.norm(z * 2)


def changed_between_sum_and_norm(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    z = x + y
    z *= 1.5
    return layer.norm(z)


def through_storage(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return x + torch.from_numpy((y.detach()).numpy().copy()) + y


WAYS: dict[str, Way] = {
    "add": lambda layer, x, y: x + y,
    "add, value first": lambda layer, x, y: y + x,
    "torch.add": lambda layer, x, y: torch.add(x, y),
    "torch.add with alpha": lambda layer, x, y: torch.add(x, y, alpha=0.5),
    "add of a vector": lambda layer, x, y: x + (y + layer.gain),
    "add of a number": lambda layer, x, y: x + (y + 1.0),
    "another dtype": lambda layer, x, y: (x.double() + y).float(),
    "twice": lambda layer, x, y: (x + y) + y,
    "with itself": lambda layer, x, y: x + (y + y),
    "number": lambda layer, x, y: x + 0.5 * y,
    "divided": lambda layer, x, y: x + y / 3,
    "negative": lambda layer, x, y: x - y,
    "layer scale": lambda layer, x, y: x + layer.gain * y,
    "gate of each sample": lambda layer, x, y: x + x.mean(1, keepdim=True) * y,
    "number of each sample": lambda layer, x, y: x + x.mean((1, 2), keepdim=True) * y,
    "gate of each token": lambda layer, x, y: x + torch.sigmoid(x) * y,
    "rows": lambda layer, x, y: (x.view(-1, WIDTH) + y.view(-1, WIDTH)).view(x.shape),
    "reshape": lambda layer, x, y: x.reshape(-1, WIDTH).add(y.reshape(-1, WIDTH)).reshape(x.shape),
    "transposed": lambda layer, x, y: (x.transpose(0, 1) + y.transpose(0, 1)).transpose(0, 1),
    "last dimension transposed": lambda layer, x, y: (x.transpose(1, 2) + y.transpose(1, 2)).transpose(1, 2),
    "permuted": lambda layer, x, y: (x.permute(1, 0, 2) + y.permute(1, 0, 2).contiguous()).permute(1, 0, 2),
    "rolled": lambda layer, x, y: x + torch.roll(y, 1, 1),
    "rolled along the last": lambda layer, x, y: x + torch.roll(y, 1, 2),
    "sliced": lambda layer, x, y: torch.cat([x[:, :3] + y[:, :3], x[:, 3:] + y[:, 3:]], 1),
    "sliced along the last": lambda layer, x, y: torch.cat([x[..., :8] + y[..., :8], x[..., 8:]], -1),
    "indexed": lambda layer, x, y: x + y[:, torch.tensor([1, 0, 2, 3, 4])],
    "split": lambda layer, x, y: x + torch.cat(y.chunk(2, -1)[::-1], -1),
    "stacked": lambda layer, x, y: torch.stack([x, y]).sum(0),
    "cast": lambda layer, x, y: x + y.to(x.dtype).to(x.device).type_as(x).contiguous().float(),
    "made like it": lambda layer, x, y: x + y * y.new_ones(y.shape[0], 1, 1) + torch.zeros_like(y),
    "own norm": lambda layer, x, y: x + layer.norm(y),
    "function of a norm": lambda layer, x, y: x + F.layer_norm(y, (WIDTH,), layer.gain),
    "detached": lambda layer, x, y: x + y.detach() + y,
    "cloned": lambda layer, x, y: x + y.clone(),
    "without gradients": lambda layer, x, y: x + y + torch.no_grad()(torch.sin)(y),
    "a Function": lambda layer, x, y: x + Double.apply(y),
    "a Function of the sum": lambda layer, x, y: Double.apply(x + y),
    "comparison": lambda layer, x, y: x + torch.where(y > 0, y, -y),
    "einsum": lambda layer, x, y: x + torch.einsum("bld,d->bld", y, layer.gain),
    "matmul": lambda layer, x, y: x + y @ torch.diag(layer.gain),
    "bool of one": lambda layer, x, y: x + y if (y.sum() < 1e9) else x,
    "list": lambda layer, x, y: sum([x, y]),
    "nothing": lambda layer, x, y: y,
    "set item": set_item,
    "in place on a view": in_place_on_a_view,
    "in place on what is viewed": in_place_on_what_is_viewed,
    "residual in place": residual_in_place,
    "added in place and held": added_in_place_and_held,
    "two norms": norm_twice,
    "changed before its norm": changed_between_sum_and_norm,
    "numpy": through_storage,
}


def pair(way: Way) -> tuple[nn.Module, nn.Module, list[nn.Parameter], list[nn.Parameter]]:
    """A patched model and one with plain hooks, with the same vectors."""
    torch.manual_seed(0)
    model = Model(way)
    plain = copy.deepcopy(model)
    _, own, others = paired(model, plain)
    return model, plain, own, others


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_as_plain_hooks(way: str, gradients: bool) -> None:
    model, plain, own, others = pair(WAYS[way])
    x = torch.randn(3, 5, WIDTH)
    with torch.set_grad_enabled(gradients):
        wanted = plain(x)
        for call in range(3):
            found = model(x)
            assert type(found) is Tensor
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            if not gradients:
                continue
            pattern = torch.cos(torch.arange(found.numel())).view(found.shape)
            one = torch.autograd.grad((found * pattern).sum(), own, retain_graph=True)
            other = torch.autograd.grad((wanted * pattern).sum(), others, retain_graph=True)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=f"call {call}")
            for vector in own:
                vector.grad = None
            (found * pattern).sum().backward()
            grads = tuple(vector.grad for vector in own)
            torch.testing.assert_close(grads, other, rtol=1e-4, atol=1e-5, msg=f"call {call}")


# What is settled without gradients, as by a Function, has a node of its own from the second call on.
ASTRAY = ("a Function", "a Function of the sum", "without gradients", "numpy")


@pytest.mark.parametrize("way", [name for name in WAYS if name not in ASTRAY])
def test_the_first_call_has_the_bits_of_later_ones(way: str) -> None:
    model, _, own, _ = pair(WAYS[way])
    x = torch.randn(3, 5, WIDTH)
    seen = []
    for _ in range(4):
        value = model(x)
        seen.append((value.detach(), *torch.autograd.grad(value.square().sum(), own)))
    for later in seen[1:]:
        assert all(map(torch.equal, seen[0], later))


def test_a_function_that_takes_another_path_later_raises_or_has_its_gradient() -> None:
    """No gradient is ever lost in silence: once an addition takes the value, a Function that does is an error, once."""
    switch = {"on": False}
    model, plain, own, others = pair(lambda layer, x, y: x + (Double.apply(y) if switch["on"] else y))
    x = torch.randn(3, 5, WIDTH)
    model(x).sum().backward()
    switch["on"] = True
    with pytest.raises(RuntimeError, match="run the forward again"):
        model(x).square().sum().backward()
    found = torch.autograd.grad(model(x).square().sum(), own)
    wanted = torch.autograd.grad(plain(x).square().sum(), others)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def keeping(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    layer.kept = y
    return x + y


def test_what_a_layer_keeps_is_a_tensor_for_everybody() -> None:
    model, plain, *_ = pair(keeping)
    x = torch.randn(3, 5, WIDTH)
    for _ in range(2):
        model(x), plain(x)
        kept, wanted = model.layers[0].kept, plain.layers[0].kept
        for copied in (kept + 0, copy.deepcopy(kept.detach()), pickle.loads(pickle.dumps(kept.detach()))):
            assert type(copied) is Tensor
            torch.testing.assert_close(copied, wanted, rtol=1e-5, atol=1e-5)
        assert "Waiting" not in repr(kept)


def test_a_direct_call_of_a_site_or_an_ffn_gives_a_plain_tensor() -> None:
    model, plain, *_ = pair(WAYS["add"])
    model(torch.randn(3, 5, WIDTH))
    h = torch.randn(2, 24)
    found = model.layers[1].down(h)
    assert type(found) is Tensor
    torch.testing.assert_close(found, plain.layers[1].down(h), rtol=1e-5, atol=1e-5)


def test_metadata_does_not_settle_and_data_ptr_raises() -> None:
    seen: dict[str, Any] = {}

    def look(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
        seen.update(kind=type(y), shape=y.shape, dtype=y.dtype, grad=y.requires_grad, size=y.size(-1), dim=y.dim())
        with pytest.raises(RuntimeError, match="data_ptr"):
            y.data_ptr()
        seen["settled"] = y.done is not None
        return x + y

    torch.manual_seed(0)
    model = Model(look)
    patch(model, RedConfig())
    with torch.no_grad():
        model(torch.randn(3, 5, WIDTH))
    assert seen == {
        "kind": Waiting, "shape": (3, 5, WIDTH), "dtype": torch.float32, "grad": False, "size": WIDTH, "dim": 3,
        "settled": False,
    }  # fmt: skip


@pytest.mark.parametrize("where", ["down", "up", "norm", "layer"])
def test_hooks_of_others_see_plain_tensors(where: str) -> None:
    model, plain, *_ = pair(WAYS["add"])
    kinds: list[type] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kinds.extend(type(one) for one in (*args, output))

    module = model.layers[1] if where == "layer" else getattr(model.layers[1], where)
    module.register_forward_hook(hook)
    x = torch.randn(3, 5, WIDTH)
    for _ in range(3):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    assert set(kinds) <= {Tensor, nn.Parameter}


def learnt() -> tuple[Model, Model, list[nn.Parameter], list[nn.Parameter], Tensor]:
    """A model that knows its norms, its peer with hooks, the vectors of both, and an input."""
    torch.manual_seed(0)
    model = Model(lambda layer, x, y: x + y)
    plain = copy.deepcopy(model)
    _, own, others = paired(model, plain)
    x = torch.randn(2, 3, WIDTH)
    for _ in range(3):
        model(x).sum().backward()
    return model, plain, own, others, x


class Epsilon(nn.Module):
    """An RMSNorm whose epsilon may be anything that can be added."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(WIDTH)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize("change", ["cast", "epsilon", "trained epsilon", "weight", "hook"])
def test_a_norm_that_changed_since_it_was_learnt(change: str) -> None:
    torch.manual_seed(0)
    model = Model(lambda layer, x, y: x + y)
    for layer in model.layers:
        layer.norm = Epsilon()
    model.last = Epsilon()
    plain = copy.deepcopy(model)
    paired(model, plain)
    x = torch.randn(2, 3, WIDTH)
    for _ in range(3):
        model(x)
    for one in (model, plain):
        norm = one.last
        if change == "cast":
            norm.double()
        elif change == "weight":
            norm.weight = nn.Parameter(torch.full((WIDTH,), 2.0))
        elif change == "hook":
            norm.register_forward_hook(Unhashable())
        else:
            del norm.eps
            norm.eps = 0.5 if change == "epsilon" else nn.Parameter(torch.tensor(1e-6))
    for _ in range(2):
        found, wanted = model(x), plain(x)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1.3e-6)  # most of it is in fp32, whatever comes out
        if change == "trained epsilon":
            gradients = [
                torch.autograd.grad(y.square().sum(), one.last.eps)[0] for y, one in ((found, model), (wanted, plain))
            ]
            torch.testing.assert_close(*gradients)


@dataclasses.dataclass
class Unhashable:
    """A hook of somebody's own: what has `__eq__` and no `__hash__` is in no set."""

    calls: int = 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output + 1.0


@pytest.mark.parametrize("where", ["layers.0.down", "layers.0.norm", "layers.0", "last", ""])
def test_hooks_that_are_not_hashable(where: str) -> None:
    model, plain, own, others, x = learnt()
    hooks = [Unhashable(), Unhashable()]
    for one, hook in zip((model, plain), hooks, strict=True):
        one.get_submodule(where).register_forward_hook(hook)
    for _ in range(2):
        torch.testing.assert_close(model(x), plain(x))
        found = torch.autograd.grad(model(x).square().sum(), own)
        wanted = torch.autograd.grad(plain(x).square().sum(), others)
        torch.testing.assert_close(found, wanted)
    assert hooks[0].calls == hooks[1].calls > 0
    again = Model(lambda layer, x, y: x + y)
    again.get_submodule(where).register_forward_hook(Unhashable())
    patch(again, RedConfig(), example=x)
    again(x)
