"""Merging edits into the weights: the same outputs, loaded by plain transformers, and taken back bit for bit."""

from __future__ import annotations

import copy

import model_zoo as zoo
import position_cases as cases
import pytest
import torch
import transformers
from patch_helpers import batch_for
from test_positions import peers
from torch import nn

import red_kernels as rk
from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.edits.module import RedEdit
from red_kernels.patching.patch import patch

BLOCKS = zoo.MIXTURES  # an FFN that is a block of experts has no weights to merge into
DENSE = tuple(name for name in zoo.NAMES if name not in BLOCKS)
# Families in which every edited layer has a bias, or an attribute of the config that gives it one.
WITH_BIASES = ("gpt2", "opt", "opt_post_norm", "bert", "roberta", "vit", "deberta_v2", "distilbert", "neox", "phi")
BY_FLAGS = {
    ("llama", "ffn"): {"mlp_bias": True},
    ("llama", "attn"): {"attention_bias": True},
    ("llama", "more"): {"mlp_bias": True, "attention_bias": True},
    ("qwen3", "attn"): {"attention_bias": True},
    ("gemma2", "attn"): {"attention_bias": True},
    ("falcon", "ffn_attn"): {"bias": True},
    ("modernbert", "ffn"): {"mlp_bias": True},
    ("modernbert", "more"): {"mlp_bias": True, "attention_bias": True},
}


def edited(name, position="ffn", kind="all", dtype=torch.float32, **changes):
    model = zoo.tiny(name, **changes).to(dtype)
    plain = copy.deepcopy(model)
    patch(model, RedConfig(position=position, kind=kind))
    values = cases.values(edit_parameters(model))
    zoo.fill(edit_parameters(model), values)
    return model, *peers(plain, name, position, values)


def logits(model, name):
    with torch.no_grad():
        return model(**batch_for(model, name)).logits


@pytest.mark.parametrize("kind", ["all", "scaling"])
@pytest.mark.parametrize("position", ["ffn", "more"])
@pytest.mark.parametrize("name", DENSE)
def test_the_merged_model_gives_the_same(name, position, kind):
    model, unfused, truth = edited(name, position, kind)
    rk.merge(model, loadable=False)
    assert not any(isinstance(module, RedEdit) or module._forward_hooks for module in model.modules())
    assert type(model) is type(unfused.model)
    zoo.assert_as_exact("logits", *(logits(one, name) for one in (model, unfused.model, truth.model)))


@pytest.mark.parametrize("position", ["res", "res_with_attn"])
@pytest.mark.parametrize("name", ["bert", "roberta", "deberta_v2", "distilbert"])
def test_behind_a_norm(name, position):
    model, unfused, truth = edited(name, position)
    report = rk.merge(model)
    assert all(site.module.lower().rpartition(".")[2].replace("_", "").endswith("norm") for site in report.sites)
    zoo.assert_as_exact("logits", *(logits(one, name) for one in (model, unfused.model, truth.model)))


def test_a_site_that_is_a_layer_norm():
    norm = nn.LayerNorm(8, bias=False)
    model = nn.Sequential(norm)
    patch(model, RedConfig(sites="0"))
    zoo.fill(edit_parameters(model), cases.values(edit_parameters(model)))
    edit, weight = (
        {part: own.detach() for part, own in edit_parameters(model)["0"].items()},
        norm.weight.detach().clone(),
    )
    rk.merge(model)
    assert torch.equal(norm.weight, edit["scale"] * weight)
    assert torch.equal(norm.bias, edit["bias"])
    x = torch.randn(3, 8)
    assert torch.equal(model(x), nn.functional.layer_norm(x, (8,), edit["scale"] * weight, edit["bias"], norm.eps))


