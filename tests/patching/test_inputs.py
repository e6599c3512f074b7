"""Edits of keys and values alone and of the input of an FFN's last projection: the positions of IA3 and of BEFT."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import tiny_folders
import torch
from old_releases import skip_untraced
from torch import nn

import red_kernels as rk
from red_kernels.cli import main
from red_kernels.edits.find import edit_modules
from red_kernels.fusion.inputs import input_hook
from red_kernels.merging import fold
from red_kernels.models import Family
from red_kernels.patching.naive import naive_edit

IA3 = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "bert": (r".*(self\.key|self\.value|\d\.output\.dense)", r".*\d\.output\.dense"),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}
_RMS: dict[str, float] = {
    "rtol": 1e-4,
    "atol": 1e-6,
}  # transformers computes these norms in fp32, whatever the model has
_LAYER: dict[str, float] = {"rtol": 1e-9, "atol": 1e-11}
CLOSE = {"llama": _RMS, "t5": _RMS, "bert": _LAYER, "opt": _LAYER}


def patched(name: str, position: str = "ia3", kind: str = "scaling", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A patched model whose edits are no identity any more."""
    model = zoo.tiny(name).to(dtype)
    rk.patch(model, rk.RedConfig(position=position, kind=kind, dtype=dtype))
    change(model)
    return model


def change(model: nn.Module, name: str | None = None, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parts in rk.edit_parameters(model, name).values():
            for vector in parts.values():
                vector += 0.3 * torch.randn(vector.shape, generator=generator)


def logits(model: nn.Module, name: str, **inputs: Any) -> torch.Tensor:
    found: torch.Tensor = model(**{**zoo.inputs(name), **inputs}).logits
    return found


def gradients(model: nn.Module, name: str, train: bool = False) -> dict[str, torch.Tensor]:
    model.train(train)
    model(**zoo.inputs(name)).loss.backward()
    found = {}
    for site, parts in rk.edit_parameters(model).items():
        for part, vector in parts.items():
            assert vector.grad is not None
            found[f"{site}.{part}"] = vector.grad.clone()
            vector.grad = None
    return found


def peft_vectors(model: nn.Module, attribute: str) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model."): getattr(module, attribute)["default"]
        for name, module in model.named_modules()
        if hasattr(module, attribute)
    }


