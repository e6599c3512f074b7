"""RED as a method of PEFT: the same model as under `rk.patch`, fused, through all that PEFT does with an adapter."""

from __future__ import annotations

import copy
import pickle

import model_zoo as zoo
import peft
import pytest
import torch
from patch_helpers import layers_of, watching
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import red_kernels as rk
from red_kernels.edits.module import RedEdit
from red_kernels.integrations.peft import RedLayer, RedPeftConfig
from red_kernels.patching.classes import is_patched

ROOT = "base_model.model."


def randomised(model, seed=3):
    """Fill the vectors of the active adapter as trained ones might be."""
    parameters = rk.edit_parameters(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parts in parameters.values():
            for part, vector in parts.items():
                start = 1.0 if part in ("scale", "norm_weight") else 0.0
                vector.copy_(start + 0.4 * torch.randn(vector.shape, generator=generator))
    return {site.removeprefix(ROOT): parts for site, parts in parameters.items()}


def adapted(name, seed=3, adapter_name="default", **arguments):
    model = get_peft_model(zoo.tiny(name), RedPeftConfig(**arguments), adapter_name).eval()
    randomised(model, seed)
    return model


def logits(model, name, **more):
    with torch.no_grad():
        return model(**zoo.inputs(name), **more).logits


def truth(base, name, values, **arguments):
    """The logits of a model with these vectors in float64, by the plain composition."""
    exact = zoo.exact(base, values).model
    batch = zoo.inputs(name, **arguments)
    with torch.no_grad():
        return exact(
            **{key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        ).logits


def assert_as_base(model, name):
    """That no edit is applied: fused, the norms of the base model are rounded elsewhere."""
    base = zoo.tiny(name)
    zoo.assert_as_exact("logits", logits(model, name), logits(base, name), truth(base, name, {}))


def fused_classes(model):
    return [module for module in model.modules() if is_patched(module)]


@pytest.mark.parametrize("position", ["ffn", "more"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "opt_post_norm", "bert", "t5", "falcon", "neox"])
def test_as_under_patch_and_as_fused(name, position, monkeypatch):
    base = zoo.tiny(name)
    patched, watch = copy.deepcopy(base), watching(monkeypatch)
    rk.patch(patched, rk.RedConfig(position=position))
    model = get_peft_model(base, RedPeftConfig(position=position)).eval()
    ours, theirs = randomised(model), randomised(patched)
    assert ours.keys() == theirs.keys()
    results = []
    for one in (patched, model):
        watch.clear()
        output = one(**zoo.inputs(name))
        output.loss.backward()
        results.append((output.loss, output.logits, len(watch.left), len(watch.taken)))
    for plain, own in zip(*results, strict=True):
        assert torch.equal(plain, own) if isinstance(own, torch.Tensor) else plain == own
    assert {type(module).__name__ for module in fused_classes(model)} == {
        type(module).__name__ for module in fused_classes(patched)
    }
    for site, parts in ours.items():
        for part, vector in parts.items():
            assert torch.equal(vector.grad, theirs[site][part].grad), (site, part)


@pytest.mark.parametrize("kind", ["all", "scaling", "bias", "ln"])
@pytest.mark.parametrize("name", ["qwen2", "roberta"])
def test_kinds(name, kind):
    patched = zoo.tiny(name)
    rk.patch(patched, rk.RedConfig(kind=kind))
    randomised(patched)
    model = adapted(name, kind=kind)
    assert torch.equal(logits(model, name), logits(patched, name))
    trainable = sum(vector.numel() for vector in model.parameters() if vector.requires_grad)
    assert trainable == sum(vector.numel() for vector in patched.parameters() if vector.requires_grad)


@pytest.mark.parametrize("position", ["res", "res_with_attn"])
def test_residual_positions_of_post_norm_layers_are_the_norms(position):
    patched = zoo.tiny("bert")
    rk.patch(patched, rk.RedConfig(position=position))
    randomised(patched)
    model = get_peft_model(zoo.tiny("bert"), RedPeftConfig(position=position)).eval()
    assert all(site.endswith(".LayerNorm") for site in rk.edit_parameters(model))
    randomised(model)
    own, plain = logits(model, "bert"), logits(patched, "bert")
    unfused = copy.deepcopy(model)
    zoo.assert_as_exact("logits", own, plain, logits(unfused.double(), "bert"))


def test_a_frozen_base_and_fp32_vectors_in_a_half_precision_model():
    model = get_peft_model(zoo.tiny("llama").bfloat16(), RedPeftConfig())
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all("red_edit.default." in name and value.dtype == torch.float32 for name, value in trainable.items())
    assert len(trainable) == 2 * zoo.LAYERS
    model.to(torch.bfloat16)
    assert all(value.dtype == torch.float32 for value in trainable.values())
    asked = get_peft_model(zoo.tiny("llama").bfloat16(), RedPeftConfig(), autocast_adapter_dtype=False)
    assert {value.dtype for value in asked.parameters()} == {torch.bfloat16}
    direct = peft.inject_adapter_in_model(RedPeftConfig(), zoo.tiny("llama").bfloat16())
    assert {v.dtype for n, v in direct.named_parameters() if "red_edit" in n} == {torch.float32}


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_saved_and_loaded(name, tmp_path):
    model = adapted(name)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {f"{ROOT}{site}.red_edit.{part}" for site in zoo.sites(name) for part in ("scale", "bias")}
    for adapter in ("default", "another"):
        loaded = PeftModel.from_pretrained(zoo.tiny(name), tmp_path, adapter_name=adapter).eval()
        assert torch.equal(logits(loaded, name), logits(model, name))
        assert not any(vector.requires_grad for vector in loaded.parameters())
        assert fused_classes(loaded)
    assert not (torch.equal(logits(model, name), logits(zoo.tiny(name), name)))
    assert loaded.peft_config["another"] == type(loaded.peft_config["another"]).from_pretrained(tmp_path)


def test_saved_and_loaded_with_its_base(tmp_path):
    zoo.tiny("llama").save_pretrained(tmp_path / "base")
    base = AutoPeftModelForCausalLM  # finds the base by the name in the config
    model = get_peft_model(
        base._target_class.from_pretrained(tmp_path / "base"), RedPeftConfig(task_type="CAUSAL_LM")
    ).eval()
    randomised(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = base.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


class Named(nn.Module):
    """Linear layers by names that a careless rule for keys would trip over."""

    def __init__(self):
        super().__init__()
        names = ("scale", "bias", "red_edit_in", "default", "scale_bias")
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


@pytest.mark.parametrize("adapter", ["default", "other", "b"])
def test_names_that_hold_the_words_of_the_keys(adapter, tmp_path):
    torch.manual_seed(0)
    base, x = Named(), torch.randn(3, 4)
    config = RedPeftConfig(target_modules=r"layers\..*", init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config, adapter)
    before = base.state_dict()
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    assert len(load_file(folder / "adapter_model.safetensors")) == 10
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="z")
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(loaded(x), base(x))
    unloaded = loaded.unload()
    assert all(torch.equal(value, before[name]) for name, value in unloaded.state_dict().items())
    model.delete_adapter(adapter)
    assert torch.equal(model.base_model(x), base(x))


def test_several_adapters():
    model = adapted("llama")
    first = logits(model, "llama")
    model.add_adapter("second", RedPeftConfig(position="attn", kind="scaling"))
    assert torch.equal(logits(model, "llama"), first)
    model.set_adapter("second")
    assert rk.edit_parameters(model).keys() == {f"{ROOT}model.layers.{at}.self_attn.o_proj" for at in range(zoo.LAYERS)}
    randomised(model, 7)
    second = logits(model, "llama")
    assert not torch.equal(second, first)
    assert all(("second" in name) == value.requires_grad for name, value in model.named_parameters())
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), first)
    with model.disable_adapter():
        assert_as_base(model, "llama")
    with rk.disable_edits(model):
        assert_as_base(model, "llama")
    assert torch.equal(logits(model, "llama"), first)
    model.delete_adapter("default")
    assert torch.equal(logits(model, "llama"), second)
    assert not any("default" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kinds", [("all", "all"), ("scaling", "bias"), ("bias", "scaling"), ("bias", "all")])
def test_active_adapters_are_applied_one_after_another(kinds):
    base = nn.Sequential(nn.Linear(4, 8))
    x = torch.randn(5, 4)
    model = get_peft_model(
        copy.deepcopy(base), RedPeftConfig(target_modules=["0"], kind=kinds[0], init_weights=False), "a"
    )
    model.add_adapter("b", RedPeftConfig(target_modules=["0"], kind=kinds[1], init_weights=False))
    edits = {name: model.base_model.model[0].red_edit[name] for name in "ab"}

    def plain(order, dtype):
        result = copy.deepcopy(base).to(dtype)(x.to(dtype))
        for name in order:
            scale, bias = (getattr(edits[name], part, None) for part in ("scale", "bias"))
            result = result if scale is None else result * scale.to(dtype)
            result = result if bias is None else result + bias.to(dtype)
        return result

    for order in ("ab", "ba"):
        model.base_model.set_adapter(list(order))
        for merged in (False, True):
            if merged:
                model.merge_adapter()
            zoo.assert_as_exact(order, model(x), plain(order, torch.float32), plain(order, torch.float64))
        model.unmerge_adapter()
    model(x).sum().backward()
    assert all(vector.grad is not None for edit in edits.values() for vector in edit.parameters())


def test_layernorms_one_after_another_are_refused():
    model = adapted("llama")
    model.add_adapter("b", RedPeftConfig(kind="ln"))
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="kind 'ln'"):
        logits(model, "llama")


