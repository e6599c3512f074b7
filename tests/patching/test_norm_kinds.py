"""What norms compute, by trial: of which kind a norm is, whatever its name is and wherever it is asked."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.deberta.modeling_deberta import DebertaLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextL2Norm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated
from transformers.models.sam.modeling_sam import SamLayerNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from red_kernels.fusion import norm_kinds
from red_kernels.fusion.norm_kinds import NormSpec, could_be_norm, norm_spec
from red_kernels.patching.classes import patch_norm

WIDTH = 48


@pytest.fixture(autouse=True)
def _untried(monkeypatch):
    """Each test tries for itself."""
    monkeypatch.setattr(norm_kinds, "_specs", {})


def rms(x, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Norm(nn.Module):
    """An RMSNorm, whose parts subclasses change."""

    def __init__(self, width=WIDTH, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return self.weight * rms(x.float(), self.eps).to(x.dtype)


class Plain(Norm):
    """That computes in the dtype of its input."""

    def forward(self, x):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(WIDTH))
        self.gain = nn.Parameter(torch.zeros(WIDTH))
        self.tiny, self.small = 1e-5, 1e-6

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], 1 + self.gain, self.shift, self.small)


class WithGap(Renamed):
    """A parameter that is None between two others."""

    def __init__(self):
        super().__init__()
        del self.gain
        self.register_parameter("none", None)
        self.gain = nn.Parameter(torch.ones(WIDTH))


class OfClass(Norm):
    tiny = 1e-5

    def forward(self, x):
        return self.weight * rms(x.float(), self.tiny).to(x.dtype)


class Constant(Norm):
    def forward(self, x):
        return self.weight * rms(x.float(), 1e-8).to(x.dtype)


class OnlyBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset, self.eps = nn.Parameter(torch.zeros(WIDTH)), 1e-5

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], None, self.offset, self.eps)


class OtherBuffer(Norm):
    """As FalconMamba's: a buffer for another kernel, which `forward` passes over."""

    def __init__(self):
        super().__init__()
        self.register_buffer("for_kernels", torch.ones(WIDTH), persistent=False)


class Holder(Norm):
    """One that holds what its `forward` does not read."""

    def __init__(self):
        super().__init__()
        self.config, self.sizes = object(), [1, 2]


def without_epsilon():
    return nn.RMSNorm(WIDTH, eps=None)


MATCHES = {
    "LayerNorm": (lambda: nn.LayerNorm(WIDTH), NormSpec(True, "eps", 0.0, "weight", "bias")),
    "LayerNorm without bias": (lambda: nn.LayerNorm(WIDTH, bias=False), NormSpec(True, "eps", 0.0)),
    "bare LayerNorm": (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), NormSpec(True, "eps", 0.0, "")),
    "RMSNorm": (lambda: nn.RMSNorm(WIDTH, eps=1e-5), NormSpec(False, "eps", 0.0)),
    "RMSNorm without epsilon": (without_epsilon, NormSpec(False, "", 0.0)),
    "bare RMSNorm": (lambda: nn.RMSNorm(WIDTH, 1e-5, elementwise_affine=False), NormSpec(False, "eps", 0.0, "")),
    "Llama": (lambda: LlamaRMSNorm(WIDTH), NormSpec(False, "variance_epsilon", 0.0)),
    "T5": (lambda: T5LayerNorm(WIDTH), NormSpec(False, "variance_epsilon", 0.0)),
    "GPT-OSS": (lambda: GptOssRMSNorm(WIDTH), NormSpec(False, "variance_epsilon", 0.0)),
    "Gemma": (lambda: GemmaRMSNorm(WIDTH), NormSpec(False, "eps", 1.0)),
    "Qwen3-Next": (lambda: Qwen3NextRMSNorm(WIDTH), NormSpec(False, "eps", 1.0)),
    "Gemma 3n": (lambda: Gemma3nRMSNorm(WIDTH), NormSpec(False, "eps", 0.0)),
    "bare Gemma 3n": (lambda: Gemma3nRMSNorm(WIDTH, with_scale=False), NormSpec(False, "eps", 0.0, "")),
    "Llama 4's L2": (lambda: Llama4TextL2Norm(), NormSpec(False, "eps", 0.0, "")),
    "OLMo": (lambda: OlmoLayerNorm(WIDTH), NormSpec(True, "", 0.0, "", "", 1e-5)),
    "Cohere": (lambda: CohereLayerNorm(WIDTH), NormSpec(True, "variance_epsilon", 0.0)),
    "Nemotron": (lambda: NemotronLayerNorm1P(WIDTH), NormSpec(True, "eps", 1.0, "weight", "bias")),
    "DeBERTa": (lambda: DebertaLayerNorm(WIDTH), NormSpec(True, "variance_epsilon", 0.0, "weight", "bias")),
    "gated, ungrouped": (lambda: MambaRMSNormGated(WIDTH, WIDTH), NormSpec(False, "variance_epsilon", 0.0)),
    "SAM, channels last": (lambda: SamLayerNorm(WIDTH), NormSpec(True, "eps", 0.0, "weight", "bias")),
    "plain": (Plain, NormSpec(False, "eps", 0.0)),
    "wide": (lambda: Plain(4099), NormSpec(False, "eps", 0.0)),
    "narrow": (lambda: Norm(2), NormSpec(False, "eps", 0.0)),
    "renamed": (Renamed, NormSpec(True, "small", 1.0, "gain", "shift")),
    "renamed, with a gap": (WithGap, NormSpec(True, "small", 1.0, "gain", "shift")),
    "epsilon of the class": (OfClass, NormSpec(False, "tiny", 0.0)),
    "constant epsilon": (Constant, NormSpec(False, "", 0.0, "weight", "", 1e-8)),
    "only a bias": (OnlyBias, NormSpec(True, "eps", 0.0, "", "offset")),
    "a buffer aside": (OtherBuffer, NormSpec(False, "eps", 0.0)),
    "a holder": (Holder, NormSpec(False, "eps", 0.0)),
}


