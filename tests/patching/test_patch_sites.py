"""What hangs on the site, its FFN, its dropout or its vectors while the edit is fused; the dtypes that norms see."""

from __future__ import annotations

from typing import Any

import model_zoo as zoo
import pytest
import torch
from patch_helpers import (
    Watch,
    batch_for,
    compare,
    leave_note,
    loss_and_backward,
    patched_and_peer,
    stack_running,
    watching,
)
from torch import Tensor, nn

from red_kernels.edits.config import RedConfig
from red_kernels.edits.find import edit_parameters
from red_kernels.fusion.norms import norm_arguments
from red_kernels.fusion.sums import take_note
from red_kernels.patching.classes import patch_norm
from red_kernels.patching.patch import patch, unpatch

FEW = ["llama", "gemma2", "gpt2", "opt", "opt_post_norm", "bert", "t5", "vit"]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return watching(monkeypatch)


def ffn_of(model: nn.Module, name: str) -> nn.Module:
    """The module around the first site; the site itself where there is none."""
    site = zoo.sites(name)[0]
    parent = model.get_submodule(site.rpartition(".")[0])
    return model.get_submodule(site) if name.startswith("opt") else parent


@pytest.mark.parametrize("change", [False, True])
@pytest.mark.parametrize("where", ["site", "ffn"])
@pytest.mark.parametrize("name", FEW)
def test_a_hook_sees_the_edited_output(name: str, where: str, change: bool) -> None:
    """Whoever hooks the site or the FFN finds there what the plain composition has: the edited output."""

    def run(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        module = model.get_submodule(zoo.sites(name)[0]) if where == "site" else ffn_of(model, name)

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            output.retain_grad()
            seen.append(output)
            return output * 1.5 if change else None

        module.register_forward_hook(hook)
        result = loss_and_backward(model, batch)
        gradient = seen[0].grad
        assert gradient is not None
        return {**result, "seen": seen[0].detach(), "gradient": gradient}

    compare(name, run)


@pytest.mark.parametrize("where", ["site", "ffn"])
@pytest.mark.parametrize("name", FEW)
def test_a_full_backward_hook_sees_the_gradient_of_the_edited_output(name: str, where: str) -> None:
    def run(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        module = model.get_submodule(zoo.sites(name)[1])
        if where == "ffn" and not name.startswith("opt"):
            module = model.get_submodule(zoo.sites(name)[1].rpartition(".")[0])
        module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].clone()))
        result = loss_and_backward(model, batch)
        return {**result, "gradient": seen[0]}

    compare(name, run)


@pytest.mark.parametrize("name", FEW)
def test_a_pre_hook_on_the_site_changes_its_input(name: str) -> None:
    def run(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        model.get_submodule(zoo.sites(name)[0]).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        return loss_and_backward(model, batch)

    compare(name, run)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "bert", "t5", "vit"])
