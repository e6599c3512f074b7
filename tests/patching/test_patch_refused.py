"""What a patch refuses, by clear errors and before anything is changed; and mixtures of experts."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
import transformers
from patch_helpers import batch_for, loss_and_backward, refused
from torch import nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.patching.patch import edit_config, patch, unpatch


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"position": "mlp"}, ValueError, "position: got 'mlp', supported: 'ffn', 'attn', 'ffn_attn', 'res'"),
        ({"position": None}, ValueError, "position"),
        ({"kind": "norm"}, ValueError, "kind: got 'norm', supported: 'all', 'scaling', 'bias', 'ln'"),
        ({"kind": ["all"]}, ValueError, "kind"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
        ({"dtype": torch.float8_e4m3fn}, ValueError, "dtype"),
        ({"dtype": "float32"}, ValueError, "dtype"),
        ({"layers": []}, ValueError, "got no layer"),
        ({"layers": range(0)}, ValueError, "got no layer"),
        ({"layers": [-1]}, ValueError, "indices from 0"),
        ({"layers": [1, 1]}, ValueError, "each layer once"),
        ({"layers": 3}, TypeError, "a range or a list"),
        ({"layers": "1"}, TypeError, "a range or a list"),
        ({"layers": [1.0]}, TypeError, "integers"),
        ({"layers": [True]}, TypeError, "integers"),
        ({"sites": []}, ValueError, "sites: got"),
        ({"sites": ""}, ValueError, "sites: got"),
        ({"sites": [3]}, ValueError, "sites: got"),
        ({"sites": "*", "layers": [1]}, ValueError, "got both"),
    ],
)
def test_wrong_configurations(arguments, error, match):
    with pytest.raises(error, match=match):
        RedConfig(**arguments)


def test_configurations_are_values():
    assert RedConfig(layers=range(2)) == RedConfig(layers=[1, 0])
    assert hash(RedConfig(layers=range(2))) == hash(RedConfig(layers=(0, 1)))
    assert RedConfig(sites="a.*").sites == ("a.*",)
    with pytest.raises(AttributeError):
        RedConfig().kind = "bias"


def test_wrong_arguments():
    with pytest.raises(TypeError, match="model: got dict"):
        patch({}, RedConfig())
    refused(zoo.tiny("llama"), {"kind": "all"}, "config: got dict", TypeError)


def test_patching_twice():
    model = zoo.tiny("llama")
    patch(model, RedConfig(layers=[0]))
    with pytest.raises(ValueError, match="already patched"):
        patch(model, RedConfig(layers=[1]))
    assert list(edit_parameters(model)) == zoo.sites("llama")[:1]


def test_not_patched():
    model = zoo.tiny("llama")
    for function in (unpatch, edit_config, edit_parameters):
        with pytest.raises(ValueError, match="LlamaForCausalLM is not patched"):
            function(model)


def test_a_model_without_sites():
    refused(
        nn.Sequential(nn.Linear(3, 3)),
        RedConfig(),
        r"Sequential lacks sites of position 'ffn': no repeated layers .* no FFN with a last projection.*sites=",
    )
    refused(nn.Identity(), RedConfig(), "linear layers are none")


def test_layers_without_what_a_position_edits():
    model = nn.ModuleList(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "norm": nn.LayerNorm(8)}) for _ in "ab")
    refused(model, RedConfig(), r"ModuleList lacks .*the 2 layers that were found \(ModuleDict\) have no FFN.*sites=")


def test_layers_out_of_range():
    refused(zoo.tiny("llama"), RedConfig(layers=[1, 7]), r"layers: \[7\] are not in this LlamaForCausalLM.*0 to 2")
    # The decoder has one layer less: 2 is in the encoder.
    model = zoo.tiny("t5")
    assert [site.site for site in patch(model, RedConfig(layers=[2])).sites] == [zoo.sites("t5")[2]]
    refused(zoo.tiny("t5"), RedConfig(layers=[3]), "0 to 2")


def olmoe():
    config = transformers.OlmoeConfig(
        vocab_size=zoo.VOCABULARY, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(config).eval()
    model.set_experts_implementation("eager")
    return model


def test_experts_in_one_parameter_are_named():
    model = olmoe()
    experts = [name for name, module in model.named_modules() if name.endswith("experts")]
    assert len(experts) == 2
    refused(model, RedConfig(sites="*.experts"), f"'{experts[0]}' is a .*3-D Parameter in {experts[0]}")
    with pytest.warns(UserWarning, match=f"not edited.*{experts[0]}, {experts[1]}"):
        report = patch(model, RedConfig(sites="*.o_proj"))
    assert "warning: not edited" in str(report)


def test_experts_in_one_parameter_are_edited_as_a_block():
    model = olmoe()
    values = zoo.vectors(["model.layers.0.mlp", "model.layers.1.mlp"])
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    report = patch(model, RedConfig())
    assert [site.site for site in report.sites] == list(values)
    assert all("whole block of experts" in site.reason for site in report.sites)
    zoo.fill(edit_parameters(model), values)
    for _ in range(2):
        results = [loss_and_backward(one, batch_for(one, "llama")) for one in (model, unfused.model, truth.model)]
        zoo.assert_as_exact("logits", *(result["logits"] for result in results))
    found, plain, exact = zoo.gradients(edit_parameters(model)), unfused.gradients(), truth.gradients()
    for key in exact:
        zoo.assert_as_exact(key, found[key], plain[key], exact[key])


class Mixture(nn.Module):
    """A user's own mixture: one Parameter for all experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Module()
        self.experts.down_proj = nn.Parameter(torch.randn(4, zoo.HIDDEN, zoo.HIDDEN) * 0.1)

    def forward(self, x):
        return x @ self.experts.down_proj.sum(0)


def test_experts_in_one_of_the_layers_are_edited_as_a_block():
    model = zoo.tiny("llama")
    model.model.layers[1].mlp = Mixture()
    sites = [zoo.sites("llama")[0], "model.layers.1.mlp", zoo.sites("llama")[2]]
    values = zoo.vectors(sites)
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    report = patch(model, RedConfig())
    assert [site.site for site in report.sites] == sites
    assert ["whole block of experts" in site.reason for site in report.sites] == [False, True, False]
    zoo.fill(edit_parameters(model), values)
    results = [loss_and_backward(one, batch_for(one, "llama"))["logits"] for one in (model, unfused.model, truth.model)]
    zoo.assert_as_exact("logits", *results)


def test_wrapped_for_distributed_training():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    refused(
        DistributedDataParallel(zoo.tiny("llama")), RedConfig(), "DistributedDataParallel around it.*before wrapping"
    )

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    refused(DeepSpeedEngine(zoo.tiny("llama")), RedConfig(), "DeepSpeedEngine around it.*before wrapping")


# Unknown layouts: unfused, and named.