def test_a_site_that_is_an_rms_norm():
    """It has no place for a bias."""
    norm = nn.RMSNorm(8)
    model = nn.Sequential(norm)
    patch(model, RedConfig(sites="0"))
    with pytest.raises(ValueError, match=r"0 is a RMSNorm, which has no bias; only edits of kind 'scaling'"):
        rk.merge(model)
    rk.unpatch(model)
    patch(model, RedConfig(sites="0", kind="scaling"))
    zoo.fill(edit_parameters(model), cases.values(edit_parameters(model)))
    scale, weight = edit_parameters(model)["0"]["scale"].detach(), norm.weight.detach().clone()
    rk.merge(model)
    assert torch.equal(norm.weight, scale * weight)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), nn.functional.rms_norm(x, (8,), scale * weight, norm.eps))


@pytest.mark.parametrize("name", WITH_BIASES)
def test_plain_transformers_loads_it(name, tmp_path):
    model, *_ = edited(name, "ffn_attn")
    before = model.config.to_dict()
    report = rk.merge(model)
    assert not report.config_changes
    assert not report.zero_biases
    assert model.config.to_dict() == before
    _same_when_loaded(model, name, tmp_path)


@pytest.mark.parametrize(("name", "position"), BY_FLAGS)
def test_plain_transformers_loads_it_by_attributes_of_the_config(name, position, tmp_path):
    model, *_ = edited(name, position)
    report = rk.merge(model)
    assert report.config_changes == BY_FLAGS[name, position]
    for path in report.zero_biases:
        assert not model.get_parameter(path).any()
    if name == "llama" and position == "ffn":
        assert len(report.zero_biases) == 2 * zoo.LAYERS  # gate_proj and up_proj
    assert "mlp_bias=True" in str(report) or "mlp_bias" not in report.config_changes
    _same_when_loaded(model, name, tmp_path)


def _same_when_loaded(model, name, folder):
    state = torch.get_rng_state()
    model.save_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)
    kind = getattr(transformers, type(model).__name__)
    loaded, loading = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded.eval(), name), logits(model, name))


@pytest.mark.parametrize(
    ("name", "position"), [("mistral", "ffn"), ("qwen2", "ffn"), ("qwen3", "ffn"), ("phi3", "ffn"), ("t5", "ffn")]
)
def test_no_place_for_a_bias(name, position, tmp_path):
    model, *_ = edited(name, position)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has no place for the biases.*bias.*loadable=False"):
        rk.merge(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    report = rk.merge(model, loadable=False)
    assert report.unplaced
    assert "will not load" in str(report)
    model, *_ = edited(name, position, "scaling")
    rk.merge(model)
    _same_when_loaded(model, name, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "position"), [("llama", "more"), ("gpt2", "more"), ("bert", "res"), ("t5", "ffn")])
