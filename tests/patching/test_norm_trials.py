"""How a norm is tried: wherever that is asked, unseen, and once for all of its kind."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from norm_examples import MATCHES, WIDTH, Groups, Holder, Norm, Scaled
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from red_kernels.fusion import norm_kinds
from red_kernels.fusion.norm_kinds import NormSpec, norm_spec
from red_kernels.patching.classes import patch_norm


@pytest.fixture(autouse=True)
def _untried(monkeypatch):
    """Each test tries for itself."""
    monkeypatch.setattr(norm_kinds, "_specs", {})


class Counting(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class Refusing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("rsqrt", "pow", "layer_norm"):
            raise AssertionError("the trial is seen")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def forward_ad():
    with torch.autograd.forward_ad.dual_level():
        yield


def refuse(*_):
    raise AssertionError("the trial is seen")


PLACES = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fake tensors": FakeTensorMode,
    "a dispatch mode": Counting,
    "a function mode": Refusing,
    "another dtype": lambda: default_dtype(torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "saved-tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
    "no saved-tensor hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "forward mode": forward_ad,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["Llama", "Gemma", "OLMo", "Cohere", "renamed", "plain"])
def test_places(name, place):
    make, spec = MATCHES[name]
    norm = make()
    random = torch.get_rng_state()
    with PLACES[place]() as entered:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert norm_spec(norm) == spec
        assert modes == (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
        )
    if isinstance(entered, Counting):
        assert entered.calls == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in norm.parameters())


def test_in_transforms():
    """Under `torch.func`, and while a backward runs."""
    norm = LlamaRMSNorm(WIDTH)
    spec = MATCHES["Llama"][1]
    found = []

    def ask(x):
        found.append(norm_spec(norm))
        norm_kinds._specs.clear()
        return x.sum()

    torch.vmap(ask)(torch.ones(2, 3))
    torch.func.grad(ask)(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: ask(gradient) and None)
    y.sum().backward()
    assert found == [spec] * 3


def test_fake_parameters():
    with FakeTensorMode():
        norm = LlamaRMSNorm(WIDTH)
        assert norm_spec(norm) == MATCHES["Llama"][1]


def test_weights_as_they_were():
    norm = Norm()
    before = copy.deepcopy(norm.__dict__)
    norm_spec(norm)
    assert norm.__dict__.keys() == before.keys()
    assert torch.equal(norm.weight, before["_parameters"]["weight"])


def test_what_is_around_the_forward():
    """Hooks and replaced forwards of an instance are neither run nor looked at."""
    norm = LlamaRMSNorm(WIDTH)
    norm.register_forward_hook(refuse)
    norm.register_forward_pre_hook(refuse)
    norm.forward = refuse
    norm._compiled_call_impl = refuse
    assert norm_spec(norm) == MATCHES["Llama"][1]


def test_patched(monkeypatch):
    """What is tried of a patched norm is the library's class."""
    norm = LlamaRMSNorm(WIDTH)
    patch_norm(norm)
    monkeypatch.setattr(type(norm), "forward", refuse)
    norm.register_module("red_edit", nn.Identity())
    assert norm_spec(norm) == MATCHES["Llama"][1]
    assert next(iter(norm_kinds._specs))[1] is LlamaRMSNorm


def test_subclass_of_patched():
    norm = LlamaRMSNorm(WIDTH)
    patch_norm(norm)
    norm.__class__ = type("Mine", (type(norm),), {})
    assert norm_spec(norm) == MATCHES["Llama"][1]


def test_liger(capfd):
    """Its kernels do not run here, unless Triton interprets them."""
    norm = pytest.importorskip("liger_kernel.transformers").LigerRMSNorm(WIDTH)
    assert norm_spec(norm) in (None, NormSpec(False, "variance_epsilon", 0.0))
    assert capfd.readouterr() == ("", "")


def test_parametrized():
    """It is the class's forward that is described: the weight is no parameter any more."""
    for norm, spec in ((LlamaRMSNorm(WIDTH), MATCHES["Llama"][1]), (nn.LayerNorm(WIDTH), MATCHES["LayerNorm"][1])):
        torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
        assert norm_spec(norm) == spec
    assert norm_spec(parametrizations.weight_norm(nn.Linear(3, 3))) is None


@pytest.fixture
def tries(monkeypatch):
    """The classes that were tried, in order."""
    tried = []
    spec = norm_kinds._Trial.spec

    def counted(trial):
        tried.append(trial.kind)
        return spec(trial)

    monkeypatch.setattr(norm_kinds._Trial, "spec", counted)
    return tried


def test_one_trial_for_many(tries):
    for width, eps in ((WIDTH, 1e-6), (WIDTH, 1e-5), (2 * WIDTH, 1e-6), (2 * WIDTH, 0)):
        assert norm_spec(LlamaRMSNorm(width, eps)) == MATCHES["Llama"][1]
        assert norm_spec(OlmoLayerNorm(WIDTH)) == MATCHES["OLMo"][1]
    assert tries == [LlamaRMSNorm, OlmoLayerNorm]


def test_trials_of_variants(tries):
    """Flags, sizes and which parameters there are make another norm of the same class."""
    assert norm_spec(Gemma3nRMSNorm(WIDTH)) != norm_spec(Gemma3nRMSNorm(WIDTH, with_scale=False))
    assert norm_spec(Groups(1)) == NormSpec(False, "eps", 0.0)
    assert norm_spec(Groups(2)) is None
    norm = Scaled()
    assert norm_spec(norm) is None
    norm.gain = 1.0
    assert norm_spec(norm) == NormSpec(False, "eps", 0.0)
    assert len(tries) == 6


def test_torch_is_not_tried(tries):
    assert norm_spec(nn.LayerNorm(WIDTH)) is not None
    assert norm_spec(nn.RMSNorm(WIDTH)) is not None
    assert not tries


@pytest.mark.parametrize("kind", [LlamaRMSNorm, nn.LayerNorm])
def test_replaced_in_the_class(kind, monkeypatch):
    norm = kind(WIDTH)
    spec = norm_spec(norm)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:]) * 2)
        assert norm_spec(norm) is None
    assert norm_spec(norm) == spec


def test_modules_are_not_kept():
    norm = Holder()
    held = weakref.ref(norm), weakref.ref(norm.weight)
    assert norm_spec(norm) is not None
    del norm
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(norm_kinds, "_MOST", 3)
    for gain in range(2, 9):
        norm = Scaled()
        norm.gain = float(gain)
        assert norm_spec(norm) is None
        assert len(norm_kinds._specs) <= 3


def test_no_thread(monkeypatch):
    """Where no thread can be started, the norm is asked again later."""

    def no_thread(*_args, **_kwargs):
        raise RuntimeError("can't start new thread at interpreter shutdown")

    norm = Norm()
    with monkeypatch.context() as patch:
        patch.setattr(norm_kinds.threading, "Thread", no_thread)
        assert norm_spec(norm) is None
    assert norm_spec(norm) == NormSpec(False, "eps", 0.0)