@pytest.mark.parametrize(
    ("arguments", "sites"),
    [
        ({"layers_to_transform": [0, 2]}, ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]),
        ({"layers_to_transform": 1}, ["model.layers.1.mlp.down_proj"]),
        (
            {"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            ["model.layers.1.self_attn.o_proj"],
        ),
        (
            {"exclude_modules": ["layers.0.mlp.down_proj"]},
            ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"],
        ),
        ({"target_modules": r".*\.1\..*norm"}, [f"model.layers.1.{n}_layernorm" for n in ("input", "post_attention")]),
    ],
)
def test_chosen_modules(arguments, sites):
    model = get_peft_model(zoo.tiny("llama"), RedPeftConfig(**arguments)).eval()
    assert [site.removeprefix(ROOT) for site in rk.edit_parameters(model)] == sites
    randomised(model)
    assert not torch.equal(logits(model, "llama"), logits(zoo.tiny("llama"), "llama"))


def test_modules_to_save(tmp_path):
    config = RedPeftConfig(task_type="SEQ_CLS")
    model = get_peft_model(zoo.tiny("roberta"), config)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.5)
    head = {name for name, value in model.named_parameters() if value.requires_grad and "red_edit" not in name}
    assert head
    assert all("classifier.modules_to_save.default" in name for name in head)
    model.train()(**zoo.inputs("roberta")).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.tiny("roberta"), tmp_path).eval()
    assert torch.equal(logits(loaded, "roberta"), logits(model.eval(), "roberta"))
    merged = copy.deepcopy(model).merge_and_unload()
    assert isinstance(merged.classifier, type(zoo.tiny("roberta").classifier))