@pytest.mark.parametrize("name", IA3)
def test_as_ia3_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = patched(name, dtype=torch.float64)
    targets, inputs = IA3[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs)
    other = peft.get_peft_model(zoo.tiny(name).double(), config, autocast_adapter_dtype=False).eval()
    theirs, ours = peft_vectors(other, "ia3_l"), rk.edit_parameters(model)
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for site, vector in theirs.items():
            vector.data = ours[site]["scale"].detach().view(vector.shape).clone()
    torch.testing.assert_close(logits(model, name), logits(other, name), **CLOSE[name])
    other(**zoo.inputs(name)).loss.backward()
    for key, found in gradients(model, name).items():
        expected = theirs[key.removesuffix(".scale")].grad
        assert expected is not None
        torch.testing.assert_close(found, expected.flatten(), **CLOSE[name])


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_as_beft_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "BeftConfig"):
        pytest.skip("this release of PEFT has no BEFT")
    model = patched(name, "value", "bias", torch.float64)
    targets = {"llama": ["v_proj"], "bert": ["value"], "t5": ["v"]}[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without a bias
        config = peft.BeftConfig(target_modules=targets)
        other = peft.get_peft_model(zoo.tiny(name).double(), config, autocast_adapter_dtype=False).eval()
    theirs, ours = peft_vectors(other, "beft_bias"), rk.edit_parameters(model)
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for site, vector in theirs.items():
            vector.data = ours[site]["bias"].detach().view(vector.shape).clone()
    torch.testing.assert_close(logits(model, name), logits(other, name), **CLOSE[name])
    other(**zoo.inputs(name)).loss.backward()
    for key, found in gradients(model, name).items():
        expected = theirs[key.removesuffix(".bias")].grad
        assert expected is not None
        torch.testing.assert_close(found, expected.flatten(), **CLOSE[name])


@pytest.mark.parametrize("kind", ["all", "ln", "lowrank"])
@pytest.mark.parametrize("name", ["llama", "t5_gated", "distilbert"])
def test_any_kind_as_plain_hooks(name: str, kind: str) -> None:
    model, plain = patched(name, kind=kind), zoo.tiny(name)
    found = rk.edit_parameters(model)
    inputs = [site for site, own in edit_modules(model).items() if own.on_input]
    assert len(inputs) == len(zoo.sites(name))
    with naive_edit(plain, found, kind, inputs=inputs) as naive:
        for site, parts in naive.parameters.items():
            for part, vector in parts.items():
                vector.data.copy_(found[site][part])
        torch.testing.assert_close(logits(model, name), logits(plain, name), rtol=1e-4, atol=1e-5)
        plain(**zoo.inputs(name)).loss.backward()
        for key, gradient in gradients(model, name).items():
            site, _, part = key.rpartition(".")
            torch.testing.assert_close(gradient, naive.parameters[site][part].grad, rtol=1e-3, atol=1e-5)


def test_the_report_says_what_is_an_input() -> None:
    model = zoo.tiny("llama")
    report = rk.patch(model, rk.RedConfig(position="ia3", kind="scaling"))
    down = [site for site in report.sites if site.site.endswith("down_proj")]
    assert all(site.of_input and site.width == zoo.INNER for site in down)
    assert not any(site.of_input for site in report.sites if site not in down)
    assert "  input of model.layers.{0-2}.mlp.down_proj" in str(report)
    logits(model, "llama")
    assert (
        report.sites[-1].reason == "one pass of its own in front of the module; behind it residual add + final RMSNorm"
    )
    other = zoo.tiny("llama")
    unfused = rk.patch(other, rk.RedConfig(position="ia3", kind="lowrank"))
    logits(other, "llama")
    assert unfused.sites[-1].reason.startswith("edits of kind 'lowrank' have no fused kernel; behind it residual add")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_checkpointed(name: str, reentrant: bool) -> None:
    model, plain = patched(name), patched(name)
    expected = gradients(plain, name, train=True)
    rk.add_edit(model, "other")
    rk.switch_edit(model, "other")
    rk.switch_edit(model, "default")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    loss = model(**zoo.inputs(name)).loss
    rk.switch_edit(model, "other")  # the second run has the edit of the first
    loss.backward()
    for key, gradient in expected.items():
        site, _, part = key.rpartition(".")
        found = rk.edit_parameters(model, "default")[site][part].grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_compiled(name: str) -> None:
    skip_untraced(name)
    model = patched(name)
    inputs = {key: value for key, value in zoo.inputs(name).items() if key != "labels"}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_named_edits_by_row_switched_and_off() -> None:
    model, base = patched("llama"), logits(zoo.tiny("llama"), "llama")
    rk.add_edit(model, "b")
    change(model, "b", seed=4)
    single = {"default": logits(model, "llama")}
    with rk.use_edits(model, ids=["b", "default"]):
        mixed = logits(model, "llama")
    rk.switch_edit(model, "b")
    single["b"] = logits(model, "llama")
    torch.testing.assert_close(mixed[0], single["b"][0])
    torch.testing.assert_close(mixed[1], single["default"][1])
    assert not torch.allclose(single["b"], single["default"])
    with rk.disable_edits(model):
        assert torch.equal(logits(model, "llama"), base)


def test_saved_loaded_copied_and_pickled(tmp_path: Path) -> None:
    model = patched("llama")
    expected = logits(model, "llama")
    rk.save_edits(model, tmp_path)
    assert rk.saved_config(tmp_path) == rk.RedConfig(position="ia3", kind="scaling")
    other = zoo.tiny("llama")
    rk.patch(other, rk.saved_config(tmp_path))
    rk.load_edits(other, tmp_path)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (other, copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(one, "llama"), expected)
        rk.unpatch(one)


@pytest.mark.parametrize(("name", "kind"), [("llama", "scaling"), ("bert", "all"), ("opt", "bias"), ("opt", "lowrank")])
def test_merged(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "_COLUMNS", 20)
    model = patched(name, kind=kind)
    expected = logits(model, name)
    before = {key: own.clone() for key, own in zoo.tiny(name).state_dict().items()}
    rk.merge(model)
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-4, atol=1e-5)
    rk.unmerge(model)
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-6, atol=1e-6)
    rk.unpatch(model)
    assert all(torch.equal(own, before[key]) for key, own in model.state_dict().items())