@pytest.mark.parametrize("name", MATCHES)
def test_matches(name):
    make, spec = MATCHES[name]
    norm = make()
    assert norm_spec(norm) == spec
    assert norm_spec(norm) == spec  # from the cache, if it has been tried
    assert norm_spec(norm.to("meta", torch.float16)) == spec
    assert spec.title == ("LayerNorm" if spec.centered else "RMSNorm")


@pytest.mark.parametrize("name", [name for name in MATCHES if not name.startswith("renamed")])
def test_could_be_norm(name):
    assert could_be_norm(MATCHES[name][0]())


@pytest.mark.parametrize("name", [name for name in MATCHES if "RMSNorm" in name or "LayerNorm" in name])
def test_torch_by_trial(name, monkeypatch):
    """What is told by its class is what a trial finds."""
    monkeypatch.setattr(norm_kinds, "_TORCH", {})
    make, spec = MATCHES[name]
    assert norm_spec(make()) == spec
    assert len(norm_kinds._specs) == 1


class L2(Norm):
    def forward(self, x):
        return F.normalize(x, dim=-1) * self.weight


class Outside(Norm):
    """Epsilon beside the root."""

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Unbiased(Norm):
    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + self.eps)


class Detached(Norm):
    """The norm's output, and not its gradient."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps).detach()


class WithoutGradient(Norm):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Positive(Norm):
    def forward(self, x):
        return self.weight.abs() * rms(x, self.eps)


class InPlace(Norm):
    def forward(self, x):
        return x.data.mul_(torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)) * self.weight


class Training(Norm):
    def forward(self, x):
        return super().forward(x) * (1.0 if self.training else 2.0)


class Noisy(Norm):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.1, self.training))


class Upcasting(Norm):
    def forward(self, x):
        return self.weight.float() * rms(x.float(), self.eps)


class Rough(Norm):
    """In bf16 it is another norm."""

    def forward(self, x):
        return super().forward(x if x.dtype is torch.float32 else x.clamp(-1.0, 1.0))


class InFull(Norm):
    """Of fp32 weights only, as ESMFold2's."""

    def forward(self, x):
        return F.layer_norm(x.float(), x.shape[-1:], self.weight, None, self.eps).to(x.dtype)


class Pair(Norm):
    def forward(self, x):
        return super().forward(x), x


class Groups(Norm):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, x):
        return self.weight * rms(x.unflatten(-1, (self.groups, -1)), self.eps).flatten(-2)


