"""SIBO: edits that read what the first layer of their stack was given in the same forward."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import tiny_folders
import torch
from torch import Tensor, nn

import red_kernels as rk
from red_kernels.cli import main
from red_kernels.edits import stream
from red_kernels.models import blocks_in
from red_kernels.patching.naive import naive_edit

KIND = "initial:6"
Gradients = dict[str, Tensor]


def change(model: nn.Module, name: str | None = None, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parts in rk.edit_parameters(model, name).values():
            for vector in parts.values():
                vector += 0.2 * torch.randn(vector.shape, generator=generator)


def patched(name: str = "llama", position: str = "ffn", embeddings: bool = True, **options: Any) -> nn.Module:
    """A patched model whose edits are no identity any more, and whose embeddings may be trained beside them."""
    model = zoo.tiny(name)
    rk.patch(model, rk.RedConfig(position=position, kind=KIND, **options))
    change(model)
    embedded(model).requires_grad_(embeddings)
    return model


def embedded(model: Any) -> Tensor:
    found: Tensor = model.get_input_embeddings().weight
    return found


def by_hooks(name: str, own: nn.Module) -> nn.Module:
    """The same edits as plain hooks: those of sites, and one for each stack that keeps its first input."""
    model = zoo.tiny(name)
    model.requires_grad_(False)
    embedded(model).requires_grad_(embedded(own).requires_grad)
    blocks = blocks_in(model)
    first: dict[str, Tensor] = {}

    def keeping(key: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            first[key] = args[0] if args else kwargs["hidden_states"]

        return hook

    def edit(key: str, down: Tensor, up: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            edited = h + torch.tanh((0.9 * h + 0.1 * first[key].view_as(h)) @ down.t()) @ up
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    stacks = {block.stack: next(one for one in blocks if one.stack == block.stack) for block in blocks}
    for key, block in stacks.items():
        block.module.register_forward_pre_hook(keeping(key), with_kwargs=True)
    model.vectors = nn.ModuleDict()
    for site, parts in rk.edit_parameters(own).items():
        held = nn.ParameterDict({part: vector.detach().clone() for part, vector in parts.items()})
        model.vectors[site.replace(".", "/")] = held
        key = next(one.stack for one in blocks if site == one.name or site.startswith(f"{one.name}."))
        model.get_submodule(site).register_forward_hook(edit(key, held["down"], held["up"]))
    return model


def of_hooks(model: Any) -> Gradients:
    found = {
        f"{site.replace('/', '.')}.{part}": own.grad
        for site, held in model.vectors.items()
        for part, own in held.items()
    }
    return found | ({"embedding": embedded(model).grad} if embedded(model).requires_grad else {})  # type: ignore[dict-item]


def gradients(model: nn.Module, name: str | None = None) -> Gradients:
    parts = rk.edit_parameters(model, name)
    found = {f"{site}.{part}": own.grad for site, held in parts.items() for part, own in held.items()}
    return found | ({"embedding": embedded(model).grad} if embedded(model).requires_grad else {})  # type: ignore[dict-item]


def check(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def logits(model: nn.Module, name: str = "llama", **options: Any) -> Tensor:
    found: Tensor = model(**zoo.inputs(name, **options)).logits
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Any:
    yield
    assert stream._running.top is None


@pytest.mark.parametrize("position", ["ffn", "ffn_attn", "res"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2", "mixtral", "opt", "distilbert", "modernbert"])
def test_as_plain_hooks(name: str, position: str) -> None:
    model = patched(name, position)
    plain = by_hooks(name, model)
    torch.testing.assert_close(logits(model, name), logits(plain, name), rtol=1e-4, atol=1e-5)
    for one in (model, plain):
        one(**zoo.inputs(name)).loss.backward()
    check(gradients(model), of_hooks(plain))


def test_the_stream_behind_an_attention() -> None:
    model = patched("llama", "res_with_attn")
    parts = rk.edit_parameters(model)["model.layers.1.self_attn"]
    found: dict[str, Tensor] = {}
    layer = model.model.layers[1]
    model.model.layers[0].register_forward_pre_hook(lambda module, args: found.update(h0=args[0]))
    layer.register_forward_pre_hook(lambda module, args: found.update(stream=args[0]))
    layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: found.update(added=output))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: found.update(read=args[0]))
    logits(model)
    h = found["stream"] + found["added"]
    expected = h + torch.tanh((0.9 * h + 0.1 * found["h0"]) @ parts["down"].t()) @ parts["up"]
    torch.testing.assert_close(found["read"], expected, rtol=1e-5, atol=1e-6)


def test_the_start_is_the_identity_and_drawn() -> None:
    model = zoo.tiny("llama")
    before = logits(model)
    report = rk.patch(model, rk.RedConfig(kind="initial"))
    torch.testing.assert_close(logits(model), before)
    assert report.trainable == zoo.LAYERS * 2 * 256 * zoo.HIDDEN
    parts = rk.edit_parameters(model)["model.layers.1.mlp.down_proj"]
    assert parts["down"].shape == parts["up"].shape == (256, zoo.HIDDEN)
    assert 0 < parts["down"].abs().max() <= zoo.HIDDEN**-0.5
    assert not parts["up"].any()


def test_several_forwards_before_a_backward() -> None:
    model = patched()
    plain = by_hooks("llama", model)
    for one in (model, plain):
        losses = [one(**zoo.inputs("llama", seed=seed, length=5 + seed)).loss for seed in range(3)]
        sum(reversed(losses)).backward()  # type: ignore[union-attr]
    check(gradients(model), of_hooks(plain))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_checkpointed(name: str, reentrant: bool) -> None:
    """Several forwards, too: each second run reads the first input of its own forward, and gives it its gradient."""
    model = patched(name)
    plain = by_hooks(name, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (model, plain):
        one.train()
        losses = [one(**zoo.inputs(name, seed=seed)).loss for seed in (0, 1)]
        for loss in losses:
            loss.backward()
    check(gradients(model), of_hooks(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_from_what_asks_for_gradients(reentrant: bool) -> None:
    """As with frozen embeddings whose output is a leaf that asks for gradients."""
    model = patched(embeddings=False)
    plain = by_hooks("llama", model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = zoo.inputs("llama")
    embeddings = embedded(model)[batch.pop("input_ids")].detach()
    leaves = []
    for one in (model, plain):
        one.train()
        leaves.append(embeddings.clone().requires_grad_())
        one(inputs_embeds=leaves[-1], **batch).loss.backward()
    check(gradients(model), of_hooks(plain))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_by_a_wrapper_of_the_users(reentrant: bool) -> None:
    """Around several layers, around the whole model, and one inside of the other."""
    from torch.utils.checkpoint import checkpoint

    for whole, parts in ((True, False), (False, True), (True, True)):
        model = patched()
        plain = by_hooks("llama", model)

        if parts:
            for layer in model.model.layers[1:]:
                inner = layer.forward
                layer.forward = lambda hidden, inner=inner, **kwargs: checkpoint(  # type: ignore[misc]
                    lambda hidden, inner=inner, kwargs=kwargs: inner(hidden, **kwargs), hidden, use_reentrant=reentrant
                )
        batch: dict[str, Any] = {**zoo.inputs("llama"), "use_cache": False}  # a second run would add to a cache
        marker = torch.zeros((), requires_grad=True)
        call = lambda marker, model=model, batch=batch: model(**batch).loss + marker  # noqa: E731
        loss = checkpoint(call, marker, use_reentrant=reentrant) if whole else call(marker)
        loss.backward()
        plain(**batch).loss.backward()
        check(gradients(model), of_hooks(plain))


def test_by_row_switched_and_off() -> None:
    model = patched()
    rk.add_edit(model, "b")
    change(model, "b", seed=4)
    single = {"default": logits(model)}
    rk.switch_edit(model, "b")
    single["b"] = logits(model)
    with rk.use_edits(model, ids=["b", "default"]):
        mixed = logits(model)
        mixed.square().sum().backward()
    torch.testing.assert_close(mixed[0], single["b"][0])
    torch.testing.assert_close(mixed[1], single["default"][1])
    base = logits(zoo.tiny("llama"))
    with rk.use_edits(model, ids=[None, "b"]):
        torch.testing.assert_close(logits(model)[0], base[0], rtol=1e-4, atol=1e-5)
    for row, name in ((0, "b"), (1, "default")):
        found = gradients(model, name)
        alone = patched()
        rk.add_edit(alone, "b")
        change(alone, "b", seed=4)
        rk.switch_edit(alone, name)
        logits(alone)[row].square().sum().backward()
        for key, gradient in gradients(alone, name).items():
            if key != "embedding":
                torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-4)
    with rk.disable_edits(model):
        assert torch.equal(logits(model), base)


def test_generate_with_a_cache() -> None:
    for name in ("llama", "t5"):
        model = patched(name)
        plain = by_hooks(name, model)
        inputs = {key: value for key, value in zoo.inputs(name).items() if key != "labels"}
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        for beams in (1, 2):
            found, expected = (one.generate(**inputs, **options, num_beams=beams) for one in (model, plain))
            assert torch.equal(found, expected)


def test_threads_have_their_own() -> None:
    model = patched(embeddings=False)
    batches = [zoo.inputs("llama", seed=seed, length=5) for seed in range(6)]
    expected = [model(**batch).logits.detach() for batch in batches]
    barrier = threading.Barrier(len(batches))
    found: dict[int, Tensor] = {}

    def wait(module: nn.Module, args: Any) -> None:
        barrier.wait(60)

    model.model.layers[1].register_forward_pre_hook(wait)

    def run(at: int) -> None:
        found[at] = model(**batches[at]).logits.detach()
        assert stream._running.top is None

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at, one in enumerate(expected):
        torch.testing.assert_close(found[at], one)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(error: type[BaseException]) -> None:
    model = patched()
    expected = logits(model).detach()
    seen: list[weakref.ref[Tensor]] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))

    def fail(module: nn.Module, args: Any) -> None:
        raise error

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        logits(model)
    handle.remove()
    with pytest.raises(RuntimeError, match=r"mlp.down_proj reads the input of its stack's first layer, but no for"):
        model.model.layers[1].mlp(torch.randn(2, 7, zoo.HIDDEN))
    gc.collect()
    assert seen[-1]() is None
    torch.testing.assert_close(logits(model), expected)


def test_nothing_is_kept_behind_a_forward() -> None:
    model = patched()
    seen: list[weakref.ref[Tensor]] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    with torch.no_grad():
        logits(model)
    model(**zoo.inputs("llama")).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    model(**zoo.inputs("llama")).loss.backward()
    gc.collect()
    assert len(seen) >= 3
    assert all(one() is None for one in seen)


def test_a_part_called_by_itself_is_told() -> None:
    model = patched()
    h = torch.randn(2, 5, zoo.HIDDEN)
    logits(model)
    with pytest.raises(
        RuntimeError, match=r"model.layers.2.mlp.down_proj reads .* no forward of model.layers is running"
    ):
        model.model.layers[2].mlp(h)
    with rk.disable_edits(model):
        torch.testing.assert_close(model.model.layers[2].mlp(h), zoo.tiny("llama").model.layers[2].mlp(h))


def test_an_early_exit_and_later_first_layers() -> None:
    model = patched()
    plain = by_hooks("llama", model)
    for one in (model, plain):
        one.model.layers = one.model.layers[:2]
    with pytest.warns(UserWarning, match="are not in the running model"):
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)
    later, found = patched(), []
    later.model.layers = later.model.layers[1:]
    later.model.layers[0].register_forward_pre_hook(lambda module, args: found.append(args[0]))
    original = stream.initial_of
    with pytest.warns(UserWarning, match="are not in the running model"):
        logits(later)
    assert len(found) == 1
    assert original is stream.initial_of


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_some_layers(layers: list[int]) -> None:
    model = patched(layers=layers)
    plain = by_hooks("llama", model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("train", [False, True])
def test_compiled(train: bool) -> None:
    model = patched()
    plain = by_hooks("llama", model)
    compiled = torch.compile(model, backend="eager")
    for seed in (0, 1):
        batch = zoo.inputs("llama", seed=seed)
        found, expected = (one(**batch) for one in (compiled, plain))
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
        if train:
            found.loss.backward()
            expected.loss.backward()
    if train:
        check(gradients(model), of_hooks(plain))


@pytest.mark.sampled(1)
def test_compiled_layer_by_layer_and_checkpointed() -> None:
    model = patched()
    plain = by_hooks("llama", model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        layer.compile(backend="eager")
    for one in (model, plain):
        one.train()
        one(**zoo.inputs("llama")).loss.backward()
    check(gradients(model), of_hooks(plain))


def test_saved_loaded_copied_and_unpatched(tmp_path: Path) -> None:
    model = patched()
    expected = logits(model)
    rk.save_edits(model, tmp_path)
    assert rk.saved_config(tmp_path).kind == KIND
    other = zoo.tiny("llama")
    rk.patch(other, rk.saved_config(tmp_path))
    rk.load_edits(other, tmp_path)
    for one in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(one), expected)
        rk.unpatch(one)
        for module in one.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not module._forward_hooks_always_called
            assert not any("red_kernels" in key for key in module.__dict__)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="kind 'initial:6', which no layer's weights can express"):
        rk.merge(patched())
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.k_proj is 16 wide, but an edit of kind 'initial' reads .* 32"
    ):
        rk.patch(zoo.tiny("llama"), rk.RedConfig(kind="initial", position="more"))
    with pytest.raises(
        ValueError, match=r"EncDecAttention.q may be of another sequence, but an edit of kind 'initial'"
    ):
        rk.patch(zoo.tiny("t5"), rk.RedConfig(kind="initial", position="more"))
    with pytest.raises(
        ValueError, match="model: lm_head is in no stack of layers, but an edit of kind 'initial' reads"
    ):
        rk.patch(zoo.tiny("llama"), rk.RedConfig(kind="initial", sites="lm_head"))
    with pytest.raises(ValueError, match="kind: 'initial' reads the input of a stack's first layer, which a plain"):
        naive_edit(zoo.tiny("llama"), zoo.sites("llama"), "initial")
    with pytest.raises(ValueError, match="cannot be combined by weights"):
        rk.combine_edits(patched(), {"default": 1.0}, "b")


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_as_an_adapter_of_peft(name: str, tmp_path: Path) -> None:
    """The logits and gradients of `rk.patch`, saved and loaded, beside an adapter of another kind, and taken off."""
    pytest.importorskip("peft")
    from peft import PeftModel, get_peft_model

    from red_kernels.integrations.peft import RedPeftConfig

    ours, base = patched(name, embeddings=False), zoo.tiny(name)
    plain = {key for module in base.modules() for key in module.__dict__}
    model = get_peft_model(base, RedPeftConfig(kind=KIND)).eval()
    with torch.no_grad():
        own, others = (rk.edit_parameters(each).values() for each in (model, ours))
        for mine, theirs in zip(own, others, strict=True):
            for part, vector in mine.items():
                vector.copy_(theirs[part])
    found, expected = model(**zoo.inputs(name)), ours(**zoo.inputs(name))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    found.loss.backward()
    expected.loss.backward()
    for mine, theirs in zip(rk.edit_parameters(model).values(), rk.edit_parameters(ours).values(), strict=True):
        for part, vector in mine.items():
            torch.testing.assert_close(vector.grad, theirs[part].grad, rtol=1e-4, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.tiny(name), tmp_path).eval()
    assert torch.equal(loaded(**zoo.inputs(name)).logits, found.logits)
    loaded.add_adapter("scaled", RedPeftConfig(kind="scaling"))
    loaded.add_adapter("more", RedPeftConfig(kind=KIND))
    assert torch.equal(loaded(**zoo.inputs(name)).logits, found.logits)
    loaded.set_adapter("more")
    frozen = zoo.tiny(name)(**zoo.inputs(name)).logits
    torch.testing.assert_close(loaded(**zoo.inputs(name)).logits, frozen, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="which no layer's weights can express"):
        loaded.merge_adapter()
    bare = loaded.unload()
    torch.testing.assert_close(bare(**zoo.inputs(name)).logits, frozen)
    assert {key for module in bare.modules() for key in module.__dict__} <= plain | {"training"}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in bare.modules())


def test_what_cannot_be_an_adapter_of_peft() -> None:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from red_kernels.integrations.peft import RedPeftConfig

    with pytest.raises(ValueError, match="target_modules: edits of kind 'initial' add the input of their"):
        RedPeftConfig(kind="initial", target_modules="all-linear")
    for name, target, why in (
        ("llama", "k_proj", "is 16 wide"),
        ("llama", "lm_head", "in no stack of layers"),
        ("t5", "EncDecAttention.q", "may be of another sequence"),
    ):
        model = zoo.tiny(name)
        with pytest.raises(ValueError, match=why):
            get_peft_model(model, RedPeftConfig(kind="initial", target_modules=[target]))
        assert not any("red_edit" in key for key in model.state_dict())


def test_a_first_layer_that_changes_its_input_in_place() -> None:
    model = patched(embeddings=False)
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda hidden, **kwargs: hidden.add_(forward(hidden.clone(), **kwargs))
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"the first layer of model.layers has changed its input in place"),
    ):
        logits(model)


def test_on_the_command_line(tmp_path: Path) -> None:
    model = tiny_folders.tiny_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text, with {i * i} words in it.\n" for i in range(100)))
    arguments = ["finetune", "--model", str(model), "--data", str(text), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "2", "--length", "16", "--batch-size", "2", "--kind", KIND]) == 0
    assert rk.saved_config(tmp_path / "out" / "edits").kind == KIND
