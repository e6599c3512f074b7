"""A patched model and its peer: the same model with the same edits as plain forward hooks."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.naive import naive_edit
from red_kernels.patching.patch import patch
from red_kernels.patching.report import PatchReport

CLOSE = 1e-5  # relative, of two computations in fp32


class Pair(NamedTuple):
    """What the patch said, and the vectors of both models in one order, with the same random values."""

    report: PatchReport
    own: list[nn.Parameter]
    others: list[nn.Parameter]


def paired(model: nn.Module, plain: nn.Module, position: str = "ffn", example: object = None) -> Pair:
    """Patch `model`, and edit `plain`, a copy of it, by hooks."""
    report = patch(model, RedConfig(position=position), example=example)
    edits = edit_parameters(model)
    widths = {site: next(iter(parts.values())).shape[0] for site, parts in edits.items()}
    peer = naive_edit(plain, list(edits), widths=widths)
    pair = Pair(report, [], [])
    generator = torch.Generator().manual_seed(3)
    for site, parts in edits.items():
        for part, vector in parts.items():
            other = peer.parameters[site][part]
            vector.data.copy_(0.3 * torch.randn(vector.shape, generator=generator) + (part == "scale"))
            other.data.copy_(vector)
            pair.own.append(vector)
            pair.others.append(other)
    return pair


def flat(gradients: tuple[torch.Tensor | None, ...], vectors: list[nn.Parameter]) -> torch.Tensor:
    """Gradients of all vectors in one, zeros where there is none."""
    pairs = zip(gradients, vectors, strict=True)
    return torch.cat([(torch.zeros_like(v) if g is None else g).flatten() for g, v in pairs])


def held_to_hooks(model: nn.Module, batch: Any, position: str = "ffn", training: bool = True) -> PatchReport:
    """Patch a model, and hold two forwards and backwards to the same edits as forward hooks. Returns the report.

    Args:
        batch: a dict of arguments, a tuple of them, or one argument.
    """
    plain = copy.deepcopy(model).train(training)
    report, own, others = paired(model.train(training), plain, position, batch)
    for _ in range(2):
        found, wanted = (_results(one, batch, vectors) for one, vectors in ((model, own), (plain, others)))
        for name, one, other in zip(("output", "gradients"), found, wanted, strict=True):
            assert (one - other).norm() <= CLOSE * other.norm() + 1e-9, name
    return report


def fused_with(report: PatchReport) -> Counter[str | None]:
    return Counter(site.fused for site in report.sites)


def _results(model: nn.Module, batch: Any, vectors: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    output = _output(model, batch)
    pattern = torch.cos(torch.arange(output.numel())).view(output.shape)
    found = torch.autograd.grad((output * pattern).sum(), vectors, allow_unused=True)
    assert all(one is not None and one.any() for one in found), "a vector that changes nothing"
    return output.detach(), flat(found, vectors)


def _output(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        output = model(**batch)
    elif isinstance(batch, tuple):  # a dict among them is copied, since sentence-transformers writes into its argument
        output = model(*(dict(one) if isinstance(one, dict) else one for one in batch))
    else:
        output = model(batch)
    if isinstance(output, dict):  # diffusers, transformers, sentence-transformers
        return next(output[name] for name in ("sample", "logits", "sentence_embedding") if name in output)
    return output if isinstance(output, Tensor) else output[0]
