"""Training: a patched model learns what RED composed naively, from the paper's formula, learns."""

from __future__ import annotations

import copy

import model_zoo as zoo
import pytest
import torch
from torch import nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch

STEPS = 50
PUBLISHED_RATE = 2e-5  # with which the authors trained Llama-2


def naive(model, sites, dtype):
    """`y = scale * h + bias` behind each site, the vectors in `dtype`; as the authors' wrapper does it."""
    model.requires_grad_(False)
    vectors = {}
    for site in sites:
        scale = nn.Parameter(torch.ones(zoo.HIDDEN, dtype=dtype))
        bias = nn.Parameter(torch.zeros(zoo.HIDDEN, dtype=dtype))
        vectors[site] = {"scale": scale, "bias": bias}
        model.get_submodule(site).register_forward_hook(lambda module, args, h, s=scale, b=bias: s * h + b)
    return vectors


def train(name, model, vectors, rate):
    """A loss for each step, each on a batch of its own."""
    optimizer = torch.optim.AdamW(
        [vector for parts in vectors.values() for vector in parts.values()], lr=rate, weight_decay=0.0
    )
    losses = []
    model.train()  # the tiny models have no dropout: the masks of the two runs would differ
    for step in range(STEPS):
        loss = model(**zoo.inputs(name, seed=100 + step % 5, batch=4, length=8)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "t5"])
def test_fifty_steps_as_composed_naively(name):
    base = zoo.tiny(name)
    other = copy.deepcopy(base)
    patch(base, RedConfig())
    found = edit_parameters(base)
    wanted = naive(other, zoo.sites(name), torch.float32)
    losses, wanted_losses = train(name, base, found, 1e-3), train(name, other, wanted, 1e-3)
    assert wanted_losses[-1] < wanted_losses[0]
    torch.testing.assert_close(losses, wanted_losses, atol=1e-5, rtol=0.0)
    assert found.keys() == wanted.keys()
    for site, parts in wanted.items():
        for part, vector in parts.items():
            torch.testing.assert_close(found[site][part], vector, atol=1e-4, rtol=0.0, msg=f"{site}.{part}")
            assert not torch.equal(vector, torch.full_like(vector, float(part == "scale")))


@pytest.mark.parametrize("name", ["llama", "gpt2", "roberta", "t5"])
def test_scales_move_in_a_bf16_model(name):
    """An update of the published size is lost in a bf16 scale, as in the published checkpoint; in fp32 it is not."""
    base = zoo.tiny(name).bfloat16()
    other = copy.deepcopy(base)
    patch(base, RedConfig())
    found = edit_parameters(base)
    original = naive(other, zoo.sites(name), torch.bfloat16)
    train(name, base, found, PUBLISHED_RATE)
    train(name, other, original, PUBLISHED_RATE)
    for site, parts in found.items():
        assert parts["scale"].dtype == torch.float32
        assert int((parts["scale"] != 1.0).sum()) > 0.9 * zoo.HIDDEN
        assert int((parts["bias"] != 0.0).sum()) > 0.9 * zoo.HIDDEN
        assert bool((original[site]["scale"] == 1.0).all())
        assert int((original[site]["bias"] != 0.0).sum()) > 0.9 * zoo.HIDDEN