def test_unmerge_brings_everything_back(name, position, dtype):
    model, *_ = edited(name, position, dtype=dtype)
    rk.add_edit(model, "other", copy_of="default")
    parameters = edit_parameters(model)
    objects = [vector for parts in parameters.values() for vector in parts.values()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    expected = logits(model, name)
    rk.merge(model, force=True, loadable=False)
    merged = logits(model, name)
    with pytest.raises(ValueError, match="not patched"):
        rk.merge(model)
    rk.unmerge(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config
    now = [vector for parts in edit_parameters(model).values() for vector in parts.values()]
    assert all(own is former for own, former in zip(now, objects, strict=True))
    assert rk.edit_names(model) == ("default", "other")
    assert torch.equal(logits(model, name), expected)
    rk.merge(model, force=True, loadable=False)
    assert torch.equal(logits(model, name), merged)


def test_a_copy_unmerges_by_itself():
    model, *_ = edited("gpt2")
    expected = logits(model, "gpt2")
    rk.merge(model)
    other = copy.deepcopy(model)
    rk.unmerge(other)
    assert torch.equal(logits(other, "gpt2"), expected)
    assert not any(isinstance(module, RedEdit) for module in model.modules())


def test_the_active_edit_is_merged():
    model, *_ = edited("bert")
    rk.add_edit(model, "identity")
    rk.switch_edit(model, "identity")
    assert rk.merge(model).edit == "identity"
    assert torch.equal(logits(model, "bert"), logits(zoo.tiny("bert"), "bert"))
    rk.unmerge(model)
    with rk.disable_edits(model), pytest.raises(ValueError, match="disabled"):
        rk.merge(model)


def test_an_edit_that_bfloat16_would_swallow():
    model = zoo.tiny("gpt2").to(torch.bfloat16)
    patch(model, RedConfig())
    with torch.no_grad():
        for parts in edit_parameters(model).values():
            parts["scale"].fill_(1.0005)  # a quarter of a step at 1
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"bfloat16 would swallow the edit at .*c_proj \(\d+% lost\).*force=True"):
        rk.merge(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    report = rk.merge(model, force=True)
    assert all(site.weight_error > 0.5 for site in report.sites)
    rk.unmerge(model)
    with torch.no_grad():
        for parts in edit_parameters(model).values():
            parts["scale"].fill_(1.1)
    assert all(0.0 < site.weight_error < 0.1 for site in rk.merge(model).sites)


def test_the_reported_error():
    linear = nn.Linear(3, 2, dtype=torch.bfloat16)
    model = nn.Sequential(linear)
    weight, bias = linear.weight.detach().double(), linear.bias.detach().double()
    patch(model, RedConfig(sites="0"))
    scale, shift = torch.tensor([1.3, -0.7]), torch.tensor([0.01, 2.0])
    zoo.fill(edit_parameters(model), {"0": {"scale": scale, "bias": shift}})
    (site,) = rk.merge(model, force=True).sites
    wanted = (scale[:, None] * weight.float()).double()
    lost = (linear.weight.detach().double() - wanted).norm() / (wanted - weight).norm()
    assert site.weight_error == pytest.approx(float(lost))
    wanted = (scale * bias.float() + shift).double()
    assert site.bias_error == pytest.approx(
        float((linear.bias.detach().double() - wanted).norm() / (wanted - bias).norm())
    )


def test_what_cannot_be_merged():
    for name, arguments, match in (
        ("llama", {"position": "res"}, "residual stream"),
        ("llama", {"position": "res_with_attn"}, "residual stream"),
        ("bert", {"kind": "ln"}, "kind 'ln'"),
        ("mixtral", {}, r"layers.0.mlp is a MixtralSparseMoeBlock without its own weight matrix.*experts"),
    ):
        model = zoo.tiny(name)
        patch(model, RedConfig(**arguments))
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=match):
            rk.merge(model)
        assert list(model.state_dict()) == keys


def test_weights_that_cannot_be_scaled():
    def quantised(linear):
        linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)

    def shared(linear):
        model.model.layers[0].mlp.down_proj.weight = linear.weight

    def subclass(linear):
        class Packed(nn.Parameter):
            pass

        linear.weight = Packed(linear.weight.detach())

    def offloaded(linear):
        linear.to("meta")

    for change, match in (
        (quantised, "int8: quantised"),
        (shared, "share one Parameter"),
        (subclass, "Packed of torch.float32: quantised"),
        (offloaded, "meta device"),
    ):
        model = zoo.tiny("llama")
        patch(model, RedConfig())
        change(model.model.layers[1].mlp.down_proj)
        with pytest.raises(ValueError, match=match):
            rk.merge(model)
        assert len(edit_parameters(model)) == zoo.LAYERS


@pytest.mark.parametrize("by", ["bitsandbytes", "torchao"])
def test_quantised_bases(by):
    model = zoo.tiny("llama")
    layer = model.model.layers[0].mlp
    if by == "bitsandbytes":
        bnb = pytest.importorskip("bitsandbytes")
        packed = bnb.nn.Linear8bitLt(zoo.INNER, zoo.HIDDEN, bias=False, has_fp16_weights=False)
        packed.weight = bnb.nn.Int8Params(layer.down_proj.weight.detach(), has_fp16_weights=False, requires_grad=False)
        layer.down_proj = packed
    else:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    patch(model, RedConfig())
    weight = layer.down_proj.weight
    with pytest.raises(ValueError, match=r"down_proj.weight is a .*quantised.*load the base model in bfloat16"):
        rk.merge(model)
    assert layer.down_proj.weight is weight


