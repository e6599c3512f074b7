"""Several named edits in one model: adding, switching, disabling, combining, swapping values under `torch.compile`."""

from __future__ import annotations

import copy
import io
import pickle

import model_zoo as zoo
import position_cases as cases
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter

import red_kernels as rk
from red_kernels.edits.find import edit_modules
from red_kernels.integrations.peft import RedPeftConfig

NAME = "llama"


def several(name=NAME, names=("a", "b"), **config):
    """A patched model with edits of different values, and these values by name."""
    model = zoo.tiny(name)
    rk.patch(model, rk.RedConfig(**config))
    for added in names:
        rk.add_edit(model, added)
    values = {}
    for seed, edit in enumerate(("default", *names)):
        values[edit] = cases.values(rk.edit_parameters(model, edit), seed=seed)
        zoo.fill(rk.edit_parameters(model, edit), values[edit])
    return model, values


def logits(model, name=NAME):
    with torch.no_grad():
        return model(**zoo.inputs(name)).logits


def single(name=NAME, values=None, **config):
    """The logits of a model with one edit."""
    model = zoo.tiny(name)
    rk.patch(model, rk.RedConfig(**config))
    zoo.fill(rk.edit_parameters(model), values)
    return logits(model, name)


def hold(found, values, name=NAME):
    """Hold logits to the composition with plain hooks; without values, to the base model."""
    peer, truth = zoo.Unfused(zoo.tiny(name), values or {}), zoo.exact(zoo.tiny(name), values or {})
    zoo.assert_as_exact("logits", found, logits(peer.model, name), logits(truth.model, name))


def snapshot(model):
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        rk.edit_names(model),
        rk.active_edit(model),
    )


