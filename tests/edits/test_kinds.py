"""Kinds of edit, those of `toy_kinds.py` among them, which the package does not know: each is one object, and all that
takes a kind takes it."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import tiny_folders
import torch
import toy_kinds
from torch import nn

import red_kernels as rk
from red_kernels import edits
from red_kernels.cli import main
from red_kernels.edits import module
from red_kernels.edits.find import edit_modules, edit_parameters
from red_kernels.edits.kinds import KINDS, PARTS, Kind, Part, kind_with, register_kind, registry
from red_kernels.edits.module import RedEdit
from red_kernels.patching.naive import naive_edit

OURS = ("all", "scaling", "bias", "ln")
TOYS = ("curved", "exponential")


@pytest.fixture(autouse=True)
def toys(kinds: None) -> None:
    toy_kinds.register()


def trained(kind: str, name: str = "llama", **options: Any) -> nn.Module:
    """A patched model whose edits are no identity any more."""
    model = zoo.tiny(name)
    rk.patch(model, rk.RedConfig(kind=kind, **options))
    torch.manual_seed(3)
    with torch.no_grad():
        for parts in edit_parameters(model).values():
            for vector in parts.values():
                vector += 0.1 * torch.randn_like(vector)
    return model


def values(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    return {
        site: {part: own.detach().clone() for part, own in parts.items()}
        for site, parts in edit_parameters(model).items()
    }


def logits(model: nn.Module, name: str = "llama") -> torch.Tensor:
    found: torch.Tensor = model(**zoo.inputs(name)).logits
    return found


@pytest.mark.parametrize("kind", [*OURS, *TOYS])
def test_as_the_formula_by_hooks(kind: str) -> None:
    model, plain = trained(kind), zoo.tiny("llama")
    found = edit_parameters(model)
    assert all(tuple(parts) == KINDS[kind].names for parts in found.values())
    with naive_edit(plain, found, kind) as naive:
        for site, parts in naive.parameters.items():
            for part, vector in parts.items():
                vector.data.copy_(found[site][part])
        ours, theirs = model(**zoo.inputs("llama")), plain(**zoo.inputs("llama"))
        torch.testing.assert_close(ours.logits, theirs.logits)
        for output in (ours, theirs):
            output.loss.backward()
        for site, parts in naive.parameters.items():
            for part, vector in parts.items():
                torch.testing.assert_close(found[site][part].grad, vector.grad)


@pytest.mark.parametrize("kind", ["curved", "matrix"])
def test_a_formula_has_fp32_whatever_the_model_has(kind: str) -> None:
    matrix = Part("matrix", 0.1, lambda width: (width, width))
    register_kind(Kind("matrix", (matrix,), lambda h, vectors: h + h @ vectors["matrix"], "h + h M"))
    model, plain = trained(kind).bfloat16(), zoo.tiny("llama").bfloat16()
    found = edit_parameters(model)
    with naive_edit(plain, found, kind) as naive:
        for site, parts in naive.parameters.items():
            for part, vector in parts.items():
                vector.data.copy_(found[site][part])
        torch.testing.assert_close(logits(model), logits(plain), rtol=0.03, atol=0.03)  # norms round elsewhere


@pytest.mark.parametrize("kind", [*OURS, *TOYS])
def test_the_start_is_the_identity_or_the_kind_says_so(kind: str) -> None:
    model = zoo.tiny("llama")
    before = logits(model)
    rk.patch(model, rk.RedConfig(kind=kind))
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5) == KINDS[kind].neutral


def test_the_report_says_what_is_not_fused() -> None:
    report = rk.patch(zoo.tiny("llama"), rk.RedConfig(kind="curved"))
    assert {site.fused for site in report.sites} == {None}
    assert "edits of kind 'curved' have no fused kernel" in str(report)
    fused = rk.patch(zoo.tiny("llama"), rk.RedConfig(kind="exponential"))
    assert fused.sites[0].fused == rk.patch(zoo.tiny("llama"), rk.RedConfig()).sites[0].fused is not None


@pytest.mark.parametrize("kind", TOYS)
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    rk.save_edits(model, tmp_path)
    assert rk.saved_config(tmp_path) == rk.RedConfig(kind=kind)
    other = zoo.tiny("llama")
    rk.patch(other, rk.saved_config(tmp_path))
    rk.load_edits(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match=r"the authors' form has no name for .*(curve|log_scale)"):
        rk.export_authors(model, tmp_path / "theirs")


GAINED = Kind(
    "gained",
    (
        Part("gain", 0.0, lambda width: (1,)),
        Part("rows", 0.5, lambda width: (width, 2)),
        Part("level", 0.0, lambda w: ()),
    ),
    lambda h, v: h + v["gain"] * h + h @ v["rows"] @ v["rows"].T * v["level"],
    "a kind whose parts have shapes of their own",
)


def test_parts_of_any_shape_are_saved_and_converted(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from red_kernels.checkpoints.convert import convert
    from red_kernels.integrations.peft import RedPeftConfig

    register_kind(GAINED)
    model = trained("gained")
    rk.save_edits(model, tmp_path / "edits")
    other = zoo.tiny("llama")
    rk.patch(other, rk.saved_config(tmp_path / "edits"))
    rk.load_edits(other, tmp_path / "edits")
    assert torch.equal(logits(other), logits(model))
    get_peft_model(zoo.tiny("llama"), RedPeftConfig(kind="gained")).save_pretrained(tmp_path / "peft")
    zoo.tiny("llama").save_pretrained(tmp_path / "base")
    convert(tmp_path / "peft", tmp_path / "converted", model=str(tmp_path / "base"))
    assert rk.saved_config(tmp_path / "converted").kind == "gained"


def test_a_width_is_told_from_all_shapes() -> None:
    found = {part.name: torch.ones(part.shape(6)) for part in GAINED.parts}
    assert GAINED.width(found) == 6
    assert GAINED.width({"gain": torch.ones(1)}) is None  # as for every width
    with pytest.raises(ValueError, match=r"differ in width: \{'gain': 1, 'rows': \(5, 3\), 'level': \(\)\}"):
        GAINED.width(found | {"rows": torch.ones(5, 3)})


@pytest.mark.parametrize("kind", TOYS)
def test_copied_and_pickled(kind: str) -> None:
    model = trained(kind)
    own = next(iter(edit_modules(model).values()))
    assert pickle.loads(pickle.dumps(own.kind)) is own.kind is KINDS[kind]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), logits(model))


def test_a_pickle_of_a_kind_that_nobody_registered() -> None:
    pickled = pickle.dumps(KINDS["curved"])
    del registry._KINDS["curved"]
    with pytest.raises(ValueError, match="kind: got 'curved', which is not registered, expected one of 'all'"):
        pickle.loads(pickled)


@pytest.mark.parametrize("kind", OURS)
def test_modules_pickled_before_there_were_kinds(kind: str) -> None:
    """Their state had the names of the parts, and None for each part that the kind does not have."""
    model = trained(kind)
    edited = logits(model)
    for own in edit_modules(model).values():
        held = own._parameters
        state = {
            **own.__dict__,
            "parts": KINDS[kind].names,
            "_parameters": {part: held.get(part) for part in KINDS["ln"].names},
        }
        del state["kind"]
        former = RedEdit.__new__(RedEdit)
        former.__setstate__(state)
        assert former.__dict__.keys() == own.__dict__.keys()
        own.__dict__.clear()
        own.__dict__.update(former.__dict__)
    assert torch.equal(logits(model), edited)
    assert all(own.kind is KINDS[kind] and own.parts == KINDS[kind].names for own in edit_modules(model).values())


def test_merged_by_its_fold_or_refused() -> None:
    model = trained("exponential", "gpt2")
    edited = logits(model, "gpt2")
    rk.merge(model)
    torch.testing.assert_close(logits(model, "gpt2"), edited, rtol=1e-4, atol=1e-5)
    for kind in ("curved", "ln"):
        with pytest.raises(ValueError, match=f"kind '{kind}', which no layer's weights can express"):
            rk.merge(trained(kind))


def test_only_what_changes_each_column_by_itself_goes_into_a_norm() -> None:
    model = trained("all", "bert", position="res")
    rk.merge(model)
    mixing = Kind(
        "mixing", (Part("amount"),), lambda h, v: h + v["amount"] * h.flip(-1), "", fold=lambda w, b, v: (w, b)
    )
    register_kind(mixing)
    with pytest.raises(ValueError, match="kind 'mixing', but a norm's weights express only"):
        rk.merge(trained("mixing", "bert", position="res"))


@pytest.mark.parametrize("kind", TOYS)
def test_edits_by_row_and_combined(kind: str) -> None:
    model = trained(kind)
    rk.add_edit(model, "b", copy_of="default")
    rk.combine_edits(model, {"default": 0.5}, "weak")
    found, whole = edit_parameters(model, "weak"), edit_parameters(model)
    for site, parts in found.items():
        for part, vector in parts.items():
            start = PARTS[part].start
            torch.testing.assert_close(vector - start, 0.5 * (whole[site][part] - start))
    batch = zoo.inputs("llama", batch=3)
    rows = batch["input_ids"].shape[0]
    with rk.use_edits(model, ids=["weak", None, *["b"] * (rows - 2)]):
        mixed = model(**batch).logits
    for row, name in ((0, "weak"), (rows - 1, "b")):
        rk.switch_edit(model, name)
        torch.testing.assert_close(mixed[row], model(**batch).logits[row])
    with rk.disable_edits(model):
        torch.testing.assert_close(mixed[1], model(**batch).logits[1])


@pytest.mark.parametrize("kind", TOYS)
def test_compiled(kind: str) -> None:
    model = trained(kind)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(**zoo.inputs("llama")).logits, logits(model))


@pytest.mark.parametrize("kind", TOYS)
def test_as_an_adapter_of_peft(kind: str) -> None:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from red_kernels.integrations.peft import RedPeftConfig

    patched = trained(kind)
    model = get_peft_model(zoo.tiny("llama"), RedPeftConfig(kind=kind)).eval()
    own = edit_parameters(model.base_model.model)
    with torch.no_grad():
        for ours, theirs in zip(own.values(), values(patched).values(), strict=True):
            for part, vector in ours.items():
                vector.copy_(theirs[part])
    edited = logits(patched)
    assert torch.equal(model(**zoo.inputs("llama")).logits, edited)
    if kind == "curved":
        with pytest.raises(ValueError, match="kind 'curved', which no layer's weights can express"):
            model.merge_adapter()
    else:
        model.merge_adapter()
        torch.testing.assert_close(model(**zoo.inputs("llama")).logits, edited, rtol=1e-4, atol=1e-5)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folders.tiny_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text, with {i * i} words in it.\n" for i in range(100)))
    arguments = ["finetune", "--model", str(model), "--data", str(text), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "2", "--length", "16", "--batch-size", "2", "--kind", "curved"]) == 0
    assert rk.saved_config(tmp_path / "out" / "edits").kind == "curved"
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    assert "curved: h + curve * h * h" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("all", TypeError, "kind: got str, expected a red_kernels.edits.kinds.Kind"),
        (replace(toy_kinds.CURVED, name=""), ValueError, "kind: got the name ''"),
        (replace(toy_kinds.CURVED, name="all"), ValueError, "expected one that no other kind has"),
        (replace(toy_kinds.CURVED, name="new", parts=()), ValueError, "expected at least one, none twice"),
        (replace(toy_kinds.CURVED, name="new", parts=(Part("a.b"),)), ValueError, "a part named 'a.b'"),
        (replace(toy_kinds.CURVED, name="new", parts=(Part("frozen"),)), ValueError, "a part named 'frozen'"),
        (
            replace(toy_kinds.CURVED, name="new", parts=(Part("scale", 0.5),)),
            ValueError,
            "with another start",
        ),
        (replace(toy_kinds.CURVED, name="new", parts=(Part("width"),)), ValueError, "a part named 'width'"),
        (replace(toy_kinds.CURVED, name="new", parts=(Part("forward"),)), ValueError, "a part named 'forward'"),
        (replace(toy_kinds.CURVED, name="new", parts=(Part("default"),)), ValueError, "a part named 'default'"),
        (replace(toy_kinds.CURVED, name="new", parts=[Part("curve")]), TypeError, "expected a tuple of"),
        (replace(toy_kinds.CURVED, name="new", formula=None), TypeError, "got the formula None"),
        (
            replace(toy_kinds.CURVED, name="new", kernel="affine"),
            ValueError,
            r"the vectors \['curve'\], expected some of scale",
        ),
        (
            replace(toy_kinds.CURVED, name="new", formula=lambda h, v: h),
            ValueError,
            "parts of 'curved' and another form",
        ),
        (replace(toy_kinds.CURVED, name="new", kernel="cubic"), ValueError, "kernel 'cubic', expected None or one of"),
    ],
)
def test_what_is_no_kind(kind: Any, error: type[Exception], message: str) -> None:
    before = dict(KINDS), dict(PARTS)
    with pytest.raises(error, match=message):
        register_kind(kind)
    assert (dict(KINDS), dict(PARTS)) == before
    register_kind(toy_kinds.CURVED)  # again: the same


def test_every_kernel_that_a_kind_may_name_is_there() -> None:
    assert set(module._KERNELS) == set(registry.KERNELS)


def test_named_edits_where_they_were() -> None:
    for name in ("add_edit", "combine_edits", "use_edits"):
        assert getattr(edits, name) is getattr(rk, name)
    with pytest.raises(AttributeError, match=r"has no attribute .listed."):
        _ = edits.listed  # type: ignore[attr-defined]


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError,
        match="kind: got 'cubic', supported: 'all', 'scaling', 'bias', 'ln', 'ssf', 'rotation' or 'rotation:N'",
    ):
        rk.RedConfig(kind="cubic")
    assert kind_with({"scale", "bias"}) is KINDS["all"]
    assert kind_with({"scale", "curve"}) is None
