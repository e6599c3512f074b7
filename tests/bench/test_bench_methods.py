"""The benchmarked methods: what each trains, that it begins as the frozen model, and that the floor is one."""

from __future__ import annotations

import builtins
import functools
import re

import model_zoo as zoo
import pytest
import torch
from patch_helpers import is_edited, operations_run
from torch import nn

import red_kernels as rk
from benchmarks import methods
from benchmarks.methods.linears import KEYS, QUERIES, VALUES, named

MODELS = ("roberta", "llama", "gpt2", "t5")
PLAIN = tuple(name for name in methods.METHODS if "compile" not in name and name not in methods.KIND_METHODS)
OF_THE_BASE = ("full", "bitfit", "beft")  # they train the base's own weights
EAGER = tuple(name for name in PLAIN if name != "linear-probe")
D, F, LAYERS, RANK = zoo.HIDDEN, zoo.INNER, zoo.LAYERS, methods.RANK
# What has no gradient as long as a factor that it is multiplied by is 0, as each method's last one is at the start.
WAITING = re.compile(
    r"lora_A|vera_lambda_d|neighbour\.(first|down|tensor\.(width|heads|layers|kinds)|second\.cores\.[0-2]|up\.cores\.[0-3])"
)


def step(prepared: methods.Prepared, batch: dict, rate: float) -> float:
    optimizer = torch.optim.AdamW(prepared.trained, lr=rate, weight_decay=0.0) if prepared.trained else None
    with prepared.active():
        loss = prepared.model(**batch).loss
        loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def stacks(kind: str) -> list[str]:
    """One letter for each layer: those of a decoder behind an encoder have two attentions."""
    return ["e"] * LAYERS + (["d"] * (LAYERS - 1) if kind == "t5" else [])


def expected_count(kind: str, method: str) -> int | None:
    """Written down by hand from the configurations: the trainable numbers of a method, or None for none here."""
    layers = stacks(kind)
    attentions = sum(2 if letter == "d" else 1 for letter in layers)
    key = D // zoo.HEADS * 2 if kind == "llama" else D  # two heads for keys and values
    if method in ("red", "naive"):
        return len(layers) * 2 * D
    if method.startswith("frozen"):
        return 0
    if method == "lora-qv":
        if kind == "gpt2":
            return LAYERS * RANK * (D + 3 * D)
        return attentions * RANK * (D + D + D + key)
    if method in ("lora-all", "lora-all-r1"):
        rank = RANK if method == "lora-all" else 1
        attention = rank * (D + 3 * D + 2 * D) if kind == "gpt2" else rank * (2 * 2 * D + 2 * (D + key))
        return attentions * attention + len(layers) * rank * (D + F) * (3 if kind == "llama" else 2)
    if method == "beft":
        return attentions * key
    if method == "ln-tuning":
        return (attentions + len(layers)) * D * (1 if kind in ("llama", "t5") else 2)
    if method == "red-attn" and kind != "t5":
        return len(layers) * 2 * D
    if method == "ia3":
        if kind == "gpt2":
            return LAYERS * (3 * D + F)
        # RoBERTa's default also matches the attention's output layer, whose input is of width D.
        return attentions * 2 * key + len(layers) * F + (LAYERS * D if kind == "roberta" else 0)
    if method == "bitfit" and kind in ("llama", "t5"):
        attention = 2 * D + 2 * key
        return attentions * attention + len(layers) * ((2 * F if kind == "llama" else F) + D)
    return expected_of_neighbour(kind, method, len(layers), attentions, key)