class BareGroups(nn.Module):
    """Whose size is the width that a trial would take."""

    def __init__(self):
        super().__init__()
        self.size, self.eps = norm_kinds._WIDTHS[0], 1e-6

    def forward(self, x):
        return rms(x.unflatten(-1, (-1, self.size)), self.eps).flatten(-2)


class First(Norm):
    """Of the root mean square of the first values."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x[..., :32].square().mean(-1, keepdim=True) + self.eps)


class OverTokens(Norm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean((-1, -2), keepdim=True) + self.eps)


class FromConfig(Norm):
    def __init__(self):
        super().__init__()
        self.config = lambda: 1e-6

    def forward(self, x):
        return self.weight * rms(x, self.config())


class OfTensor(Norm):
    def __init__(self):
        super().__init__()
        self.gain = torch.ones(WIDTH)


class Scaled(Norm):
    def __init__(self):
        super().__init__()
        self.gain = 2.0

    def forward(self, x):
        return super().forward(x) * self.gain


def lazy():
    norm = Norm()
    norm.weight = nn.UninitializedParameter()
    return norm


def grown():
    norm = Norm()
    norm.inner = nn.Linear(2, 2)
    return norm


REFUSED = {
    **{kind.__name__: kind for kind in (L2, Outside, Unbiased, Detached, WithoutGradient, Positive, InPlace)},
    **{kind.__name__: kind for kind in (Training, Noisy, Upcasting, Rough, InFull, Pair, BareGroups, First)},
    **{kind.__name__: kind for kind in (OverTokens, FromConfig, OfTensor, Scaled)},
    "groups": lambda: Groups(4),
    "lazy": lazy,
    "with a child": grown,
    "two arguments": lambda: Qwen3NextRMSNormGated(WIDTH),
    "gated, grouped": lambda: MambaRMSNormGated(WIDTH, 16),
    "LayerNorm of two dimensions": lambda: nn.LayerNorm((4, WIDTH)),
    "bare LayerNorm of two dimensions": lambda: nn.LayerNorm((4, WIDTH), elementwise_affine=False),
    "Cohere's for heads": lambda: CohereLayerNorm((4, WIDTH)),
    "GroupNorm": lambda: nn.GroupNorm(4, WIDTH),
    "GroupNorm of one group": lambda: nn.GroupNorm(1, WIDTH),
    "InstanceNorm": lambda: nn.InstanceNorm1d(WIDTH, affine=True),
    "BatchNorm": lambda: nn.BatchNorm1d(WIDTH),
    "BatchNorm without statistics": lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False),
    "SAM, channels first": lambda: SamLayerNorm(WIDTH, data_format="channels_first"),
    "Linear": lambda: nn.Linear(WIDTH, WIDTH),
    "Identity": nn.Identity,
    "PReLU": lambda: nn.PReLU(WIDTH),
    "one value": lambda: Norm(1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    state = torch.get_rng_state()
    norm = REFUSED[name]()
    torch.set_rng_state(state)
    assert norm_spec(norm) is None
    assert norm_spec(norm) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_what_could_be_no_norm():
    linear, dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.01)
    refused = (linear, dropout, nn.Identity(), nn.BatchNorm1d(WIDTH), nn.Sequential(nn.LayerNorm(WIDTH)), lazy())
    assert not any(could_be_norm(module) for module in refused)
    assert could_be_norm(nn.GroupNorm(4, WIDTH))  # a trial tells


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_other_modules_around_norms():
    for module in (torch.jit.script(nn.LayerNorm(WIDTH)), torch.compile(nn.LayerNorm(WIDTH))):
        assert not could_be_norm(module)
        assert norm_spec(module) is None


def test_epsilon():
    assert MATCHES["RMSNorm"][1].epsilon(nn.RMSNorm(WIDTH, eps=0.5), torch.float32) == 0.5
    assert MATCHES["OLMo"][1].epsilon(OlmoLayerNorm(WIDTH), torch.float32) == 1e-5
    norm, spec = MATCHES["RMSNorm without epsilon"][0](), MATCHES["RMSNorm without epsilon"][1]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = (torch.arange(1, 1 + WIDTH, dtype=torch.float64) * 1e-5).to(dtype)
        wide = x.double()
        expected = wide * torch.rsqrt(wide.square().mean() + spec.epsilon(norm, dtype))
        torch.testing.assert_close(norm.to(dtype)(x).double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=0)


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
