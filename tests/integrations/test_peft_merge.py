"""Merging under PEFT, what is refused, the method's place in PEFT, and training."""

from __future__ import annotations

import copy
import enum
import sys

import model_zoo as zoo
import peft
import pytest
import torch
import transformers
from peft import PeftConfig, get_peft_model
from peft import mapping as peft_mapping
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import Trainer, TrainingArguments

import red_kernels as rk
from red_kernels.integrations.peft import RedLayer, RedModel, RedPeftConfig, RedPeftType, register

ROOT = "base_model.model."


def edited(module, adapters=({},), **arguments):
    """One module under PEFT, with random vectors; the module, and the vectors by adapter."""
    torch.manual_seed(1)
    model = None
    for at, more in enumerate(adapters):
        config = RedPeftConfig(target_modules=["0"], init_weights=False, **arguments, **more)
        if model is None:
            model = get_peft_model(nn.Sequential(module), config, f"a{at}").eval()
        else:
            model.add_adapter(f"a{at}", config)
    layer = model.base_model.model[0]
    return model, layer, [layer.red_edit[f"a{at}"] for at in range(len(adapters))]


def rms_norm(name="llama"):
    norm = copy.deepcopy(next(m for m in zoo.tiny(name).modules() if type(m).__name__.endswith("RMSNorm")))
    return norm.requires_grad_(False)


MODULES = {
    "linear": (lambda: nn.Linear(6, 32), 6),
    "no bias": (lambda: nn.Linear(6, 32, bias=False), 6),
    "Conv1D": (lambda: transformers.pytorch_utils.Conv1D(32, 6), 6),
    "LayerNorm": (lambda: nn.LayerNorm(32), 32),
    "LayerNorm without bias": (lambda: nn.LayerNorm(32, bias=False), 32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_merged_is_rounded_once_and_unmerged_exact(name, dtype):
    make, width = MODULES[name]
    module = make().to(dtype)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    model, layer, (first, second) = edited(module, ({}, {}))
    with torch.no_grad():
        unmerged = [model(torch.randn(3, width).to(dtype))]
        model.merge_adapter(["a0"])
        model.merge_adapter(["a1"])
    assert layer.merged_adapters == ["a0", "a1"]
    scale = (second.scale * first.scale).detach()
    bias = (second.scale * first.bias + second.bias).detach()
    by_row = scale[:, None] if isinstance(module, nn.Linear) else scale
    assert torch.equal(module.weight, (by_row * state["weight"].float()).to(dtype))
    own = state.get("bias", torch.zeros(32, dtype=dtype)).float()
    assert torch.equal(module.bias, (scale * own + bias).to(dtype))
    assert unmerged[0].dtype == dtype
    model.unmerge_adapter()
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert not layer.merged


def test_merged_one_after_the_other_and_disabled():
    model, layer, _ = edited(nn.Linear(4, 8), ({}, {"kind": "scaling"}))
    x = torch.randn(3, 4)
    before = layer.base_layer(x)
    model.merge_adapter(["a0"])
    with pytest.warns(UserWarning, match="additionally merging a1"):
        model.merge_adapter(["a1"])
    assert layer.merged_adapters == ["a0", "a1"]
    assert not torch.equal(model(x), before)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    assert not layer.merged  # as PEFT's other methods do it


def test_a_norm_with_an_offset():
    norm = rms_norm("gemma2")
    model, _, (edit,) = edited(norm, kind="scaling")
    weight = norm.weight.clone()
    merged = model.merge_and_unload()
    assert merged[0] is norm
    assert torch.equal(norm.weight, edit.scale * (weight + 1.0) - 1.0)


def test_embeddings():
    embedding = nn.Embedding(5, 8)
    state = embedding.weight.clone()
    model, layer, (edit,) = edited(embedding)
    ids = torch.tensor([[0, 4]])
    assert torch.equal(model(ids), layer.red_edit(embedding(ids)))
    merged = model.merge_and_unload()
    assert torch.equal(merged[0].weight, state * edit.scale + edit.bias)


def _quantised():
    module = nn.Linear(4, 8)
    module.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.int8), requires_grad=False)
    return module


