"""A patched model under DDP and FSDP2 on two processes, and under accelerate's device map and offloading."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
import torch.distributed
from patch_helpers import loss_and_backward, patched_and_peer, watching
from two_processes import run_pair

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import patch


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes():
    """DDP, and FSDP2 around each layer and around the whole; one pair of processes, as these take long to start."""
    run_pair("distributed_worker.py")


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_accelerate_offload(name, when, offload, tmp_path, monkeypatch):
    """Offloaded weights are on the meta device until accelerate's hooks bring them: those must fire."""
    accelerate = pytest.importorskip("accelerate")
    model = zoo.tiny(name)
    values = zoo.vectors(zoo.sites(name))
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)

    def dispatch():
        if offload == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")

    if when == "before":
        dispatch()
    report = patch(model, RedConfig())
    parameters = edit_parameters(model)
    zoo.fill(parameters, values)
    if when == "after":
        dispatch()
        assert all(value.is_meta for parts in edit_parameters(model).values() for value in parts.values())
    else:
        assert not any(value.is_meta for parts in parameters.values() for value in parts.values())
    watch = watching(monkeypatch)
    with torch.no_grad():
        found = model(**zoo.inputs(name)).logits
        zoo.assert_as_exact(
            "logits", found, unfused.model(**zoo.inputs(name)).logits, truth.model(**zoo.inputs(name)).logits
        )
    assert not watch.left
    if name != "bert":  # there torch's own function is called with the sum, when its weights have been brought
        assert not any("Norm" in (site.fused or "") for site in report.sites), "accelerate brings the norms' weights"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_accelerate_hooks(name, when, monkeypatch):
    """Hooks that align devices, as dispatch_model puts on the modules of a device map; training goes through them."""
    hooks = pytest.importorskip("accelerate.hooks")

    def dispatch(model):
        for module in model.modules():
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))

    if when == "after":
        model, unfused, truth = patched_and_peer(name)
        dispatch(model)
    else:
        model = zoo.tiny(name)
        values = zoo.vectors(zoo.sites(name))
        unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
        dispatch(model)
        patch(model, RedConfig())
        zoo.fill(edit_parameters(model), values)
    watch = watching(monkeypatch)
    results = [loss_and_backward(one, zoo.inputs(name))["logits"] for one in (model, unfused.model, truth.model)]
    zoo.assert_as_exact("logits", *results)
    found, plain, exact = zoo.gradients(edit_parameters(model)), unfused.gradients(), truth.gradients()
    assert found.keys() == exact.keys()
    for key in exact:
        zoo.assert_as_exact(key, found[key], plain[key], exact[key])
    assert watch.taken == watch.left


def test_accelerate_device_map(tmp_path, monkeypatch):
    """Layers on the CPU and on disk by a device map compute what they did."""
    accelerate = pytest.importorskip("accelerate")
    model, unfused, truth = patched_and_peer("llama")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    watch = watching(monkeypatch)
    with torch.no_grad():
        found, plain, exact = (one(**zoo.inputs("llama")).logits for one in (model, unfused.model, truth.model))
    zoo.assert_as_exact("logits", found, plain, exact)
    assert watch.taken == watch.left
    on_disk = [site for site, parts in edit_parameters(model).items() if any(v.is_meta for v in parts.values())]
    assert on_disk == ["model.layers.1.mlp.down_proj"]