def test_mixed_batches_with_a_head_to_save():
    model = get_peft_model(zoo.tiny("vit"), RedPeftConfig(modules_to_save=["classifier"])).eval()
    values, other = randomised(model), zoo.tiny("vit")
    with torch.no_grad():
        for head in (model.classifier.modules_to_save["default"], other.classifier):
            head.weight.mul_(-1.5)
    mixed = logits(model, "vit", adapter_names=["default", "__base__"])
    zoo.assert_as_exact("own row", mixed[0], logits(model, "vit")[0], truth(other, "vit", values)[0])
    base = zoo.tiny("vit")
    zoo.assert_as_exact("base row", mixed[1], logits(base, "vit")[1], truth(base, "vit", {})[1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_mixed_batches(name, monkeypatch):
    model = adapted(name)
    model.add_adapter("b", RedPeftConfig(kind="bias"))
    values = {"__base__": {}, "default": rk.edit_parameters(model)}
    model.set_adapter("b")
    randomised(model, 5)
    values["b"] = rk.edit_parameters(model)
    exact = {
        adapter: truth(zoo.tiny(name), name, {site.removeprefix(ROOT): parts for site, parts in held.items()}, batch=3)
        for adapter, held in values.items()
    }
    batch = zoo.inputs(name, batch=3)
    alone = {}
    with torch.no_grad():
        for adapter in ("default", "b"):
            model.set_adapter(adapter)
            alone[adapter] = model(**batch).logits
        with model.disable_adapter():
            alone["__base__"] = model(**batch).logits
        watch = watching(monkeypatch)
        rows = ["b", "__base__", "default"]
        mixed = model(**batch, adapter_names=rows).logits
    assert watch.taken
    for at, adapter in enumerate(rows):
        zoo.assert_as_exact(adapter, mixed[at], alone[adapter][at], exact[adapter][at])
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    together = model.generate(**ids, adapter_names=rows, **options)
    for at, adapter in enumerate(rows):
        one = {key: value[at : at + 1] for key, value in ids.items()}
        single = model.generate(**one, adapter_names=[adapter], **options)
        assert torch.equal(together[at, : single.shape[1]], single[0])
    model.train()
    with rk.use_edits(model, ["b", None, "default"]):  # PEFT itself refuses adapter_names while training
        model(**batch).loss.backward()
    assert all(vector.grad is not None for n, vector in model.named_parameters() if ".b.bias" in n)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (["default", "unknown"], "non-existing adapter"),
        (["default"] * 3, "Length of `adapter_names`"),
        ("default", "expected a list"),
    ],
)
def test_wrong_rows(rows, error):
    model = adapted("llama")
    with pytest.raises((TypeError, ValueError), match=error):
        logits(model, "llama", adapter_names=rows)