def expected_of_neighbour(kind: str, method: str, layers: int, attentions: int, key: int) -> int | None:
    """The same for RED's neighbours; GPT-2 has queries, keys and values in one layer."""
    queried = [3 * D] if kind == "gpt2" else [D, key]  # outputs of the layers of queries and values
    if method == "road":
        return attentions * (2 * D + 2 * key) + layers * ((2 * F if kind == "llama" else F) + D)
    if method == "vera":
        return attentions * sum(out + 256 for out in queried)
    if method == "hra":
        return attentions * len(queried) * RANK * D
    if method in ("sara", "spt"):
        return expected_count(kind, "lora-all")
    if method == "lorta":
        return RANK * (D + D // zoo.HEADS + zoo.HEADS + attentions + 4)
    if method == "melora":
        return attentions * sum(D + out for out in queried)
    trains = {32: (2, 4, 4), 16: (2, 2, 4), 96: (4, 4, 6)}  # by hand: 5 x (first + last) + 25 x the others
    if method == "loretta-rep":
        into = 5 * (RANK + 4) + 25 * (2 + 4)
        out = [5 * (trains[own][2] + RANK) + 25 * (trains[own][1] + trains[own][0]) for own in queried]
        return attentions * sum(into + own for own in out)
    if method == "loretta-adp":
        down, up = 5 * (8 + 4) + 25 * (8 + 2 + 4), 5 * (4 + 8) + 25 * (4 + 2 + 8)
        return (attentions + layers) * (down + up + 64 + D)
    return None


@pytest.mark.parametrize("method", EAGER)
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_changes_what_the_method_trains_and_nothing_else(kind: str, method: str) -> None:
    base = zoo.tiny(kind)
    batch = zoo.inputs(kind)
    with torch.no_grad():
        before = base(**batch).logits
    values = {name: own.detach().clone() for name, own in base.named_parameters()}
    model = methods.sister(base)
    if method in OF_THE_BASE:
        model = zoo.tiny(kind)  # these change the base's own weights
    if (kind, method) == ("gpt2", "beft"):
        with pytest.raises(ValueError, match="one layer gives its values with queries and keys"):
            methods.prepare(method, model)
        return
    prepared = methods.prepare(method, model, batches=[batch])
    with prepared.active(), torch.no_grad():
        truth = zoo.exact(base, {})
        exactly = truth.model(**batch).logits
        zoo.assert_as_exact(f"{kind} {method}", prepared.model(**batch).logits, before, exactly)

    wanted = expected_count(kind, method)
    if wanted is not None:
        assert prepared.trainable == wanted
    if method == "full":
        assert prepared.trainable == sum(own.numel() for own in values.values())
    if method == "bitfit" and kind in ("roberta", "gpt2"):
        assert prepared.trainable == sum(own.numel() for name, own in values.items() if name.endswith(".bias"))

    assert {id(own) for own in prepared.trained} == {
        id(own) for own in prepared.model.parameters() if own.requires_grad
    } or method == "naive"  # whose vectors are not in the model
    whole = [*prepared.model.parameters(), *(prepared.trained if method == "naive" else [])]
    old = [own.detach().clone() for own in whole]
    trained = {id(own) for own in prepared.trained}
    step(prepared, batch, 0.0)
    step(prepared, batch, 1e-2)
    names = {id(own): name for name, own in prepared.model.named_parameters()}
    for own, former in zip(whole, old, strict=True):
        changed = not torch.equal(own, former)
        if id(own) not in trained:
            assert not changed
        elif not WAITING.search(names.get(id(own), "")):
            assert changed, names.get(id(own))
    if method not in OF_THE_BASE:
        assert all(torch.equal(own, values[name]) for name, own in base.named_parameters())


def test_sisters_share_memory_and_nothing_else() -> None:
    base = zoo.tiny("gpt2").requires_grad_(False)
    other = methods.sister(base)
    pairs = list(zip(base.named_parameters(), other.named_parameters(), strict=True))
    assert pairs
    for (name, own), (same, theirs) in pairs:
        assert name == same
        assert own is not theirs
        assert own.data_ptr() == theirs.data_ptr()
        assert not theirs.requires_grad
    assert other.lm_head.weight is other.transformer.wte.weight  # tied as before
    methods.prepare("red", other)
    assert not any("red_edit" in name for name, _ in base.named_modules())
    assert not any(own._forward_hooks for own in base.modules())


@pytest.mark.parametrize(
    ("kind", "function"),
    [("llama", "edit_add_rms_norm"), ("gpt2", "edit_add_layer_norm"), ("roberta", "edit_add_layer_norm")],
)
def test_the_floor_runs_the_same_fused_norms_without_edits(
    kind: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, base = zoo.inputs(kind), zoo.tiny(kind)
    calls = operations_run(monkeypatch)
    step(methods.prepare("red", methods.sister(base)), batch, 0.0)
    ours = [is_edited(own) for operation, own in calls if operation == function]
    assert ours.count(True) == LAYERS
    calls.clear()
    step(methods.prepare("frozen-fused", methods.sister(base)), batch, 0.0)
    assert [is_edited(own) for operation, own in calls if operation == function] == [False] * len(ours)


@pytest.mark.parametrize("method", ["frozen-fused", "frozen"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_floor_s_backward_goes_through_all_layers_behind_the_first_site(kind: str, method: str) -> None:
    batch, base = zoo.inputs(kind), zoo.tiny(kind)
    reached: dict[str, torch.Tensor] = {}

    def record(model: nn.Module) -> None:
        for site in zoo.sites(kind):
            model.get_submodule(site).register_forward_hook(
                lambda module, args, output, site=site: (
                    output.register_hook(lambda gradient: reached.__setitem__(site, gradient.clone())) and None
                )
            )

    gradients = []
    for name in ("naive", method):
        reached.clear()
        model = methods.sister(base)
        prepared = methods.prepare(name, model)
        record(model)
        step(prepared, batch, 0.0)
        gradients.append(dict(reached))
        assert not any(own.grad is not None for own in base.parameters())
    assert gradients[0].keys() == gradients[1].keys() == set(zoo.sites(kind))
    for site, expected in gradients[0].items():
        assert gradients[1][site].abs().sum() > 0
        bound = 64 * torch.finfo(torch.float32).eps * expected.norm()
        assert (gradients[1][site] - expected).norm() <= bound


def test_compiled_methods_compile_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    compiler = functools.partial(torch.compile, backend="aot_eager")

    def compile(model, **options):
        asked.append(options)
        return compiler(model, **options)

    monkeypatch.setattr(torch, "compile", compile)
    base, batch = zoo.tiny("llama"), zoo.inputs("llama")
    losses = {}
    for name in ("red", "red-compile", "naive-compile"):
        prepared = methods.prepare(name, methods.sister(base))
        losses[name] = step(prepared, batch, 0.0)
        assert isinstance(prepared.model, torch._dynamo.OptimizedModule) == ("compile" in name)
    assert asked == [{"dynamic": False}] * 2
    assert max(losses.values()) - min(losses.values()) <= 16 * torch.finfo(torch.float32).eps * losses["red"]


@pytest.mark.parametrize("method", [name for name in methods.QUALITY_METHODS if name in PLAIN])
def test_a_head_is_trained_in_fp32_by_every_method(method: str) -> None:
    base = zoo.tiny("roberta").bfloat16()
    head = [name for name, _ in base.named_parameters() if name.startswith("classifier.")]
    model = methods.sister(base)
    own = dict(model.named_parameters())
    prepared = methods.prepare(method, model, head=head, batches=[zoo.inputs("roberta")])
    assert {id(own[name]) for name in head} <= {id(each) for each in prepared.trained}
    assert len({id(each) for each in prepared.trained}) == len(prepared.trained)
    before = {name: own[name].detach().clone() for name in head}
    step(prepared, zoo.inputs("roberta"), 1e-6)  # bf16 would lose a change as small as this
    assert all(own[name].dtype == torch.float32 and not torch.equal(own[name], before[name]) for name in head)
    if method == "linear-probe":
        assert prepared.trainable == sum(own[name].numel() for name in head)


@pytest.mark.parametrize("method", methods.KIND_METHODS)
def test_other_kinds_of_edit(method: str) -> None:
    """Each trains its edits and a head, and begins as the frozen model unless it says otherwise."""
    base, batch = zoo.tiny("roberta", hidden_size=64), zoo.inputs("roberta")
    frozen = base(**batch).logits
    torch.manual_seed(0)
    prepared = methods.prepare(method, methods.sister(base), head=["classifier.out_proj.bias"])
    at_start = prepared.model(**batch).logits
    assert torch.allclose(at_start, frozen, rtol=1e-4, atol=1e-5) == prepared.as_frozen
    trained = {id(own) for parts in rk.edit_parameters(prepared.model).values() for own in parts.values()}
    assert len(prepared.trained) == len(trained) + 1
    before = step(prepared, batch, 1e-3)
    assert all(torch.isfinite(own).all() for own in prepared.trained)
    assert step(prepared, batch, 0.0) != before


def test_the_probe_of_a_language_model_is_its_untied_output_projection() -> None:
    base = zoo.tiny("gpt2").bfloat16()
    model = methods.sister(base)
    prepared = methods.prepare("linear-probe", model)
    embeddings = base.transformer.wte.weight.detach().clone()
    assert prepared.trainable == embeddings.numel()
    assert prepared.trained[0].dtype == torch.float32
    step(prepared, zoo.inputs("gpt2"), 1e-2)
    assert torch.equal(model.transformer.wte.weight, embeddings)
    assert torch.equal(base.lm_head.weight, embeddings)
    assert not torch.equal(model.lm_head.weight, embeddings)
    assert base.config.tie_word_embeddings


def test_other_families_get_explicit_names() -> None:
    names = named(methods.block_linears(zoo.tiny("distilbert")), KEYS, VALUES)
    assert len(names) == 2 * LAYERS
    prepared = methods.prepare("ia3", zoo.tiny("distilbert"))
    assert prepared.trainable == LAYERS * (2 * D + F)
    assert methods.prepare("lora-qv", zoo.tiny("neox")).trainable == LAYERS * RANK * (D + 3 * D)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"name: got 'adapters', expected one of 'frozen-fused'"):
        methods.prepare("adapters", zoo.tiny("llama"))
    with pytest.raises(ValueError, match=r"head: the model has no parameter 'score\.weight'"):
        methods.prepare("red", zoo.tiny("llama"), head=["score.weight"])
    with pytest.raises(ValueError, match="linear-probe trains only the head"):
        methods.prepare("linear-probe", zoo.tiny("roberta"))
    with pytest.raises(ValueError, match="batches: got none, but spt chooses"):
        methods.prepare("spt", zoo.tiny("llama"))
    with pytest.raises(ValueError, match="named like queries"):
        named({"0.first": nn.Linear(1, 1)}, QUERIES, VALUES)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(method.missing() is None for method in methods.METHODS.values())
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    right = builtins.__import__

    def absent(name, *args, **options):
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return right(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    import importlib

    of_name = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *args: absent(name) if name == "peft" else of_name(name, *args)
    )
    missing = {name: reason for name, method in methods.METHODS.items() if (reason := method.missing())}
    assert missing.keys() == {
        "lora-qv",
        "lora-all",
        "lora-all-r1",
        "ia3",
        "ln-tuning",
        "road",
        "vera",
        "hra",
        "sara",
        "spt",
    }
    assert all("pip install peft" in reason for reason in missing.values())
    model = zoo.tiny("llama")
    with pytest.raises(ModuleNotFoundError, match="pip install peft"):
        methods.prepare("ia3", model)
    assert rk.patch(model).trainable > 0  # nothing was done to it
