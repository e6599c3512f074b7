"""Layers whose structure misleads, and what describes them; the counts of trained parameters of real models."""

from __future__ import annotations

import copy
import pickle

import model_zoo as zoo
import position_cases as cases
import pytest
import tiny_folders
import torch
import toy_family as toy
import toy_kinds
import transformers

import red_kernels as rk
from red_kernels import models
from red_kernels.cli import main
from red_kernels.models import Family


@pytest.fixture
def registered(families):
    with pytest.warns(DeprecationWarning, match="register_family is deprecated: sites are found by structure"):
        toy.register()


def run(model, x):
    output = model(x)
    (output * torch.linspace(-1, 1, toy.WIDTH, dtype=x.dtype)).sum().backward()
    return output.detach()


def sites_of(model, position):
    return [site.site for site in rk.patch(model, rk.RedConfig(position=position)).sites]


def test_the_structure_misleads():
    assert sites_of(toy.model(), "ffn") == [
        f"layers.{at}.{name}" for at in range(toy.LAYERS) for name in ("narrow", "down")
    ]
    with pytest.raises(ValueError, match="no attention with an output projection"):
        rk.patch(toy.model(), rk.RedConfig(position="attn"))


WANTED = {"ffn": ["down"], "attn": ["mixer"], "ffn_attn": ["mixer", "down"], "res": [""]}


@pytest.mark.parametrize("position", WANTED)
@pytest.mark.parametrize("kind", ["all", "ln"])
def test_it_is_the_composition(kind, position, registered):
    plain = toy.model()
    model = copy.deepcopy(plain)
    x = torch.randn(2, 5, toy.WIDTH)
    report = rk.patch(model, rk.RedConfig(position=position, kind=kind), example=(x,))
    values = cases.values(rk.edit_parameters(model))
    assert list(values) == [f"layers.{at}.{path}".rstrip(".") for at in range(toy.LAYERS) for path in WANTED[position]]
    zoo.fill(rk.edit_parameters(model), values)
    unfused, truth = zoo.Unfused(plain, values), zoo.exact(plain, values)
    for _ in range(2):
        found, peer, exact = run(model, x), run(unfused.model, x), run(truth.model, x.double())
        zoo.assert_as_exact("output", found, peer, exact)
        own, others, wanted = zoo.gradients(rk.edit_parameters(model)), unfused.gradients(), truth.gradients()
        assert own.keys() == wanted.keys()
        for key in own:
            zoo.assert_as_exact(key, own[key], others[key], wanted[key])
        last = f"layers.{toy.LAYERS - 1}"  # behind which no norm stands
        for site in report.sites:
            expected = "" if position == "res" else "residual add"
            if site.site.endswith("mixer") or not site.site.startswith(last):
                norm = "LayerNorm" if site.site.endswith("mixer") else "next layer's LayerNorm"
                expected = f"{expected} + {norm}" if expected else norm
            assert (site.fused or "") == (expected if kind == "all" else ""), site


def test_a_subclass_is_found_by_its_base(registered):
    class Mine(toy.ToyLayer):
        def forward(self, x):
            return super().forward(x) + 1.0

    model = toy.model()
    for layer in model.layers:
        layer.__class__ = Mine
    assert sites_of(model, "attn") == [f"layers.{at}.mixer" for at in range(toy.LAYERS)]


def test_a_place_that_the_family_lacks(registered):
    model = toy.model()
    with pytest.raises(ValueError, match=r"lacks sites of position 'more': .* no query, key or value projection"):
        rk.patch(model, rk.RedConfig(position="more"))
    assert not any(hasattr(module, "red_edit") for module in model.modules())


def test_pickle_copy_and_unpatch(registered):
    model = toy.model()
    base = copy.deepcopy(model)
    rk.patch(model, rk.RedConfig(position="ffn_attn"))
    zoo.fill(rk.edit_parameters(model), cases.values(rk.edit_parameters(model)))
    x = torch.randn(2, 5, toy.WIDTH)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(x), model(x))
        assert type(other.layers[0]).__name__ == "ToyLayer"
        rk.unpatch(other)
        assert type(other.layers[0]) is toy.ToyLayer
        assert torch.equal(other(x), base(x))


def test_rows_of_a_batch(registered):
    model = toy.model()
    rk.patch(model)
    rk.add_edit(model, "a")
    zoo.fill(rk.edit_parameters(model, "a"), cases.values(rk.edit_parameters(model, "a")))
    x = torch.randn(3, 5, toy.WIDTH)
    with torch.no_grad(), rk.use_edits(model, ["a", "default", None]):
        found = model(x)
    with torch.no_grad():
        base = model(x)
        rk.switch_edit(model, "a")
        edited = model(x)
    torch.testing.assert_close(found, torch.stack([edited[0], base[1], base[2]]))
    assert not torch.allclose(found[0], base[0])


def filled(model):
    """Edits that are no identity any more."""
    zoo.fill(rk.edit_parameters(model), cases.values(rk.edit_parameters(model)))
    return model


IDS = torch.arange(14).reshape(2, 7)