def assert_unchanged(model, before):
    state, names, active = before
    assert (rk.edit_names(model), rk.active_edit(model)) == (names, active)
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("kind", ["all", "scaling", "bias", "ln"])
@pytest.mark.parametrize("position", cases.POSITIONS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_each_is_the_model_with_that_edit_alone(name, position, kind):
    model, values = several(name, position=position, kind=kind)
    assert rk.edit_names(model) == ("default", "a", "b")
    for edit in ("default", "b", "a", "default"):
        rk.switch_edit(model, edit)
        assert rk.active_edit(model) == edit
        assert torch.equal(logits(model, name), single(name, values[edit], position=position, kind=kind))


def test_an_added_edit_is_the_identity_and_not_active():
    model, _ = several(names=())
    before = logits(model)
    parameters = set(model.parameters())
    rk.add_edit(model, "new")
    assert rk.active_edit(model) == "default"
    assert torch.equal(logits(model), before)
    rk.switch_edit(model, "new")
    hold(logits(model), None)
    added = rk.edit_parameters(model, "new")
    assert added.keys() == rk.edit_parameters(model, "default").keys()
    vectors = [vector for parts in added.values() for vector in parts.values()]
    assert all(vector.requires_grad and vector.dtype == torch.float32 for vector in vectors)
    assert set(model.parameters()) - parameters == set(vectors)


def test_a_copy_has_the_values_and_its_own_memory():
    model, values = several(names=("a",))
    rk.add_edit(model, "copied", copy_of="a")
    for site, parts in rk.edit_parameters(model, "copied").items():
        for part, vector in parts.items():
            assert torch.equal(vector, values["a"][site][part])
    with torch.no_grad():
        for parts in rk.edit_parameters(model, "copied").values():
            parts["scale"].zero_()
    rk.switch_edit(model, "a")
    hold(logits(model), values["a"])


def test_made_in_inference_mode_it_can_still_be_trained():
    model, _ = several(names=())
    with torch.inference_mode():
        rk.add_edit(model, "new", copy_of="default")
    rk.switch_edit(model, "new")
    model(**zoo.inputs(NAME)).loss.backward()
    assert all(parts["scale"].grad is not None for parts in rk.edit_parameters(model, "new").values())


def test_delete():
    model, _ = several()
    rk.delete_edit(model, "a")
    assert rk.edit_names(model) == ("default", "b")
    assert not any(".a." in key for key in model.state_dict())
    with pytest.raises(ValueError, match="'a'"):
        rk.switch_edit(model, "a")
    rk.add_edit(model, "a")
    rk.switch_edit(model, "a")
    hold(logits(model), None)


def test_disable_is_the_base_model_nested_and_after_an_exception():
    model, _ = several()
    rk.switch_edit(model, "b")
    edited = logits(model)
    with rk.disable_edits(model):
        assert rk.active_edit(model) is None
        base = logits(model)
        hold(base, None)
        assert not torch.allclose(edited, base)
        with rk.disable_edits(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert rk.active_edit(model) == "b"
    assert torch.equal(logits(model), edited)
    with pytest.raises(KeyError), rk.disable_edits(model), rk.disable_edits(model):
        raise KeyError
    assert torch.equal(logits(model), edited)


@pytest.mark.parametrize("position", ["attn", "res", "res_with_attn", "more"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "opt", "distilbert", "falcon_sequential"])
def test_disable_everywhere(name, position):
    model, _ = several(name, names=(), position=position)
    with rk.disable_edits(model):
        hold(logits(model, name), None, name)


def test_switching_while_disabled_holds_afterwards():
    model, values = several()
    with rk.disable_edits(model):
        rk.switch_edit(model, "a")
        assert rk.active_edit(model) is None
        hold(logits(model), None)
        with pytest.raises(ValueError, match=r"'a'.*is the active edit"):
            rk.delete_edit(model, "a")
        rk.delete_edit(model, "b")
    assert rk.active_edit(model) == "a"
    hold(logits(model), values["a"])


def test_combine_is_the_formula():
    model, values = several()
    rk.combine_edits(model, {"default": 0.3, "a": -1.0, "b": 2}, "mixed")
    assert rk.active_edit(model) == "default"
    for site, parts in rk.edit_parameters(model, "mixed").items():
        own = {edit: values[edit][site] for edit in values}
        changes = {
            part: sum(
                weight * (own[edit][part].double() - float(part == "scale"))
                for edit, weight in {"default": 0.3, "a": -1.0, "b": 2}.items()
            )
            for part in ("scale", "bias")
        }
        assert torch.equal(parts["scale"], (1.0 + changes["scale"]).float())
        assert torch.equal(parts["bias"], changes["bias"].float())


@pytest.mark.parametrize("kind", ["scaling", "bias"])
def test_combine_of_one_is_a_copy(kind):
    model, values = several(kind=kind)
    rk.combine_edits(model, {"a": 1.0}, "same")
    rk.switch_edit(model, "same")
    hold(logits(model), values["a"])


def _wrong(call, error, match, kind="all"):
    return pytest.param(call, error, match, kind, id=f"{call.__code__.co_names[1]}-{match[:20]}")


@pytest.mark.parametrize(
    ("call", "error", "match", "kind"),
    [
        _wrong(lambda model: rk.add_edit(model, "a"), ValueError, "name: the model has an edit 'a' already"),
        _wrong(lambda model: rk.add_edit(model, "default"), ValueError, "name: the model has an edit 'default'"),
        _wrong(lambda model: rk.add_edit(model, "x.y"), ValueError, "name: got 'x.y'"),
        _wrong(lambda model: rk.add_edit(model, ""), ValueError, "name: got ''"),
        _wrong(lambda model: rk.add_edit(model, "scale"), ValueError, "name: got 'scale'"),
        _wrong(lambda model: rk.add_edit(model, "forward"), ValueError, "name: got 'forward'"),
        _wrong(lambda model: rk.add_edit(model, "selection"), ValueError, "name: got 'selection'"),
        _wrong(lambda model: rk.add_edit(model, 3), TypeError, "name: got 3, expected a string"),
        _wrong(lambda model: rk.add_edit(model, "c", "z"), ValueError, "copy_of: got 'z'.*'default', 'a', 'b'"),
        _wrong(lambda model: rk.switch_edit(model, "z"), ValueError, "name: got 'z', expected one of .*'default', 'a'"),
        _wrong(lambda model: rk.switch_edit(model, None), ValueError, "name: got None"),
        _wrong(lambda model: rk.delete_edit(model, "z"), ValueError, "name: got 'z'"),
        _wrong(lambda model: rk.delete_edit(model, "b"), ValueError, "'b': it is the active edit"),
        _wrong(lambda model: rk.delete_edit(model, "default"), ValueError, "'default' is the edit that rk.patch made"),
        _wrong(lambda model: rk.combine_edits(model, {"a": 1.0}, "b"), ValueError, "name: the model has an edit 'b'"),
        _wrong(lambda model: rk.combine_edits(model, {"z": 1.0}, "c"), ValueError, "weights: got 'z'"),
        _wrong(lambda model: rk.combine_edits(model, {}, "c"), TypeError, "weights: got {}"),
        _wrong(lambda model: rk.combine_edits(model, ["a"], "c"), TypeError, "weights: got .'a'."),
        _wrong(lambda model: rk.combine_edits(model, {"a": "1"}, "c"), TypeError, "weights: got '1' for 'a'"),
        _wrong(lambda model: rk.combine_edits(model, {"a": True}, "c"), TypeError, "weights: got True for 'a'"),
        _wrong(lambda model: rk.combine_edits(model, {"a": float("nan")}, "c"), TypeError, "weights: got nan for 'a'"),
        _wrong(lambda model: rk.combine_edits(model, {"a": 1.0}, "x.y"), ValueError, "name: got 'x.y'"),
        _wrong(lambda model: rk.combine_edits(model, {"a": 1.0}, "c"), ValueError, "kind 'ln'", kind="ln"),
        _wrong(lambda model: rk.edit_parameters(model, "z"), ValueError, "name: got 'z'"),
    ],
)
def test_errors_change_nothing(call, error, match, kind):
    model, _ = several(kind=kind)
    rk.switch_edit(model, "b")
    before = snapshot(model)
    with pytest.raises(error, match=match):
        call(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "call",
    [
        rk.edit_names,
        rk.active_edit,
        lambda model: rk.add_edit(model, "a"),
        lambda model: rk.switch_edit(model, "default"),
        lambda model: rk.delete_edit(model, "a"),
        lambda model: rk.combine_edits(model, {"default": 1.0}, "a"),
        lambda model: rk.disable_edits(model).__enter__(),
    ],
)
def test_a_model_that_is_not_patched(call):
    with pytest.raises(ValueError, match="this LlamaForCausalLM is not patched"):
        call(zoo.tiny(NAME))


def test_no_edits_are_added_behind_a_wrapper():
    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model, _ = several()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"DistributedDataParallel.*before wrapping"):
        rk.add_edit(DistributedDataParallel(model), "c")
    assert_unchanged(model, before)


def step(model, optimizer):
    model(**zoo.inputs(NAME)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_an_optimizer_keeps_to_its_edit():
    """Training one edit leaves the others' values and gives them no gradient; switching back goes on with its state."""
    model, values = several()
    alone = zoo.tiny(NAME)
    rk.patch(alone)
    zoo.fill(rk.edit_parameters(alone), values["a"])

    def of(edit):
        return [vector for parts in rk.edit_parameters(model, edit).values() for vector in parts.values()]

    optimizers = {edit: torch.optim.AdamW(of(edit), lr=0.1, weight_decay=0.0) for edit in ("a", "b")}
    peer = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for turn in ("a", "b", "a"):
        before = {edit: [vector.detach().clone() for vector in of(edit)] for edit in values}
        rk.switch_edit(model, turn)
        step(model, optimizers[turn])
        for edit in values:
            same = [torch.equal(*pair) for pair in zip(of(edit), before[edit], strict=True)]
            assert not any(same) if edit == turn else all(same)
            assert edit == turn or all(vector.grad is None for vector in of(edit))
        if turn == "a":
            step(alone, peer)
        rk.add_edit(model, f"new{turn}{len(rk.edit_names(model))}")  # must not disturb what is trained
    own, wanted = rk.edit_parameters(model, "a"), rk.edit_parameters(alone)
    assert all(torch.equal(own[site][part], vector) for site, parts in wanted.items() for part, vector in parts.items())


def test_half_keeps_the_vectors():
    model, values = several()
    model.half()
    rk.add_edit(model, "late", copy_of="a")
    for edit in ("default", "a", "b", "late"):
        for site, parts in rk.edit_parameters(model, edit).items():
            for part, vector in parts.items():
                assert vector.dtype == torch.float32
                assert torch.equal(vector, values["a" if edit == "late" else edit][site][part])
    rk.switch_edit(model, "late")
    assert logits(model).dtype == torch.float16


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent(how):
    model, values = several()
    rk.switch_edit(model, "a")
    before = logits(model)

    def copied():
        if how == "deepcopy":
            return copy.deepcopy(model)
        if how == "pickle":
            return pickle.loads(pickle.dumps(model))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    with rk.disable_edits(model), rk.use_edits(model, ["b", None]):  # blocks of the original are not the copy's
        other = copied()
    assert rk.edit_names(other) == ("default", "a", "b")
    assert rk.active_edit(other) == "a"
    assert torch.equal(logits(other), before)
    rk.switch_edit(other, "b")
    assert (rk.active_edit(model), rk.active_edit(other)) == ("a", "b")
    hold(logits(other), values["b"])
    assert torch.equal(logits(model), before)
    assert len({id(own.selection) for own in edit_modules(other).values()}) == 1
    rk.unpatch(other)
    hold(logits(other), None)


def test_state_dict_has_all_and_loads_into_the_like():
    model, values = several()
    other, _ = several()
    for edit in values:
        zoo.fill(rk.edit_parameters(other, edit), cases.values(rk.edit_parameters(other, edit), seed=9))
    other.load_state_dict(model.state_dict())
    for edit in values:
        rk.switch_edit(other, edit)
        assert torch.equal(logits(other), single(values=values[edit]))
    fewer, _ = several(names=("a",))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*red_edit\.b\.scale"):
        fewer.load_state_dict(model.state_dict())


def test_unpatch_takes_all_away():
    model, _ = several(position="res_with_attn")
    rk.switch_edit(model, "b")
    with rk.disable_edits(model), rk.use_edits(model, ["a", "b"]):
        rk.unpatch(model)
    plain = zoo.tiny(NAME)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not any(module._forward_hooks for module in model.modules())
    hold(logits(model), None)
    rk.patch(model)
    assert rk.edit_names(model) == ("default",)


def test_with_lora_beside():
    """LoRA's wrapper takes nothing from the edits by name."""
    model, values = several()
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    rk.switch_edit(peft, "b")
    assert rk.active_edit(model) == "b"
    hold(logits(peft), values["b"])


def test_adapters_of_a_tuner_are_left_to_it():
    model = get_peft_model(zoo.tiny(NAME), RedPeftConfig(task_type="CAUSAL_LM"))
    for call in (
        lambda: rk.add_edit(model, "a"),
        lambda: rk.switch_edit(model, "default"),
        lambda: rk.delete_edit(model, "default"),
        lambda: rk.combine_edits(model, {"default": 1.0}, "a"),
    ):
        with pytest.raises(ValueError, match="model: its edits are adapters of a tuner"):
            call()
    with torch.no_grad():
        for parts in rk.edit_parameters(model, "default").values():
            parts["bias"].add_(1.0)
    edited = logits(model)
    with rk.disable_edits(model):
        hold(logits(model), None)
    assert torch.equal(logits(model), edited)
    assert not torch.allclose(edited, logits(zoo.tiny(NAME)))


def test_hot_swap_without_recompiling():
    """New values in place, and edits that were active before, run what was compiled; only a new name compiles."""
    torch.compiler.reset()
    model, values = several()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def check(edit_values):
        hold(logits(compiled), edit_values)

    check(values["default"])
    assert counter.frame_count == 1
    for seed in (20, 21):
        fresh = cases.values(rk.edit_parameters(model), seed=seed)
        zoo.fill(rk.edit_parameters(model), fresh)
        check(fresh)
    assert counter.frame_count == 1
    rk.switch_edit(model, "a")
    check(values["a"])
    assert counter.frame_count == 2
    for edit, now in (("default", fresh), ("a", values["a"]), ("default", fresh)):
        rk.switch_edit(model, edit)
        check(now)
    with torch.no_grad():
        for parts in rk.edit_parameters(model, "a").values():
            parts["scale"].fill_(0.5)
    rk.switch_edit(model, "a")
    check({site: {**parts, "scale": torch.full_like(parts["scale"], 0.5)} for site, parts in values["a"].items()})
    assert counter.frame_count == 2


def test_files_are_swapped_in_without_recompiling(tmp_path):
    torch.compiler.reset()
    model, values = several()
    for edit in ("a", "b"):
        rk.switch_edit(model, edit)
        rk.save_edits(model, tmp_path / edit)
    served = zoo.tiny(NAME)
    rk.patch(served)
    counter = CompileCounter()
    compiled = torch.compile(served, backend=counter, fullgraph=True)
    for edit in ("a", "b", "a"):
        rk.load_edits(served, tmp_path / edit)
        hold(logits(compiled), values[edit])
    assert counter.frame_count == 1
