"""One batch, many edits: each row with its own, held to the same rows run one by one."""

from __future__ import annotations

import copy

import model_zoo as zoo
import pytest
import torch
from old_releases import skip_untraced
from patch_helpers import learn, operations_run, watching
from row_cases import NAMES, ROWS, eager, hold, inputs, several, weighted

import red_kernels as rk
from red_kernels.backends.arguments import affine_edit
from red_kernels.edits import module

FAMILIES = ("llama", "gpt2", "bert", "t5", "opt", "distilbert", "falcon")
CASES = [
    ("falcon_sequential" if (name, position) == ("falcon", "res_with_attn") else name, position)
    for name in FAMILIES
    for position in ("ffn", "attn", "more", "res", "res_with_attn")
]


@pytest.mark.parametrize(("name", "position"), CASES)
def test_each_row_has_its_own(name, position):
    plain, model, values = several(name, position)
    hold(name, position, plain, model, values, ROWS, eager(model, ROWS))


@pytest.mark.parametrize("kind", ["scaling", "bias", "ln"])
@pytest.mark.parametrize("position", ["ffn", "res_with_attn"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_kinds(name, position, kind):
    plain, model, values = several(name, position, kind)
    rows = ("a", "b", "default", "a") if kind == "ln" else ROWS
    hold(name, position, plain, model, values, rows, eager(model, rows))


@pytest.mark.parametrize("rows", [("b", "b", "b"), (None, None), ("a", None), ("a",)])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_few_edits(name, rows):
    plain, model, values = several(name)
    if set(rows) == {None}:
        with torch.no_grad(), rk.use_edits(model, rows):
            found = model(**inputs(name, len(rows))).logits
        with torch.no_grad(), rk.disable_edits(model):
            assert torch.equal(found, model(**inputs(name, len(rows))).logits)
    else:
        hold(name, "ffn", plain, model, values, rows, eager(model, rows))


@pytest.fixture
def calls(monkeypatch):
    """Which operations run, as `(name, the edit)`."""
    seen = operations_run(monkeypatch)

    def alone(operation, function):
        def call(*args, edit_ids=None, **kwargs):
            seen.append((f"{operation} alone", affine_edit(ids=edit_ids)))
            return function(*args, edit_ids=edit_ids, **kwargs)

        return call

    for operation in ("edit", "edit_add_layer_norm"):
        monkeypatch.setattr(module, operation, alone(operation, getattr(module, operation)))
    return seen


@pytest.mark.parametrize(
    ("name", "position", "operations"),
    [
        ("llama", "ffn", {"edit_add_rms_norm": zoo.LAYERS}),
        ("llama", "attn", {"edit_add_rms_norm": zoo.LAYERS}),
        ("llama", "res_with_attn", {"edit_add_rms_norm": 2 * zoo.LAYERS}),
        ("llama", "more", {"edit_add_rms_norm": 2 * zoo.LAYERS, "edit": 3 * zoo.LAYERS}),
        ("gpt2", "ffn", {"edit_add_layer_norm": zoo.LAYERS}),
        ("bert", "ffn_attn", {"edit_add_layer_norm": 2 * zoo.LAYERS}),
        ("bert", "res", {"layer_norm_edit": zoo.LAYERS}),
        ("t5", "ffn", {"edit_add_rms_norm": 2 * zoo.LAYERS - 1}),
        ("opt", "ffn", {"edit_add_layer_norm": zoo.LAYERS}),
        ("gemma2", "ffn", {"edit_add_rms_norm": zoo.LAYERS}),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_the_fused_operations_get_the_ids(name, position, operations, gradients, calls, monkeypatch):
    watch = watching(monkeypatch)
    _, model, _ = several(name, position)
    learn(model, name)
    calls.clear()
    watch.clear()
    with torch.set_grad_enabled(gradients):
        with rk.use_edits(model, ROWS):
            model(**inputs(name, len(ROWS)))
        by_row = [operation for operation, own in calls if own.ids is not None]
        assert {operation: by_row.count(operation) for operation in set(by_row)} == operations
        assert watch.taken == watch.left
        before = len(watch.left)
        calls.clear()
        model(**inputs(name, len(ROWS)))
        assert len(watch.left) == 2 * before  # by row as much is handed to the next norm as with one edit
        assert all(own.ids is None for _, own in calls)
        plain = [operation for operation, _ in calls]
        assert all(plain.count(operation) >= count for operation, count in operations.items())


def test_the_same_edit_in_all_rows_is_that_edit(calls):
    _, model, _ = several("llama")
    with torch.no_grad():
        with rk.use_edits(model, ["b"] * 3):
            found = model(**inputs("llama", 3)).logits
        assert calls
        assert all(own.ids is None for _, own in calls)
        rk.switch_edit(model, "b")
        assert torch.equal(found, model(**inputs("llama", 3)).logits)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt", "falcon"])
def test_generate(name, beams):
    """With a cache, greedy and with beams."""
    _, model, values = several(name)
    for edit in NAMES:
        zoo.fill(
            rk.edit_parameters(model, edit),
            {site: {part: 4.0 * vector for part, vector in parts.items()} for site, parts in values[edit].items()},
        )
    ids = zoo.inputs(name, batch=len(ROWS))["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    with rk.use_edits(model, ROWS):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    wanted = []
    for row, edit in enumerate(ROWS):
        with rk.use_edits(model, [edit]):
            wanted.append(model.generate(ids[row : row + 1], attention_mask=torch.ones(1, ids.shape[1]), **options))
    assert torch.equal(found, torch.cat(wanted))
    one_for_all = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert not torch.equal(found, one_for_all)  # else the edits would not matter here


@pytest.mark.parametrize(
    ("name", "position"), [("llama", "res_with_attn"), ("llama", "more"), ("bert", "ffn"), ("t5", "res")]
)
def test_compiled(name, position):
    skip_untraced(name)
    torch.compiler.reset()
    plain, model, values = several(name, position)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def run(batch):
        with rk.use_edits(model, ROWS):
            logits = compiled(**batch).logits
            weighted(logits).backward()
        return logits

    hold(name, position, plain, model, values, ROWS, run, compiled=True)


def test_compiled_for_some_edits_serves_every_order_of_them():
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    _, model, _ = several("llama")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = inputs("llama", len(ROWS))
    found = []
    with torch.no_grad():
        for rows in (ROWS, ROWS[::-1], ("a", "a", "b", None, "default")):
            with rk.use_edits(model, rows):
                found.append((compiled(**batch).logits, model(**batch).logits))
    assert counter.frame_count == 1
    for compiled_logits, eager_logits in found:
        torch.testing.assert_close(compiled_logits, eager_logits)
    assert not torch.allclose(found[0][0], found[1][0])


def test_nested_and_left_by_an_exception():
    _, model, _ = several("llama")
    batch = inputs("llama", 2)

    def run():
        with torch.no_grad():
            return model(**batch).logits

    plain = run()
    with rk.use_edits(model, ["a", "b"]):
        outer = run()
        with rk.use_edits(model, ["b", None]):
            inner = run()
        assert torch.equal(run(), outer)
        with pytest.raises(ValueError, match="ids: got 2 of them"), rk.use_edits(model, ["b", None]):
            model(**inputs("llama", 3))
        assert torch.equal(run(), outer)
        with rk.disable_edits(model):
            base = run()
            with rk.use_edits(model, ["b", None]):
                assert torch.equal(run(), inner)
            assert torch.equal(run(), base)
        assert torch.equal(run(), outer)
        rk.switch_edit(model, "b")
        assert torch.equal(run(), outer)
    rk.switch_edit(model, "default")
    assert torch.equal(run(), plain)
    with rk.disable_edits(model):
        assert torch.equal(run(), base)
    different = [plain, outer, inner, base]
    assert not any(torch.allclose(a, b) for at, a in enumerate(different) for b in different[:at])


@pytest.mark.parametrize("rows", [("a", "b", None), ("a", "a", "a")])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_wrong_number_of_rows(name, rows):
    _, model, _ = several(name)
    with (
        rk.use_edits(model, rows),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"ids: got 3 of them for a batch of \d+ rows"),
    ):
        model(**inputs(name, 2))
    with torch.no_grad():
        model(**inputs(name, 2))


@pytest.mark.parametrize(
    ("ids", "error", "match"),
    [
        ("a", TypeError, "ids: got str, expected a list"),
        (b"a", TypeError, "ids: got bytes"),
        ({"a", "b"}, TypeError, "ids: got set"),
        (None, TypeError, "ids: got NoneType"),
        ([], ValueError, "ids: got no name"),
        (["a", "z"], ValueError, "ids: got 'z', expected one of the model's edits: 'default', 'a', 'b'"),
        (["a", 1], ValueError, "ids: got 1"),
    ],
)
def test_wrong_ids(ids, error, match):
    _, model, _ = several("llama")
    before = model(**inputs("llama", 2)).logits
    with pytest.raises(error, match=match), rk.use_edits(model, ids):
        pytest.fail("entered")
    assert torch.equal(model(**inputs("llama", 2)).logits, before)
    with pytest.raises(ValueError, match="is not patched"), rk.use_edits(zoo.tiny("llama"), ["a"]):
        pytest.fail("entered")


def test_rows_without_an_edit_beside_kind_ln():
    _, model, _ = several("llama", kind="ln")
    match = "ids: rows with edits of kind 'ln' and rows without"
    with pytest.raises(ValueError, match=match), rk.use_edits(model, ["a", None]):
        pytest.fail("entered")
    with rk.use_edits(model, [None, None]), rk.use_edits(model, ["a", "b"]):
        model(**inputs("llama", 2))


def test_an_edit_in_use_is_not_deleted():
    _, model, _ = several("llama")
    with rk.use_edits(model, ["a", "default"]), rk.disable_edits(model), rk.use_edits(model, ["default"]):
        with pytest.raises(ValueError, match="cannot delete 'a': rows of a running use_edits have it"):
            rk.delete_edit(model, "a")
        rk.delete_edit(model, "b")
    rk.delete_edit(model, "a")
    assert rk.edit_names(model) == ("default",)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("how", ["replaced", "filled", "through .data", "loaded"])
def test_new_values_inside_of_a_block(how, mode, tmp_path):
    """Whatever changes a vector, the next forward has its new values."""
    _, model, values = several("llama")
    batch = inputs("llama", 2)
    zoo.fill(rk.edit_parameters(model, "b"), values["a"])
    rk.save_edits(model, tmp_path, name="b")
    zoo.fill(rk.edit_parameters(model, "b"), values["b"])

    def change():
        if how == "replaced":
            for own in (layer.mlp.down_proj.red_edit for layer in model.model.layers):
                for part in ("scale", "bias"):
                    with torch.inference_mode(False):
                        setattr(own.b, part, torch.nn.Parameter(getattr(own.a, part).detach().clone()))
        if how == "filled":
            zoo.fill(rk.edit_parameters(model, "b"), values["a"])
        if how == "through .data":
            for site, parts in rk.edit_parameters(model, "b").items():
                for part, vector in parts.items():
                    vector.data.copy_(values["a"][site][part])
        if how == "loaded":
            rk.load_edits(model, tmp_path, name="b")

    with rk.use_edits(model, ["a", "b"]):
        with mode():
            first = model(**batch).logits
            assert torch.equal(model(**batch).logits, first)
        change()
        with mode():
            changed = model(**batch).logits
    with mode(), rk.use_edits(model, ["a", "a"]):
        torch.testing.assert_close(changed, model(**batch).logits)
    assert not torch.allclose(changed[1], first[1])
    assert torch.equal(changed[0], first[0])


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_training_behind_inference_in_one_block(first, where):
    plain, model, values = several("llama")

    def run(batch):
        block = rk.use_edits(model, ROWS)
        with first() if where == "around" else torch.enable_grad():
            block.__enter__()
            with first():
                model(**batch)
        try:
            logits = model(**batch).logits
            weighted(logits).backward()
        finally:
            block.__exit__(None, None, None)
        return logits

    hold("llama", "ffn", plain, model, values, ROWS, run)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_training_by_rows_is_training_one_by_one(name):
    """Steps of an optimizer over all edits equal steps over each edit's own rows."""
    _, model, _ = several(name)
    alone = copy.deepcopy(model)
    rows = ("a", "b", "a")
    batch = inputs(name, len(rows))

    def trained(one):
        return [v for edit in ("a", "b") for parts in rk.edit_parameters(one, edit).values() for v in parts.values()]

    optimizers = [torch.optim.SGD(trained(one), lr=0.01) for one in (model, alone)]
    for _ in range(3):
        eager(model, rows)(batch)
        for row, edit in enumerate(rows):
            rk.switch_edit(alone, edit)
            weighted(alone(**{key: value[row : row + 1] for key, value in batch.items()}).logits).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for own, wanted in zip(trained(model), trained(alone), strict=True):
        torch.testing.assert_close(own, wanted)