@pytest.mark.parametrize("kind", ["all", "curved"])
def test_saved_merged_or_refused(kind, registered, kinds, tmp_path):
    toy_kinds.register()
    model = toy.causal_lm()
    report = rk.patch(model, rk.RedConfig(position="ffn_attn", kind=kind))
    assert len(report.sites) == 2 * toy.LAYERS
    assert all((site.fused is not None) == (kind == "all") for site in report.sites)
    filled(model)
    edited = model(IDS).logits
    rk.save_edits(model, tmp_path / "edits")
    other = toy.causal_lm()
    rk.patch(other, rk.saved_config(tmp_path / "edits"))
    rk.load_edits(other, tmp_path / "edits")
    assert torch.equal(other(IDS).logits, edited)
    if kind == "curved":
        with pytest.raises(ValueError, match="kind 'curved', which no layer's weights can express"):
            rk.merge(model)
    else:
        rk.merge(model)
        torch.testing.assert_close(model(IDS).logits, edited, rtol=1e-4, atol=1e-5)


def test_as_an_adapter_of_peft(registered):
    pytest.importorskip("peft")
    from peft import get_peft_model

    from red_kernels.integrations.peft import RedPeftConfig

    patched = toy.causal_lm()
    rk.patch(patched)
    values = cases.values(rk.edit_parameters(patched))
    zoo.fill(rk.edit_parameters(patched), values)
    model = get_peft_model(toy.causal_lm(), RedPeftConfig()).eval()
    zoo.fill(rk.edit_parameters(model.base_model.model), values)
    expected = patched(IDS).logits
    assert torch.equal(model(IDS).logits, expected)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_on_the_command_line(registered, tmp_path):
    toy.causal_lm(tiny_folders.VOCABULARY).save_pretrained(tmp_path / "base")
    tiny_folders.tokenizer().save_pretrained(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text, with {i * i} words in it.\n" for i in range(100)))
    out = tmp_path / "out"
    arguments = ["finetune", "--model", str(tmp_path / "base"), "--data", str(text), "--output", str(out)]
    assert main([*arguments, "--steps", "2", "--length", "16", "--batch-size", "2", "--dtype", "fp32"]) == 0
    merged = tmp_path / "merged"
    assert (
        main(["merge", "--model", str(tmp_path / "base"), "--edits", str(out / "edits"), "--output", str(merged)]) == 0
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert type(loaded) is toy.ToyForCausalLM


def _family(**changes):
    return Family(**{"name": "New", "layers": ("NewLayer",), "sites": {"ffn": ("down",)}, **changes})


@pytest.mark.parametrize(
    ("family", "error", "match"),
    [
        ("llama", TypeError, "family: got str, expected a Family"),
        (_family(layers=()), ValueError, "family: got layers ()"),
        (_family(layers="NewLayer"), ValueError, "family: got layers 'NewLayer', expected a tuple"),
        (_family(layers=("NewLayer", "BertLayer")), ValueError, "family: the layers BertLayer are known already"),
        (
            _family(layers=("a.NewLayer", "b.NewLayer")),
            ValueError,
            "NewLayer, NewLayer are known already, or occur twice",
        ),
        (_family(sites={}), ValueError, "family: got sites for []"),
        (_family(sites={"ffn": ()}), ValueError, "family: got sites for ['ffn']"),
        (_family(sites={"mlp": ("down",)}), ValueError, "family: got sites for ['mlp'], expected paths for some of"),
        (_family(inside=("stream",)), ValueError, "expected paths for some of"),
        (_family(sites={"ffn": "down"}), ValueError, "expected a tuple of paths"),
    ],
)
def test_what_cannot_be_registered(family, error, match, families):
    before = [copy.copy(registry) for registry in (models.FAMILIES, models._REGISTERED, models._BY_LAYER)]
    with pytest.raises(error) as raised:
        rk.register_family(family)
    assert match in str(raised.value)
    assert before == [models.FAMILIES, models._REGISTERED, models._BY_LAYER]
    with pytest.warns(DeprecationWarning, match="register_family"):
        rk.register_family(_family())  # the right one can be, once
    with pytest.raises(ValueError, match="known already"):
        rk.register_family(_family())


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
_GPT2 = {"vocab_size": 50257, "n_positions": 1024}
REAL = {
    "roberta-base": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, **_ROBERTA
        )
    ),
    "roberta-large": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, **_ROBERTA
        )
    ),
    "t5-base": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=32128, d_model=768, d_ff=3072, d_kv=64, num_layers=12, num_decoder_layers=12, num_heads=12
        )
    ),
    "gpt2-medium": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16, **_GPT2)
    ),
    "gpt2-large": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20, **_GPT2)
    ),
    "llama-2-7b": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            max_position_embeddings=4096,
        )
    ),
}
TOTALS = {  # of the base models, so that the configurations are those of the published ones
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "t5-base": 222_903_552,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "llama-2-7b": 6_738_415_616,
}


@pytest.mark.parametrize(
    ("name", "position", "trained"),
    [
        ("roberta-base", "ffn", 18_432),
        ("roberta-base", "more", 92_160),
        ("roberta-large", "ffn", 49_152),
        ("roberta-large", "more", 245_760),
        ("t5-base", "ffn", 36_864),
        ("gpt2-medium", "ffn", 49_152),
        ("gpt2-medium", "more", 245_760),
        ("gpt2-large", "ffn", 92_160),
        ("gpt2-large", "more", 460_800),
        ("llama-2-7b", "ffn", 262_144),
    ],
)
def test_parameter_counts(name, position, trained):
    with torch.device("meta"):
        model = REAL[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == TOTALS[name]
    report = rk.patch(model, rk.RedConfig(position=position))
    assert report.trainable == trained
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == trained
    assert report.total == TOTALS[name] + trained
    assert all(vector.is_meta for parts in rk.edit_parameters(model).values() for vector in parts.values())
