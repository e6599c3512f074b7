"""Edits under what other libraries put around a patched model or its layers: names in files, and merging."""

from __future__ import annotations

import copy

import model_zoo as zoo
import pytest
import torch
from checkpoint_helpers import same, values
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import red_kernels as rk
from red_kernels.edits.find import edit_parameters

peft = pytest.importorskip("peft")

TARGETS = {"llama": ["down_proj", "q_proj"], "gpt2": ["c_proj"], "bert": ["dense"], "t5": ["wo", "q"]}


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def lora(model, **options):
    name = {"Llama": "llama", "GPT2LM": "gpt2", "BertFo": "bert", "T5ForC": "t5"}[type(model).__name__[:6].rstrip("F")]
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS[name], init_lora_weights=False, **options))


def filled(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parts in edit_parameters(model).values():
            for own in parts.values():
                own.add_(torch.randn_like(own), alpha=0.3)
    return model


def checkpointed(model):
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1)
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer)
    return model


def compiled_layers(model):
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1)
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, backend="eager")
    return model


WRAPPERS = {
    "LoRA": lora,
    "LoRA twice": lambda model: Wrapper(lora(model)),
    "IA3": lambda model: peft.get_peft_model(
        model, peft.IA3Config(target_modules=TARGETS["llama"], feedforward_modules=["down_proj"])
    ),
    "checkpointed layers": checkpointed,
    "checkpointed layers in LoRA": lambda model: lora(checkpointed(model)),
    "compiled layers": compiled_layers,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "another module": Wrapper,
    "two modules": lambda model: Wrapper(Wrapper(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_saved_under_the_names_without_wrappers(wrap, tmp_path):
    """And loaded into a model with the wrapper, without it, and with another one."""
    model = zoo.tiny("llama")
    rk.patch(model)
    keys = {f"{site}.red_edit.{part}" for site, parts in edit_parameters(model).items() for part in parts}
    model = filled(wrap(model))
    rk.save_edits(model, tmp_path)
    assert load_file(tmp_path / "red_edits.safetensors").keys() == keys
    for other in (wrap, lambda plain: plain, lora, checkpointed):
        fresh = zoo.tiny("llama")
        rk.patch(fresh, rk.saved_config(tmp_path))
        fresh = other(fresh)
        report = rk.load_edits(fresh, tmp_path)
        assert not report.checkpoint_only
        assert same(values(model), values(fresh))
        rk.load_edits(fresh, tmp_path, name="other")


@pytest.mark.parametrize("name", TARGETS)
def test_lora_first_as_well(name, tmp_path):
    """The names are the same, whichever came first."""
    first, second = zoo.tiny(name), lora(zoo.tiny(name))
    rk.patch(first)
    rk.patch(second)
    filled(second)
    rk.save_edits(second, tmp_path)
    rk.load_edits(first, tmp_path)
    assert same(values(first), values(second))
    names = {f"{site}.red_edit.{part}" for site, parts in edit_parameters(first).items() for part in parts}
    assert load_file(tmp_path / "red_edits.safetensors").keys() == names


@pytest.mark.parametrize("wrap", [lora, checkpointed], ids=["LoRA", "checkpointed layers"])
def test_files_with_the_names_of_wrappers_go_on_loading(wrap, tmp_path, monkeypatch):
    """Earlier versions saved the names as they were then."""
    from red_kernels.checkpoints import checkpoint

    model = zoo.tiny("llama")
    rk.patch(model)
    model = filled(wrap(model))
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "renamed_sites", lambda model, vectors: vectors)
        rk.save_edits(model, tmp_path)
    plain = zoo.tiny("llama")
    rk.patch(plain, rk.saved_config(tmp_path))
    fresh = zoo.tiny("llama")
    rk.patch(fresh)
    for one in (plain, wrap(fresh), model):
        rk.load_edits(one, tmp_path)
        assert same(values(model), values(one))


def test_layers_that_were_taken_out_keep_their_new_names(tmp_path):
    """A name that is not the former one with parts added is the name."""
    model = zoo.tiny("llama")
    rk.patch(model)
    filled(model)
    del model.model.layers[0]
    names = {f"{site}.red_edit.{part}" for site, parts in edit_parameters(model).items() for part in parts}
    assert any(".layers.0." in name for name in names)
    with pytest.warns(UserWarning, match=r"the edits at model\.layers\.0\.mlp\.down_proj are no longer in the model"):
        rk.save_edits(model, tmp_path)
    assert load_file(tmp_path / "red_edits.safetensors").keys() == names
    doubled = zoo.tiny("llama")
    rk.patch(doubled)
    doubled.model.layers.append(copy.deepcopy(doubled.model.layers[0]))
    rk.save_edits(doubled, tmp_path)
    assert len(load_file(tmp_path / "red_edits.safetensors")) == sum(map(len, edit_parameters(doubled).values()))


@pytest.mark.parametrize("kind", ["scaling", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_merging_inside_of_lora_is_exact(name, kind, tmp_path):
    """LoRA adds to the edited output: RED goes into the base layer's weight first, LoRA's part into the sum."""
    model = zoo.tiny(name).double()
    rk.patch(model, rk.RedConfig(kind=kind))
    model = filled(lora(model)).double().eval()
    batch = zoo.inputs(name)
    # Hooks of others have the library's norms run, which round to float32 in Llama; fused ones keep float64.
    hooks = [module.register_forward_hook(lambda module, args, output: None) for module in model.modules()]
    wanted = model(**batch).logits
    for hook in hooks:
        hook.remove()
    rk.merge(model)
    torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-11, rtol=1e-9)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, wanted, atol=1e-11, rtol=1e-9)
    merged.save_pretrained(tmp_path)
    plain = type(zoo.tiny(name)).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(plain(**batch).logits, wanted, atol=1e-11, rtol=1e-9)


def test_unmerging_inside_of_lora_says_why_not():
    model = zoo.tiny("llama")
    rk.patch(model, rk.RedConfig(kind="scaling"))
    model = filled(lora(model))
    rk.merge(model)
    with pytest.raises(ValueError, match="its sites are not those that were merged"):
        rk.unmerge(model)


REFUSED = {
    "LoRA that is merged already": (
        lambda model: lora(model),
        lambda model: model.merge_adapter(),
        "unmerge LoRA first",
    ),
    "DoRA": (lambda model: lora(model, use_dora=True), lambda model: None, "such as DoRA"),
    "IA3": (WRAPPERS["IA3"], lambda model: None, "remove that wrapper"),
    "compiled layers": (compiled_layers, lambda model: None, "remove that wrapper"),
}


@pytest.mark.parametrize(("wrap", "then", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_into_is_refused(wrap, then, message):
    model = zoo.tiny("llama")
    rk.patch(model, rk.RedConfig(kind="scaling"))
    model = filled(wrap(model))
    then(model)
    before = {name: own.clone() for name, own in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        rk.merge(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], own) for name, own in before.items())
