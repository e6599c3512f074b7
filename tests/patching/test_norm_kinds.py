"""What norms compute, by trial: of which kind a norm is, whatever its name is and wherever it is asked."""

from __future__ import annotations

import pytest
import torch
from norm_examples import MATCHES, REFUSED, WIDTH, lazy
from torch import nn
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from red_kernels.fusion import norm_kinds
from red_kernels.fusion.norm_kinds import could_be_norm, norm_spec


@pytest.fixture(autouse=True)
def _untried(monkeypatch):
    """Each test tries for itself."""
    monkeypatch.setattr(norm_kinds, "_specs", {})


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