def test_copied_and_pickled():
    model = adapted("opt")
    model.add_adapter("b", RedPeftConfig(position="more"))  # whose layers are fused already
    expected = logits(model, "opt")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, "opt"), expected)
        other.set_adapter("b")
        randomised(other, 9)
        assert not torch.equal(logits(other, "opt"), expected)
    assert torch.equal(logits(model, "opt"), expected)


def test_on_top_of_lora():
    torch.manual_seed(0)
    base = get_peft_model(zoo.tiny("llama"), LoraConfig(target_modules=["down_proj"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="second time"):
        model = get_peft_model(base.base_model.model, RedPeftConfig()).eval()
    assert len(fused_classes(model)) > zoo.LAYERS
    before = logits(model, "llama")
    assert not torch.equal(before, logits(zoo.tiny("llama"), "llama"))
    randomised(model)
    assert not torch.equal(logits(model, "llama"), before)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()


def test_through_transformers(tmp_path, monkeypatch):
    # transformers 5.24 asks for PEFT 0.22 whatever the method; what it does with an adapter is looked at all the same.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    model = zoo.tiny("llama")
    model.add_adapter(RedPeftConfig(), "mine")
    randomised(model)
    expected = logits(model, "llama")
    assert fused_classes(model)
    model.save_pretrained(tmp_path)
    other = zoo.tiny("llama")
    other.load_adapter(str(tmp_path), "again")
    assert torch.equal(logits(other, "llama"), expected)
    other.disable_adapters()
    assert_as_base(other, "llama")
    other.enable_adapters()
    assert torch.equal(logits(other, "llama"), expected)
    other.delete_adapter("again")
    assert_as_base(other, "llama")


def test_unloaded_to_the_identical_model():
    base = zoo.tiny("gemma2")
    kinds = [type(module) for module in base.modules()]
    state = {name: value.clone() for name, value in base.state_dict().items()}
    unloaded = adapted_in(base).unload()
    assert unloaded is base
    assert [type(module) for module in base.modules()] == kinds
    assert not any(isinstance(module, (RedEdit, RedLayer)) for module in base.modules())
    assert not any(module._forward_hooks for module in base.modules())
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert base.state_dict().keys() == state.keys()
    rk.patch(unloaded)  # nothing stands in its way
    assert len(layers_of(base)) == zoo.LAYERS


def adapted_in(base):
    model = get_peft_model(base, RedPeftConfig())
    randomised(model)
    model.merge_adapter()
    return model