def test_a_bias_of_an_input_merges_to_a_bias_that_needs_a_place() -> None:
    model = patched("llama", kind="bias")
    expected = logits(model, "llama")
    assert set(rk.merge(model).config_changes) == {"attention_bias", "mlp_bias"}
    torch.testing.assert_close(logits(model, "llama"), expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="kind 'ln', which no layer's weights can express"):
        rk.merge(patched("llama", kind="ln"))
    model = patched("llama")
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj has a forward hook that runs behind the edit of its"):
        rk.merge(model)


def test_unpatched_to_the_identical_model() -> None:
    model = zoo.tiny("t5")
    classes = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    rk.patch(model, rk.RedConfig(position="ia3", kind="scaling"))
    rk.unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == attributes
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_pre_hooks_with_kwargs


def test_a_lost_hook_is_told() -> None:
    model = patched("llama")
    hooks = model.model.layers[1].mlp.down_proj._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is input_hook]:
        del hooks[key]
    with pytest.raises(RuntimeError, match=r"layers.1.mlp.down_proj was not applied: its hook was removed"):
        logits(model, "llama")


def test_the_argument_may_have_a_name() -> None:
    model = patched("llama")
    layer = model.model.layers[0].mlp
    x = torch.randn(2, 3, zoo.HIDDEN)
    expected = layer(x)
    down = layer.down_proj
    layer.forward = lambda x: down(input=layer.act_fn(layer.gate_proj(x)) * layer.up_proj(x))
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(TypeError, match="the input of a module whose input is edited must be one tensor, got NoneType"):
        down()


def test_lora_around_it_and_inside() -> None:
    peft = pytest.importorskip("peft")
    first, second = zoo.tiny("llama"), patched("llama")
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    first = peft.get_peft_model(first, config).eval()
    rk.patch(first, rk.RedConfig(position="ia3", kind="scaling"))
    change(first)
    torch.manual_seed(5)
    second = peft.get_peft_model(second, config).eval()
    down = [model.base_model.model.model.layers[0].mlp.down_proj for model in (first, second)]
    scale = rk.edit_parameters(second)["base_model.model.model.layers.0.mlp.down_proj.base_layer"]["scale"]
    x = torch.randn(3, zoo.INNER)
    weight = down[1].base_layer.weight
    lora = [
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"] for layer in down
    ]
    torch.testing.assert_close(down[0](x), x * scale @ (weight + lora[0]).t())
    torch.testing.assert_close(down[1](x), x * scale @ weight.t() + x @ lora[1].t())
    expected = logits(second, "llama")
    rk.merge(second)
    torch.testing.assert_close(logits(second, "llama"), expected, rtol=1e-4, atol=1e-5)


def test_where_there_is_no_such_place() -> None:
    for position in ("ia3", "value"):
        with pytest.raises(ValueError, match=r"only values. One projection gives queries, keys and values.*c_attn"):
            rk.patch(zoo.tiny("gpt2"), rk.RedConfig(position=position))
    with pytest.raises(ValueError, match=r"no FFN with a last projection whose input is accessible. Its experts are"):
        rk.patch(zoo.tiny("mixtral"), rk.RedConfig(position="ia3"))
    with pytest.raises(ValueError, match="kind 'generated' is of a module's output, and not of its input"):
        rk.patch(zoo.tiny("bert"), rk.RedConfig(position="ia3", kind="generated"))


