"""Norms of every kind that a trial tells, and modules that are none of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
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
from red_kernels.fusion.norm_kinds import NormSpec

WIDTH = 48


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
