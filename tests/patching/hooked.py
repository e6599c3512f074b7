"""A patched model and its peer: the same model with the same edits as plain forward hooks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.naive import naive_edit
from red_kernels.patching.patch import patch
from red_kernels.patching.report import PatchReport


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