@pytest.mark.parametrize("kind", ["scaling", "lowrank:2"])
@pytest.mark.parametrize("name", IA3)
def test_ia3_as_an_adapter(name: str, kind: str, tmp_path: Path) -> None:
    """The logits and gradients of `rk.patch`; saved, loaded, merged, one for each row."""
    peft = pytest.importorskip("peft")
    from red_kernels.integrations.peft import RedPeftConfig

    ours = patched(name, kind=kind)
    model = peft.get_peft_model(zoo.tiny(name), RedPeftConfig(position="ia3", kind=kind)).eval()
    inputs = {site.removeprefix("base_model.model.") for site, own in edit_modules(model).items() if own.on_input}
    assert inputs == {site for site, own in edit_modules(ours).items() if own.on_input} != set()
    with torch.no_grad():
        for mine, theirs in zip(rk.edit_parameters(ours).values(), rk.edit_parameters(model).values(), strict=True):
            for part, vector in mine.items():
                theirs[part].copy_(vector)
    edited = logits(ours, name)
    torch.testing.assert_close(logits(model, name), edited, rtol=1e-5, atol=1e-6)
    for found, expected in zip(gradients(model, name).values(), gradients(ours, name).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(zoo.tiny(name), tmp_path).eval()
    assert torch.equal(logits(loaded, name), logits(model, name))
    loaded.add_adapter("b", RedPeftConfig(position="ia3", kind=kind))
    batch = {key: value[:2] for key, value in zoo.inputs(name).items()}
    both = loaded(**batch, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(both[0], logits(loaded, name)[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[1], logits(zoo.tiny(name), name)[1], rtol=1e-5, atol=1e-6)
    bare = loaded.merge_and_unload()
    torch.testing.assert_close(logits(bare, name), edited, rtol=1e-4, atol=1e-5)


def test_adapters_of_inputs_combined_by_weights() -> None:
    """Of adapters with other targets: the new one edits the same sides of all of them."""
    peft = pytest.importorskip("peft")
    from red_kernels.integrations.peft import RedPeftConfig

    model = peft.get_peft_model(zoo.tiny("llama"), RedPeftConfig(position="ia3", kind="scaling")).eval()
    model.add_adapter("b", RedPeftConfig(target_modules=["q_proj", "v_proj"], kind="scaling"))
    for name, seed in (("default", 3), ("b", 4)):
        change(model, name, seed)
    model.add_weighted_adapter(["b", "default"], [-1.0, 0.5], "both")
    model.set_adapter("both")
    found = rk.edit_parameters(model, "both")
    first, second = rk.edit_parameters(model, "default"), rk.edit_parameters(model, "b")
    assert set(found) == set(first) | set(second)
    for site, parts in found.items():
        expected = 1.0
        for weight, own in ((0.5, first), (-1.0, second)):
            if site in own:
                expected = expected + weight * (own[site]["scale"] - 1)
        torch.testing.assert_close(parts["scale"], expected)
    logits(model, "llama")


def test_what_inputs_an_adapter_refuses() -> None:
    peft = pytest.importorskip("peft")
    from red_kernels.integrations.peft import RedPeftConfig

    with pytest.raises(ValueError, match="feedforward_modules: got it without target_modules"):
        RedPeftConfig(feedforward_modules=["down_proj"])
    for names in (["down_proj", "up"], r".*up"):
        config = RedPeftConfig(target_modules=["v_proj", "down_proj"], feedforward_modules=names)
        with pytest.raises(ValueError, match=r"feedforward_modules: got '(\.\*)?up', expected some of the modules in"):
            peft.get_peft_model(zoo.tiny("llama"), config)
    for names in (["down_proj"], r".*down_proj"):
        config = RedPeftConfig(target_modules=["v_proj", "down_proj"], feedforward_modules=names, kind="scaling")
        model = peft.get_peft_model(zoo.tiny("llama"), config)
        sides = {site.rpartition(".")[2]: own.on_input for site, own in edit_modules(model).items()}
        assert sides == {"v_proj": False, "down_proj": True}


def test_values_as_an_adapter_of_peft() -> None:
    peft = pytest.importorskip("peft")
    from red_kernels.integrations.peft import RedPeftConfig

    model = peft.get_peft_model(zoo.tiny("llama"), RedPeftConfig(position="value", kind="bias"))
    assert model.peft_config["default"].target_modules == {"v_proj"}


@pytest.mark.filterwarnings("ignore:.*register_family:DeprecationWarning")
def test_in_a_registered_family(families: None) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value, self.down = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.value(self.key(x)) + self.down(torch.cat([x, x[..., :2]], -1))

    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn_mlp_layers = nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.attn_mlp_layers:
                x = layer(x)
            return x

    rk.register_family(Family("strange", ("Layer",), {"ffn": ("down",), "qkv": ("key", "value")}))
    report = rk.patch(Strange(), rk.RedConfig(position="ia3"))
    found = [(site.site.rpartition(".")[2], site.width, site.of_input) for site in report.sites]
    assert found == 2 * [("key", 4, False), ("value", 4, False), ("down", 6, True)]


def test_on_the_command_line(tmp_path: Path) -> None:
    model = tiny_folders.tiny_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text, with {i * i} words in it.\n" for i in range(100)))
    arguments = ["finetune", "--model", str(model), "--data", str(text), "--output", str(tmp_path / "out")]
    chosen = ["--position", "ia3", "--kind", "scaling"]
    assert main([*arguments, "--steps", "2", "--length", "16", "--batch-size", "2", *chosen]) == 0
    assert rk.saved_config(tmp_path / "out" / "edits").position == "ia3"
