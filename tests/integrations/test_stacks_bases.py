"""Base models that are quantised, LoRA's, or offloaded: RED trains on them as the unfused composition does, and saves.

To the patch a base linear is a black box. What runs on a CPU runs here: bitsandbytes in 4 and 8 bits, torchao's int8
and float8. With a GPU the same tests run there.
"""

from __future__ import annotations

import copy

import model_zoo as zoo
import pytest
import torch
from stack_helpers import hold_vectors, listed, same_vectors, training
from torch import nn

import red_kernels as rk

WIDTH = 64  # a block of bitsandbytes
CHANGES = {
    "llama": {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH},
    "opt": {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 2 * WIDTH},
}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def four_bits(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    arguments = {"bias": linear.bias is not None, "compute_dtype": torch.float32, "quant_type": "nf4"}
    new = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, **arguments)
    new.load_state_dict(linear.state_dict())
    return new.to(linear.weight.device)


def eight_bits(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    arguments = {"bias": linear.bias is not None, "has_fp16_weights": False}
    new = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, **arguments)
    new.load_state_dict(linear.state_dict())
    return new.to(linear.weight.device)


def by_torchao(config):
    def quantise(linear):
        quantization = pytest.importorskip("torchao.quantization")
        holder = nn.Sequential(copy.deepcopy(linear))
        quantization.quantize_(holder, getattr(quantization, config)())
        assert type(holder[0].weight) is not nn.Parameter
        return holder[0]

    return quantise


WAYS = {
    "4 bits": four_bits,
    "8 bits": eight_bits,
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao float8": by_torchao("Float8WeightOnlyConfig"),
}


class InSingle(nn.Module):
    """A quantised layer in a model of float64: it is asked in float32, as in the models compared."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        return self.layer(hidden.float()).to(hidden.dtype)


def quantised(name, way, device):
    """A tiny model of quantised linears, the same with plain hooks, and that in float64 around those linears."""
    model = zoo.tiny(name, **CHANGES[name])
    model.to(device)
    values = {
        site: {part: value.to(device) for part, value in parts.items()}
        for site, parts in zoo.vectors(zoo.sites(name), WIDTH).items()
    }
    truth = zoo.exact(model, values)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "layers" in path:
            new = WAYS[way](linear).requires_grad_(False)
            model.set_submodule(path, new)
            wrapped = InSingle(copy.deepcopy(new))  # patching adds to the layer itself
            wrapped._forward_hooks = truth.model.get_submodule(path)._forward_hooks
            truth.model.set_submodule(path, wrapped)
    return model, values, zoo.Unfused(model, values), truth


def steps_of(name, model, optimizer, device, count=3):
    losses = []
    model.train()
    for step in range(count):
        batch = {key: value.to(device) for key, value in zoo.inputs(name, seed=step).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGES)
def test_quantised(name, way, device, tmp_path):
    model, values, unfused, truth = quantised(name, way, device)
    fresh = copy.deepcopy(model)
    kinds = {path: type(model.get_submodule(path)) for path in values}
    report = rk.patch(model)
    assert all(site.fused for site in report.sites), report
    zoo.fill(rk.edit_parameters(model), values)
    exact = torch.tensor(steps_of(name, truth.model, training(truth.vectors), device)).double()
    plain = torch.tensor(steps_of(name, unfused.model, training(unfused.vectors), device))
    losses = torch.tensor(steps_of(name, model, training(rk.edit_parameters(model)), device))
    zoo.assert_as_exact("losses", losses, plain, exact)
    hold_vectors(rk.edit_parameters(model), unfused.vectors, truth.vectors)

    rk.save_edits(model, tmp_path)
    rk.patch(fresh, rk.saved_config(tmp_path))
    rk.load_edits(fresh, tmp_path)
    assert same_vectors(model, fresh)
    rk.unpatch(model)
    assert {path: type(model.get_submodule(path)) for path in values} == kinds


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_and_red_trained_together(when, tmp_path):
    """Both train, in either order; each saves its own, and both together are the model that was trained."""
    peft = pytest.importorskip("peft")
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)

    def made():
        torch.manual_seed(1)
        model = zoo.tiny("llama")
        if when == "before":
            model = peft.get_peft_model(model, config)
            others = [own for own in model.parameters() if own.requires_grad]
            rk.patch(model)
            for own in others:
                own.requires_grad_(True)
        else:
            rk.patch(model)
            model = peft.get_peft_model(model, config)
            for own in listed(rk.edit_parameters(model)):
                own.requires_grad_(True)
        return model

    model = made()
    trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
    assert {name.split(".")[-2 if "red_edit" in name else -3] for name in trained} == {"red_edit", "lora_A", "lora_B"}
    start = {name: own.detach().clone() for name, own in trained.items()}
    losses = steps_of("llama", model, torch.optim.SGD(trained.values(), lr=0.05), "cpu", 5)
    assert not any(torch.equal(own, start[name]) for name, own in trained.items())
    assert losses[-1] != losses[0]

    rk.save_edits(model, tmp_path)
    lora = get_peft_model_state_dict(model)
    other = made()
    rk.load_edits(other, tmp_path)
    set_peft_model_state_dict(other, lora)
    batch = zoo.inputs("llama")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, other.eval()(**batch).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_on_an_offloaded_base(name, tmp_path):
    """The base's weights are on the meta device but while a layer runs; the vectors, patched in later, are here."""
    accelerate = pytest.importorskip("accelerate")
    model = zoo.tiny(name)
    values = zoo.vectors(zoo.sites(name))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    accelerate.cpu_offload(model, execution_device="cpu")
    rk.patch(model)
    zoo.fill(rk.edit_parameters(model), values)
    exact = torch.tensor(steps_of(name, truth.model, training(truth.vectors), "cpu")).double()
    plain = torch.tensor(steps_of(name, unfused.model, training(unfused.vectors), "cpu"))
    losses = torch.tensor(steps_of(name, model, training(rk.edit_parameters(model)), "cpu"))
    assert model.get_submodule(zoo.sites(name)[0]).weight.is_meta
    zoo.assert_as_exact("losses", losses, plain, exact)
    hold_vectors(rk.edit_parameters(model), unfused.vectors, truth.vectors)
    rk.save_edits(model, tmp_path)
    rk.patch(other := zoo.tiny(name))
    rk.load_edits(other, tmp_path)
    assert same_vectors(model, other)