class _Own(nn.Module):
    out_features = 8

    def forward(self, x):
        return x @ torch.ones(4, 8)


class _Bent(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class _Scaled(nn.Embedding):
    def forward(self, ids):
        return 2.0 * super().forward(ids)


@pytest.mark.parametrize(
    ("module", "arguments", "error"),
    [
        (_quantised, {}, "int8"),
        (_Own, {}, "not a known layer type"),
        (lambda: _Scaled(4, 8), {}, "not a known layer type"),
        (lambda: _Bent(4, 8), {}, "not a known layer type"),
        (lambda: nn.Linear(4, 8), {"kind": "ln"}, "of kind 'ln'"),
        (rms_norm, {}, "no bias"),
    ],
)
def test_not_merged(module, arguments, error):
    module = nn.Sequential(nn.Linear(4, 4), module())
    torch.manual_seed(1)
    config = RedPeftConfig(target_modules=["0", "1"], init_weights=False, **arguments)
    model = get_peft_model(module, config)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=error):
            merge()
        assert model.state_dict().keys() == state.keys()  # the first layer could have been merged
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, RedLayer))


def test_safely_merged():
    model, layer, (edit,) = edited(nn.Linear(4, 8))
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        edit.scale[0] = torch.inf
    with pytest.raises(ValueError, match="a0 seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


@pytest.mark.parametrize(("name", "position"), [("llama", "ffn"), ("llama", "attn"), ("gpt2", "more"), ("bert", "ffn")])
def test_merged_model_is_loaded_by_plain_transformers(name, position, tmp_path):
    config = RedPeftConfig(position=position, layers_to_transform=[1], init_weights=False)
    model = get_peft_model(zoo.tiny(name), config).eval()
    merged = model.merge_and_unload()
    assert not any(isinstance(module, RedLayer) for module in merged.modules())
    merged.save_pretrained(tmp_path)
    loaded, report = type(zoo.tiny(name)).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    batch = zoo.inputs(name)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, merged(**batch).logits)
        assert not torch.equal(merged(**batch).logits, zoo.tiny(name)(**batch).logits)


def test_a_bias_without_a_place_is_said():
    model = get_peft_model(zoo.tiny("qwen2"), RedPeftConfig(init_weights=False))
    with pytest.warns(UserWarning, match=r"no place for the biases .*layers\.0\.mlp\.down_proj\.bias"):
        model.merge_and_unload()


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.pair = nn.LSTM(8, 8)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("model", "arguments", "error"),
    [
        (lambda: zoo.tiny("llama"), {"position": "res"}, r"position: 'res' .*PEFT cannot wrap"),
        (lambda: zoo.tiny("mixtral"), {}, r"position: 'ffn' .*PEFT cannot wrap"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "lacks sites of position 'ffn': no repeated layers were found"),
        (_Attention, {"target_modules": ["out_proj"]}, "never be applied"),
        (_Attention, {"target_modules": ["pair"]}, "target_modules: 'pair' is a LSTM"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2)), {"target_modules": ["0", "1"]}, "'1' is a LSTM"),
        (lambda: zoo.tiny("llama"), {"layers_to_transform": [7]}, "layers: .7. are not in"),
    ],
)
def test_refused(model, arguments, error):
    model = model()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=error):
        get_peft_model(model, RedPeftConfig(**arguments))
    assert [type(module) for module in model.modules()] == modules
    assert all(value.requires_grad for value in model.parameters())


