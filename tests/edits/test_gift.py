"""GIFT: edits of inputs by vectors that all sites of a width share."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import safetensors.torch
import tiny_folders
import torch
from torch import nn

import red_kernels as rk
from red_kernels.cli import main
from red_kernels.edits.find import edit_modules
from red_kernels.edits.kinds import kind_named
from red_kernels.patching.naive import naive_edit

KIND = "gift:4"
POSITIONS = [("llama", "ffn"), ("t5", "more"), ("bert", "ffn_attn"), ("gpt2", "more"), ("llama", "ia3")]


def patched(name: str = "llama", position: str = "ffn", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A patched model whose edits are no identity any more."""
    model = zoo.tiny(name).to(dtype)
    rk.patch(model, rk.RedConfig(position=position, kind=KIND, dtype=dtype))
    change(model)
    return model


def change(model: nn.Module, name: str | None = None, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parts in rk.edit_parameters(model, name).values():
            for vector in parts.values():
                vector += 0.2 * torch.randn(vector.shape, generator=generator)


def logits(model: nn.Module, name: str = "llama", **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(**zoo.inputs(name, **options)).logits
    return found


def shared(model: nn.Module) -> list[nn.Parameter]:
    """The trained vectors as an optimizer is given them."""
    return [own for own in model.parameters() if own.requires_grad]


@pytest.mark.parametrize(("name", "position"), POSITIONS)
def test_as_plain_hooks(name: str, position: str) -> None:
    model, plain = patched(name, position, torch.float64), zoo.tiny(name).double()
    found = rk.edit_parameters(model)
    widths = {own.width for own in edit_modules(model).values()}
    assert len(found) == len(widths)
    assert len(shared(model)) == 2 * len(widths)
    with naive_edit(plain, edit_modules(model), KIND, torch.float64) as naive:
        for site, parts in found.items():
            for part, vector in parts.items():
                naive.parameters[site][part].data.copy_(vector)
        assert len(naive.vectors()) == 2 * len(widths)
        torch.testing.assert_close(logits(model, name), logits(plain, name), rtol=1e-5, atol=1e-6)  # norms in fp32
        for one in (model, plain):
            one(**zoo.inputs(name)).loss.backward()
        for site, parts in found.items():
            for part, vector in parts.items():
                torch.testing.assert_close(vector.grad, naive.parameters[site][part].grad, rtol=1e-4, atol=1e-6)


def test_the_layer_is_the_one_of_the_paper() -> None:
    model = patched(position="attn", dtype=torch.float64)
    layer = model.model.layers[1].self_attn.o_proj
    parts = next(iter(rk.edit_parameters(model).values()))
    x, weight = torch.randn(5, zoo.HIDDEN, dtype=torch.float64), layer.weight
    made = weight + (weight @ parts["psi"].t()) @ parts["phi"].t()
    torch.testing.assert_close(layer(x), x @ made.t(), rtol=1e-12, atol=1e-12)


def test_the_start_is_the_identity_and_drawn() -> None:
    model = zoo.tiny("llama")
    before = logits(model)
    report = rk.patch(model, rk.RedConfig(kind="gift"))
    torch.testing.assert_close(logits(model), before)
    assert report.trainable == 2 * 16 * zoo.INNER
    assert all(site.of_input and site.width == zoo.INNER for site in report.sites)
    parts = rk.edit_parameters(model)["model.layers.0.mlp.down_proj"]
    assert parts["phi"].shape == (zoo.INNER, 16)
    assert 0 < parts["phi"].abs().max() <= zoo.INNER**-0.5
    assert not parts["psi"].any()


def test_the_output_waits_for_its_addition() -> None:
    model = zoo.tiny("llama")
    report = rk.patch(model, rk.RedConfig(kind="gift", position="ffn_attn"))
    logits(model)
    ends = {site.site.rpartition(".")[2]: site.reason.partition("; behind it ")[2] for site in report.sites}
    assert ends == {"o_proj": "residual add + RMSNorm", "down_proj": "residual add + final RMSNorm"}


def test_saved_once_and_loaded(tmp_path: Path) -> None:
    model = patched(position="more")
    rk.save_edits(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "red_edits.safetensors")
    assert sorted(own.shape for own in tensors.values()) == [(4, 32), (4, 48), (32, 4), (48, 4)]
    other = zoo.tiny("llama")
    rk.patch(other, rk.saved_config(tmp_path))
    rk.load_edits(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    rk.load_edits(other, tmp_path, name="second")
    rk.switch_edit(other, "second")
    assert torch.equal(logits(other), logits(model))
    assert len(shared(other)) == 4


def test_a_state_dict_has_each_once_and_assigns() -> None:
    model = patched()
    keys = [key for key in model.state_dict() if "red_edit" in key]
    assert keys == [f"model.layers.0.mlp.down_proj.red_edit.{part}" for part in ("phi", "psi")]
    with torch.device("meta"):
        other = zoo.tiny("llama")
        rk.patch(other, rk.RedConfig(kind=KIND))
    other.load_state_dict({key: own.clone() for key, own in model.state_dict().items()}, assign=True)
    other.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_share_among_themselves(way: str) -> None:
    model = patched()
    expected = logits(model)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(logits(other), expected)
    owns = list(edit_modules(other).values())
    assert {id(own.root) for own in owns} == {id(owns[0])}
    with torch.no_grad():
        shared(other)[1].zero_()
    torch.testing.assert_close(logits(other), logits(zoo.tiny("llama")))
    assert torch.equal(logits(model), expected)


def test_added_switched_by_row_deleted_and_off() -> None:
    model = patched()
    rk.add_edit(model, "b", copy_of="default")
    assert rk.edit_names(model) == ("default", "b")
    single = {"default": logits(model)}
    rk.switch_edit(model, "b")
    assert torch.equal(logits(model), single["default"])
    change(model, "b", seed=4)
    assert [own.shape for own in shared(model)] == [(zoo.INNER, 4), (4, zoo.INNER)]
    single["b"] = logits(model)
    with rk.use_edits(model, ids=["b", "default"]):
        mixed = logits(model)
    torch.testing.assert_close(mixed[0], single["b"][0])
    torch.testing.assert_close(mixed[1], single["default"][1])
    with rk.use_edits(model, ids=["default", None]):
        mixed = logits(model)
        mixed.square().mean().backward()
    torch.testing.assert_close(mixed[1], logits(zoo.tiny("llama"))[1], rtol=1e-4, atol=1e-5)
    assert all(
        own.grad is not None for own in rk.edit_parameters(model, "default")["model.layers.0.mlp.down_proj"].values()
    )
    with rk.disable_edits(model):
        assert torch.equal(logits(model), logits(zoo.tiny("llama")))
    rk.switch_edit(model, "default")
    rk.delete_edit(model, "b")
    assert rk.edit_names(model) == ("default",)
    with pytest.raises(ValueError, match="kind 'gift:4', which cannot be combined by weights"):
        rk.combine_edits(model, {"default": 1.0}, "c")


def test_trained_by_row_as_alone() -> None:
    rows, alone = patched(), patched()
    for model in (rows, alone):
        rk.add_edit(model, "b", copy_of="default")
    with rk.use_edits(rows, ids=["b", "default"]):
        logits(rows).square().sum().backward()
    for row, name in ((0, "b"), (1, "default")):
        rk.switch_edit(alone, name)
        logits(alone)[row].square().sum().backward()
    for name in ("b", "default"):
        for part, vector in rk.edit_parameters(rows, name)["model.layers.0.mlp.down_proj"].items():
            expected = rk.edit_parameters(alone, name)["model.layers.0.mlp.down_proj"][part].grad
            torch.testing.assert_close(vector.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_and_switched_before_the_backward(reentrant: bool) -> None:
    model, plain = patched(), patched()
    plain(**zoo.inputs("llama")).loss.backward()
    rk.add_edit(model, "b")
    rk.switch_edit(model, "b")
    rk.switch_edit(model, "default")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model.train()
    loss = model(**zoo.inputs("llama")).loss
    rk.switch_edit(model, "b")
    loss.backward()
    for own, other in zip(
        rk.edit_parameters(model, "default")["model.layers.0.mlp.down_proj"].values(), shared(plain), strict=True
    ):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "position"), POSITIONS)
def test_merged_and_taken_back(name: str, position: str) -> None:
    model = patched(name, position)
    expected = logits(model, name)
    base = zoo.tiny(name).state_dict()
    rk.merge(model)
    assert model.state_dict().keys() == base.keys()  # no layer gets a bias
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-3, atol=1e-4)
    rk.unmerge(model)
    torch.testing.assert_close(logits(model, name), expected)
    assert len({id(own.root) for own in edit_modules(model).values()}) == len(rk.edit_parameters(model))
    rk.unpatch(model)
    assert all(torch.equal(own, base[key]) for key, own in model.state_dict().items())


def test_an_optimizer_trains_each_once() -> None:
    model = patched()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [own.detach().clone() for own in shared(model)]
    model(**zoo.inputs("llama")).loss.backward()
    gradients = [own.grad.clone() for own in shared(model)]
    optimizer.step()
    for own, start, gradient in zip(shared(model), before, gradients, strict=True):
        torch.testing.assert_close(own.detach(), start - 0.1 * gradient)


@pytest.mark.sampled(1)
def test_compiled() -> None:
    model = patched(position="more")
    inputs = {key: value for key, value in zoo.inputs("llama").items() if key != "labels"}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_the_first_layers_taken_out() -> None:
    """What the others share is still theirs."""
    model = patched()
    expected = rk.edit_parameters(model)["model.layers.0.mlp.down_proj"]
    model.model.layers = model.model.layers[1:]
    with pytest.warns(UserWarning, match=r"layers.0.mlp.down_proj are not in the running model"):
        logits(model)
    assert rk.edit_parameters(model)["model.layers.0.mlp.down_proj"] == expected
    rk.add_edit(model, "b")
    assert rk.edit_names(model) == ("default", "b")


def test_modules_named_by_a_glob() -> None:
    model = zoo.tiny("llama")
    report = rk.patch(model, rk.RedConfig(kind=KIND, sites="*.gate_proj"))
    assert all(site.of_input and site.width == zoo.HIDDEN for site in report.sites)
    assert "input of model.layers.{0-2}.mlp.gate_proj" in str(report)
    with pytest.raises(
        ValueError, match=r"'model.norm' is a LlamaRMSNorm, but edits of kind 'gift' are of the input of"
    ):
        rk.patch(zoo.tiny("llama"), rk.RedConfig(kind="gift", sites="model.norm"))


def test_what_has_no_input_to_edit() -> None:
    for name, position in (("mixtral", "ffn"), ("llama", "res"), ("llama", "res_with_attn")):
        with pytest.raises(ValueError, match="is unknown; edits of kind 'gift' are of the input of linear layers"):
            rk.patch(zoo.tiny(name), rk.RedConfig(kind="gift", position=position))
    with pytest.raises(ValueError, match=r"has outputs of width 48, and an edit of kind 'gift:64' needs at least 64"):
        rk.patch(zoo.tiny("llama"), rk.RedConfig(kind="gift:64"))


@pytest.mark.parametrize(("name", "position"), POSITIONS)
def test_as_an_adapter_of_peft(name: str, position: str, tmp_path: Path) -> None:
    """The logits and gradients of `rk.patch`; shared vectors stay shared, saved and loaded; merged."""
    pytest.importorskip("peft")
    from peft import PeftModel, get_peft_model

    from red_kernels.integrations.peft import RedPeftConfig

    ours = patched(name, position)
    model = get_peft_model(zoo.tiny(name), RedPeftConfig(position=position, kind=KIND)).eval()
    theirs = rk.edit_parameters(model)
    assert len(theirs) == len(rk.edit_parameters(ours))
    assert len(shared(model)) == len(shared(ours))
    widths = {own.width for own in edit_modules(ours).values()}
    assert len(shared(model)) == 2 * len(widths)
    copied(ours, model)
    found, expected = model(**zoo.inputs(name)), ours(**zoo.inputs(name))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    found.loss.backward()
    expected.loss.backward()
    for mine, their in zip(rk.edit_parameters(ours).values(), theirs.values(), strict=True):
        for part, vector in mine.items():
            torch.testing.assert_close(their[part].grad, vector.grad, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.tiny(name), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded, name), found.logits)
    assert len(shared(loaded)) == 2 * len(widths)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded, name), found.logits, rtol=1e-4, atol=1e-5)
    loaded.unmerge_adapter()
    assert torch.equal(logits(loaded, name), found.logits)
    loaded.add_adapter("b", RedPeftConfig(position=position, kind=KIND))
    loaded.set_adapter("b")
    torch.testing.assert_close(logits(loaded, name), logits(zoo.tiny(name), name), rtol=1e-5, atol=1e-6)
    assert len(shared(loaded)) == 2 * len(widths)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, name), logits(zoo.tiny(name), name))
    loaded.delete_adapter("b")
    loaded.set_adapter("default")
    bare = loaded.merge_and_unload()
    torch.testing.assert_close(logits(bare, name), found.logits, rtol=1e-4, atol=1e-5)