def test_lora_on_the_site():
    peft = pytest.importorskip("peft")
    model = zoo.tiny("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"]))
    patch(model, RedConfig())
    with pytest.raises(ValueError, match="LoRA"):
        rk.merge(model)


class Bent(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


def test_layers_that_do_more_than_a_linear_layer():
    def replaced(linear):
        former = linear.forward
        linear.forward = lambda x: former(x).relu()

    def of_another_class(linear):
        linear.__class__ = Bent

    def hooked(linear):
        linear.register_forward_hook(lambda module, args, output: output.relu(), prepend=True)

    for change, match in (
        (replaced, "the forward of 0, a Linear, may compute more than"),
        (of_another_class, "the forward of 0, a Bent, may compute more than"),
        (hooked, "forward hook that runs before the edit"),
    ):
        model = nn.Sequential(nn.Linear(4, 4))
        patch(model, RedConfig(sites="0"))
        zoo.fill(edit_parameters(model), cases.values(edit_parameters(model)))
        change(model[0])
        weight = model[0].weight.clone()
        with pytest.raises(ValueError, match=match):
            rk.merge(model)
        assert torch.equal(model[0].weight, weight)
        assert edit_parameters(model)


def test_a_hook_behind_the_edit():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, output: output.relu())
    patch(model, RedConfig(sites="0"))
    zoo.fill(edit_parameters(model), cases.values(edit_parameters(model)))
    edit = {part: own.detach() for part, own in edit_parameters(model)["0"].items()}
    weight, bias = edit["scale"][:, None] * model[0].weight, edit["scale"] * model[0].bias + edit["bias"]
    rk.merge(model)
    x = torch.randn(3, 4)
    assert torch.equal(model(x), nn.functional.linear(x, weight, bias).relu())


def test_square_weights_that_lie_the_other_way():
    """GPT-2's are (in, out); nothing but the class tells it where both are as wide."""
    model, unfused, truth = edited("gpt2", "ffn_attn", n_inner=zoo.HIDDEN)
    rk.merge(model)
    zoo.assert_as_exact("logits", *(logits(one, "gpt2") for one in (model, unfused.model, truth.model)))


def test_lora_put_on_after_patching():
    peft = pytest.importorskip("peft")
    model, *_ = edited("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(model, "llama")
    rk.merge(model)
    assert model.config.mlp_bias
    torch.testing.assert_close(logits(model, "llama"), expected)
    rk.unmerge(model)
    assert not model.config.mlp_bias
    assert not [name for name, _ in model.named_parameters() if name.endswith(".bias") and "red_edit" not in name]
    assert torch.equal(logits(model, "llama"), expected)
    model, *_ = edited("llama")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["down_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"down_proj.base_layer had another name when it was patched.*DoRA"):
        rk.merge(model)


def test_errors_of_unmerge():
    model, *_ = edited("bert")
    with pytest.raises(ValueError, match="was not merged"):
        rk.unmerge(model)
    rk.merge(model, keep_original=False)
    with pytest.raises(ValueError, match="keep_original"):
        rk.unmerge(model)
    model, *_ = edited("bert")
    rk.merge(model)
    merged = logits(model, "bert")
    layers = model.bert.encoder.layer
    layers.append(copy.deepcopy(layers[0]))
    with pytest.raises(ValueError, match=r"layer.3.output.dense came or went since"):
        rk.unmerge(model)
    del layers[-1]
    assert torch.equal(logits(model, "bert"), merged)
    rk.unmerge(model)
    rk.merge(model)
    patch(model, RedConfig())
    with pytest.raises(ValueError, match="is patched"):
        rk.unmerge(model)
    rk.unpatch(model)
    model.half()
    with pytest.raises(ValueError, match=r"float16.*expected torch.float32"):
        rk.unmerge(model)