def test_a_patched_model_is_refused():
    model = zoo.tiny("llama")
    rk.patch(model)
    with pytest.raises(ValueError, match="patched already"):
        get_peft_model(model, RedPeftConfig())
    with pytest.raises(ValueError, match="already patched"):
        rk.patch(get_peft_model(zoo.tiny("llama"), RedPeftConfig()))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"position": "everywhere"}, "position: got 'everywhere'"),
        ({"kind": "none"}, "kind: got 'none'"),
        ({"vector_dtype": "int8"}, "vector_dtype: got 'int8'"),
        ({"layers_pattern": "h"}, "layers_pattern"),
        ({"layers_to_transform": [-1]}, "layers"),
        ({"layers_to_transform": [1], "target_modules": ".*"}, "layers_to_transform"),
    ],
)
def test_wrong_configs(arguments, error):
    with pytest.raises(ValueError, match=error):
        RedPeftConfig(**arguments)


@pytest.mark.parametrize("name", ["a.b", "red_edit", "applied", "keys", "scale", "training"])
def test_wrong_adapter_names(name):
    with pytest.raises(ValueError, match="adapter_name: got"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), RedPeftConfig(target_modules=["0"]), name)


def test_a_config_goes_through_a_file(tmp_path):
    config = RedPeftConfig(position="more", kind="scaling", layers_to_transform=[1], vector_dtype="bfloat16")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is RedPeftConfig
    assert loaded == config
    assert loaded.peft_type is RedPeftType.RED


def test_nothing_of_peft_is_replaced():
    assert "RED" not in peft.PeftType.__members__
    assert RedPeftType.RED == "RED"
    assert peft_mapping.PEFT_TYPE_TO_TUNER_MAPPING["RED"] is RedModel
    before = dict(peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert before == peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_peft_that_has_a_red_of_its_own(monkeypatch):
    other = enum.Enum("Other", ["RED"])
    monkeypatch.setitem(peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "RED", other)
    with pytest.raises(ImportError, match="a method 'RED' of its own"):
        register()
    assert peft_mapping.PEFT_TYPE_TO_CONFIG_MAPPING["RED"] is other


@pytest.mark.parametrize(
    ("where", "name"), [(peft_mapping, "PEFT_TYPE_TO_PREFIX_MAPPING"), (BaseTuner, "_get_adapter_state_dict")]
)
def test_a_peft_without_what_is_needed(where, name, monkeypatch):
    monkeypatch.delattr(where, name)
    with pytest.raises(ImportError, match=rf"has no .*{name}"):
        register()


def test_without_peft(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("red_kernels.integrations.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match="pip install 'peft"):
        import red_kernels.integrations.peft  # noqa: F401


def test_a_quantised_base(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = zoo.tiny("llama")
    quantised = copy.deepcopy(plain)
    for layer in quantised.model.layers:
        held = layer.mlp.down_proj
        layer.mlp.down_proj = bitsandbytes.nn.Linear4bit(held.in_features, held.out_features, bias=False)
        layer.mlp.down_proj.load_state_dict(held.state_dict())
    quantised.to("cpu")
    model = get_peft_model(quantised, RedPeftConfig(init_weights=False))
    with pytest.raises(ValueError, match=r"down_proj: base_layer: .*Linear4bit, whose weight is .*uint8"):
        model.merge_adapter()
    model(**zoo.inputs("llama")).loss.backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if "red_edit" in name)


def test_trainer(tmp_path):
    batch = {key: value.repeat(4, 1) for key, value in zoo.inputs("llama").items()}
    rows = [{key: value[at] for key, value in batch.items()} for at in range(8)]
    losses = []
    for under_peft in (False, True):
        model = zoo.tiny("llama")
        if under_peft:
            model = get_peft_model(model, RedPeftConfig(task_type="CAUSAL_LM"))
        else:
            rk.patch(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, learning_rate=0.05, logging_steps=1,
            save_strategy="no", report_to=[], seed=0, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        vectors = {site.removeprefix(ROOT): parts for site, parts in rk.edit_parameters(model).items()}
        losses.append([vector.detach() for parts in vectors.values() for vector in parts.values()])
    assert losses[0] == losses[2]
    assert losses[0][-1] < losses[0][0]
    assert all(torch.equal(plain, own) for plain, own in zip(losses[1], losses[3], strict=True))