def copied(ours: nn.Module, model: nn.Module) -> None:
    with torch.no_grad():
        for mine, theirs in zip(rk.edit_parameters(ours).values(), rk.edit_parameters(model).values(), strict=True):
            for part, vector in mine.items():
                theirs[part].copy_(vector)


def test_adapters_of_an_input_and_of_an_output() -> None:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from red_kernels.integrations.peft import RedPeftConfig

    model = get_peft_model(zoo.tiny("llama"), RedPeftConfig(kind=KIND))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"this adapter edits the output of .*down_proj', and another one its input"):
        model.add_adapter("b", RedPeftConfig(kind="all"))
    assert set(model.state_dict()) == before
    with pytest.raises(ValueError, match=r"feedforward_modules: 'model.norm' is a .*RMSNorm, but only linear"):
        get_peft_model(zoo.tiny("llama"), RedPeftConfig(kind=KIND, target_modules=["model.norm"]))


def test_the_option() -> None:
    assert kind_named("gift:16") is kind_named("gift")
    assert rk.RedConfig(kind="gift:16").kind == "gift"
    assert pickle.loads(pickle.dumps(kind_named(KIND))) is kind_named(KIND)


def test_on_the_command_line(tmp_path: Path) -> None:
    model = tiny_folders.tiny_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text, with {i * i} words in it.\n" for i in range(100)))
    arguments = ["finetune", "--model", str(model), "--data", str(text), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "2", "--length", "16", "--batch-size", "2", "--kind", KIND]) == 0
    assert rk.saved_config(tmp_path / "out" / "edits").kind == KIND