def test_a_hook_on_the_dropout(name: str) -> None:
    def run(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.register_forward_hook(lambda module, args, output: output * 1.25)
        return loss_and_backward(model, batch)

    compare(name, run)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit"])
def test_another_dropout(name: str) -> None:
    class Scaled(nn.Module):
        p = 0.0

        def forward(self, x: Tensor) -> Tensor:
            return x * 1.25

    def run(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        for module in list(model.modules()):
            for key, child in list(module.named_children()):
                if isinstance(child, nn.Dropout):
                    setattr(module, key, Scaled())
        return loss_and_backward(model, batch)

    compare(name, run)


@pytest.mark.parametrize("name", FEW)
def test_a_hook_on_the_vectors(name: str) -> None:
    """The vectors' module is called where something hangs on it."""
    model, unfused, truth = patched_and_peer(name)
    own = model.get_submodule(zoo.sites(name)[0] + ".red_edit")
    calls: list[int] = []
    own.register_forward_hook(lambda *_: calls.append(1))
    results = [loss_and_backward(one, batch_for(one, name))["logits"] for one in (model, unfused.model, truth.model)]
    zoo.assert_as_exact("logits", *results)
    assert calls


@pytest.mark.parametrize("name", FEW)
def test_an_ffn_replaced_since(name: str) -> None:
    class Other(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            for key, child in inner.named_children():
                self.add_module(key, child)

        def forward(self, *args: Any) -> Any:
            return self.inner(*args) * 1.5

    if name in ("bert", "opt", "opt_post_norm"):
        pytest.skip("the site is called by the layer itself")

    def run(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
        parent, _, key = zoo.sites(name)[0].rpartition(".")[0].rpartition(".")
        setattr(model.get_submodule(parent), key, Other(getattr(model.get_submodule(parent), key)))
        return loss_and_backward(model, batch)

    model, unfused, truth = patched_and_peer(name)
    results = [run(one, batch_for(one, name))["logits"] for one in (model, unfused.model, truth.model)]
    zoo.assert_as_exact("logits", *results)


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_t5_clamps_in_float16(name: str, watch: Watch) -> None:
    """The block replaces its output there: a note on it would never be taken."""
    compare(name, loss_and_backward, torch.float16)
    assert not watch.left
    compare(name, loss_and_backward, torch.bfloat16)
    assert watch.left
    assert watch.taken == watch.left


@pytest.mark.parametrize("name", ["t5", "t5_gated"])
def test_a_site_kept_in_float32(name: str, watch: Watch) -> None:
    """As transformers keeps T5's: the stream is float32 from then on, and the norms bring it back."""

    def prepare(model: nn.Module) -> None:
        if next(model.parameters()).dtype != torch.float64:
            for site in zoo.sites(name):
                model.get_submodule(site).float()

    compare(name, loss_and_backward, torch.bfloat16, prepare=prepare)
    assert not watch.left


def known(norm: nn.Module) -> nn.Module:
    """A norm as it is in a patched model."""
    assert patch_norm(norm)
    return norm


def test_a_norm_in_no_patched_model() -> None:
    assert norm_arguments(nn.LayerNorm(8), torch.randn(2, 8), None) is None


def test_norms_under_autocast() -> None:
    norm = known(nn.LayerNorm(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert norm_arguments(norm, torch.randn(2, 8), None) is not None
        assert norm_arguments(norm.bfloat16(), torch.randn(2, 8).bfloat16(), None) is None
    assert norm_arguments(norm, torch.randn(2, 8).bfloat16(), None) is not None
    assert norm_arguments(norm, torch.randn(2, 8).bfloat16(), torch.randn(2, 8)) is None


def test_norms_whose_parameters_are_no_plain_tensors_beside_the_input() -> None:
    x = torch.randn(2, 8)
    assert norm_arguments(known(nn.LayerNorm(8, elementwise_affine=False)), x, None) is not None
    assert norm_arguments(known(nn.LayerNorm(8, device="meta")), x, None) is None
    norm = known(nn.LayerNorm(8))
    weight = norm.weight
    del norm.weight  # as FSDP does with its own views
    norm.weight = weight.detach()
    assert norm_arguments(norm, x, None) is None

    class Sharded(Tensor):
        pass

    norm = known(nn.LayerNorm(8))
    norm.weight = nn.Parameter(norm.weight.detach().as_subclass(Sharded))
    assert norm_arguments(norm, x, None) is None
    assert norm_arguments(known(nn.LayerNorm(8)), x.as_subclass(Sharded), None) is None
    assert norm_arguments(known(nn.LayerNorm(8)), x, x.as_subclass(Sharded)) is None
    assert norm_arguments(known(nn.LayerNorm(8)), x, None) is not None
    assert not patch_norm(nn.BatchNorm1d(8))
    assert norm_arguments(nn.BatchNorm1d(8), x, None) is None


def test_a_note_is_for_one_norm_and_one_weight() -> None:
    model = zoo.tiny("llama")
    patch(model, RedConfig())
    first, last = (model.get_submodule(path) for path in ("model.layers.1.input_layernorm", "model.norm"))
    with torch.no_grad():
        z = torch.randn(2, 3, zoo.HIDDEN)
        normed = torch.randn(2, 3, zoo.HIDDEN)
        with stack_running(model.get_submodule("model")):
            leave_note(z, normed, last)
            torch.testing.assert_close(take_note(first, z), first(z))  # another norm gives its own value
            assert take_note(last, z) is None, "a note is gone once a norm has seen it"
            leave_note(z, normed, last)
            swapped = {"weight": torch.randn(zoo.HIDDEN)}
            assert not torch.equal(torch.func.functional_call(last, swapped, (z,)), normed)
            leave_note(z, normed, last)
            assert torch.equal(last(z), normed)
            assert not torch.equal(last(z), normed)
            leave_note(z, normed, last)
        assert not torch.equal(last(z), normed), "the stack has ended"


def test_the_base_stays_frozen_and_the_vectors_train() -> None:
    model = zoo.tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    patch(model, RedConfig())
    vectors = [vector for parts in edit_parameters(model).values() for vector in parts.values()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**zoo.inputs("llama")).loss.backward()
    optimizer.step()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert all(vector.grad is not None and bool(vector.grad.any()) for vector in vectors)


@pytest.mark.parametrize(
    "cast",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float16),
    ],
)
def test_vectors_keep_their_precision(cast: Any) -> None:
    model, _, _ = patched_and_peer("llama")
    before = {site: {part: value.clone() for part, value in parts.items()} for site, parts in vectors_of(model).items()}
    cast(model)
    assert next(model.parameters()).dtype.itemsize == 2
    for site, parts in vectors_of(model).items():
        for part, value in parts.items():
            assert value.dtype == torch.float32
            assert torch.equal(value, before[site][part])
            assert value.requires_grad
    loss_and_backward(model, batch_for(model, "llama"))
    model.double()
    assert all(value.dtype == torch.float64 for parts in vectors_of(model).values() for value in parts.values())


def vectors_of(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    return edit_parameters(model)


def test_one_module_in_two_layers() -> None:
    """Its edit is one, and applied wherever the module is called."""
    model = zoo.tiny("llama")
    layers = model.get_submodule("model.layers")
    layers.get_submodule("2.mlp").down_proj = layers.get_submodule("0.mlp").down_proj
    sites = zoo.sites("llama")[:2]
    values = zoo.vectors(sites)
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    with pytest.warns(UserWarning, match=r"not edited.*model\.layers\.2"):
        report = patch(model, RedConfig())
    assert [site.site for site in report.sites] == sites
    zoo.fill(edit_parameters(model), values)
    for _ in range(3):
        for one in (model, unfused.model, truth.model):
            one.zero_grad()
        results = [
            loss_and_backward(one, batch_for(one, "llama"))["logits"] for one in (model, unfused.model, truth.model)
        ]
        zoo.assert_as_exact("logits", *results[:3])
        found, plain, exact = zoo.gradients(edit_parameters(model)), unfused.gradients(), truth.gradients()
        for key in exact:
            zoo.assert_as_exact(key, found[key], plain[key], exact[key])
        for vector in (*vectors(unfused), *vectors(truth)):
            vector.grad = None


def vectors(peer: zoo.Unfused) -> list[nn.Parameter]:
    return [vector for parts in peer.vectors.values() for vector in parts.values()]


def test_layers_beside_the_known_ones_are_named() -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
            self.language = zoo.tiny("llama")

    with pytest.warns(UserWarning, match=r"not edited: the 2 layers of blocks; .*stacks='other'"):
        report = patch(Tower(), RedConfig())
    assert [site.site for site in report.sites] == [f"language.{site}" for site in zoo.sites("llama")]


def test_parameters_renamed_since_are_named_by_unpatch() -> None:
    model = zoo.tiny("llama")
    patch(model, RedConfig())
    head = model.get_submodule("lm_head")
    del model.lm_head
    model.other_head = head
    with pytest.warns(UserWarning, match="stay frozen: lm_head.weight"):
        unpatch(model)
    assert not head.weight.requires_grad
    assert all(parameter.requires_grad for key, parameter in model.named_parameters() if "head" not in key)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "model"),
        ("gpt2", "transformer"),
        ("bert", "bert"),
        ("t5", "encoder"),
        ("vit", "vit"),
        ("opt", "model"),
    ],
)
def test_the_inner_model_by_itself(name: str, kind: str, watch: Watch) -> None:
    """The stack may be the model, or anywhere in it."""
    model = zoo.tiny(name)
    inner = model.get_submodule(kind)
    values = {site: vector for site, vector in zoo.vectors(zoo.sites(name)).items() if site.startswith(kind)}
    unfused, truth = zoo.Unfused(model, values), zoo.exact(model, values)
    report = patch(inner, RedConfig())
    assert [f"{kind}.{site.site}" for site in report.sites] == list(values)
    zoo.fill(edit_parameters(model), values)
    for _ in range(2):
        watch.clear()
        results = [
            loss_and_backward(one, batch_for(one, name))["logits"] for one in (model, unfused.model, truth.model)
        ]
        zoo.assert_as_exact("logits", *results[:3])
        assert watch.taken == watch.left
        assert len(watch.across) == (len(values) if name in zoo.HANDING_ON else 0)
    unpatch(model)
    assert not any("red_edit" in key for key in model.state_dict())


@pytest.mark.parametrize("name", FEW)
def test_vectors_that_are_no_parameters_for_the_time_being(name: str) -> None:
    """As FSDP's first version leaves its modules: views in the place of Parameters."""
    model, unfused, truth = patched_and_peer(name)
    for site in zoo.sites(name):
        own = model.get_submodule(f"{site}.red_edit")
        for part in ("scale", "bias"):
            view = getattr(own, part) * 1.0
            delattr(own, part)
            setattr(own, part, view)
    results = [loss_and_backward(one, batch_for(one, name))["logits"] for one in (model, unfused.model, truth.model)]
    zoo.assert_as_exact("logits", *results[:3])


def test_a_module_that_is_never_called():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"'0.out_proj' is inside an nn.MultiheadAttention.*never be applied"):
        patch(model, RedConfig(sites="*.out_proj"))
    assert not hasattr(model[0].out_proj, "red_edit")


def test_a_site_that_returns_no_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model = nn.Sequential(Pair(4, 4))
    patch(model, RedConfig(sites="0"))
    with pytest.raises(TypeError, match="must be one tensor, got tuple"):
        model(torch.ones(1, 4))
