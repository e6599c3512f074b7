"""NaN and infinity where a number has to be finite: each is refused, by name, and nothing is changed or written."""

from __future__ import annotations

import math
from pathlib import Path

import model_zoo as zoo
import pytest
import tiny_folders
import torch

import red_kernels as rk
from benchmarks import suite
from benchmarks.ops import job as ops
from benchmarks.step import growth
from benchmarks.step import job as step
from benchmarks.tools import many_edits
from red_kernels import cli
from red_kernels.backends.triton import tuned
from red_kernels.finetune.data import Document, split_documents
from red_kernels.finetune.job import Settings
from red_kernels.merging.report import SiteMerge

NOT_FINITE = (math.nan, math.inf, -math.inf)


def patched(kind="all", dtype=torch.float32):
    model = zoo.tiny("llama").to(dtype)
    rk.patch(model, rk.RedConfig(kind=kind))
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, value in after.items()
    )


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("part", ["scale", "bias"])
@pytest.mark.parametrize("force", [False, True])
def test_an_edit_that_is_not_finite_is_never_merged(value, part, force):
    model = patched()
    site, parts = list(rk.edit_parameters(model).items())[-1]
    with torch.no_grad():
        parts[part][3] = value
    before = state(model)
    with pytest.raises(ValueError, match=rf"model: {site}\.{part} of the edit 'default' is not finite \(1 "):
        rk.merge(model, force=force, loadable=False)
    assert same(model, before)
    assert rk.active_edit(model) == "default"


@pytest.mark.parametrize(
    ("part", "dtype"), [("scale", torch.float16), ("bias", torch.float16), ("scale", torch.float32)]
)
def test_an_edit_that_overflows_the_weight_is_never_merged(part, dtype):
    model = patched(dtype=dtype)
    site, parts = next(iter(rk.edit_parameters(model).items()))
    with torch.no_grad():
        parts[part][0] = 3e38 if dtype is torch.float32 else 1e7
        model.get_submodule(site).weight[0] = 100.0
    before = state(model)
    where = "weight" if part == "scale" else "bias"
    with pytest.raises(ValueError, match=rf"{site}\.{where} would overflow {dtype} once the edit at {site} is merged"):
        rk.merge(model, force=True, loadable=False)
    assert same(model, before)


def test_a_weight_that_is_not_finite_is_named():
    model = patched()
    site = next(iter(rk.edit_parameters(model)))
    with torch.no_grad():
        model.get_submodule(site).weight[1, 2] = math.nan
    with pytest.raises(ValueError, match=rf"model: {site}\.weight is not finite before the merge \(1 NaN\)"):
        rk.merge(model, loadable=False)


def test_another_edit_that_is_not_finite_is_no_hindrance():
    model = patched("scaling")
    rk.add_edit(model, "broken")
    with torch.no_grad():
        next(iter(rk.edit_parameters(model, "broken").values()))["scale"].fill_(math.nan)
    rk.merge(model)


@pytest.mark.parametrize("errors", [(math.nan, 0.1), (0.1, math.nan), (math.nan, math.nan)])
def test_the_error_of_a_merge_is_nan_where_a_part_is(errors):
    assert math.isnan(SiteMerge("site", "module", "float32", *errors, False).error)
    assert SiteMerge("site", "module", "float32", 0.1, 0.2, False).error == 0.2


@pytest.mark.parametrize("value", NOT_FINITE)
def test_the_command_refuses_to_merge(value, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = tiny_folders.tiny_llama(tmp_path / "base")
    model = tiny_folders.LlamaForCausalLM.from_pretrained(base)
    rk.patch(model, rk.RedConfig(kind="scaling"))
    with torch.no_grad():
        next(iter(rk.edit_parameters(model).values()))["scale"][0] = value
    rk.save_edits(model, tmp_path / "edits")
    words = ["merge", "--model", str(base), "--edits", str(tmp_path / "edits"), "--output", str(tmp_path / "merged")]
    assert cli.main([*words, "--force"]) == cli.EXIT_ERROR
    assert "down_proj.scale of the edit 'default' is not finite" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "edits"]


# ---- numbers that people give


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", ["learning_rate", "held_out", "steps", "batch_size", "save_every", "length"])
def test_settings_of_finetune(name, value):
    with pytest.raises(ValueError, match=rf"{name}: got {value}"):
        Settings(data="x.txt", **{name: value}).filled()


@pytest.mark.parametrize("value", NOT_FINITE)
def test_held_out_of_documents(value):
    documents = [Document(text, text, text) for text in "abcd"]
    with pytest.raises(ValueError, match=rf"held_out: got {value}"):
        split_documents(documents, value)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_numbers_of_the_operations(value):
    x, vector = torch.ones(2, 4), torch.ones(4)
    for name in ("eps", "weight_offset"):
        with pytest.raises(ValueError, match=rf"{name} is {value}"):
            rk.rms_norm_edit(x, vector, vector, vector, **{name: value})
        with pytest.raises(ValueError, match=rf"{name} is {value}"):
            rk.edit_add_rms_norm(x, x, vector, vector, vector, **{name: value})
    for operation in (rk.layer_norm_edit, rk.edit_add_layer_norm):
        arguments = (x, vector, vector, vector, vector) if operation is rk.layer_norm_edit else (x, x, *[vector] * 4)
        with pytest.raises(ValueError, match=rf"eps is {value}"):
            operation(*arguments, eps=value)
    with pytest.raises(ValueError, match=rf"dropout_p is {value}"):
        rk.edit_add(x, x, vector, vector, dropout_p=value, training=True)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_settings_of_the_benchmarks(value, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for settings in (ops.Settings, step.Settings, growth.Settings):
        with pytest.raises(ValueError, match=rf"seconds: got {value}"):
            settings(seconds=value)
    with pytest.raises(ValueError, match=rf"--minutes: got {value}"):
        suite.Request("ops", tmp_path, minutes=value)
    with pytest.raises(SystemExit):
        many_edits.main([f"--seconds={value}"])
    assert f"got {value}, expected 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("value", NOT_FINITE)
def test_numbers_of_a_tuned_table(value):
    quartiles = {"low": 1.0, "median": 2.0, "high": value}
    case = {"microseconds": quartiles, "default_microseconds": quartiles}
    with pytest.raises(ValueError, match=r"place: measured 0: microseconds: high is .*, expected a finite number"):
        tuned._times({"ratio": 1.5, "measured": [case]}, "place", {"microseconds": dict, "default_microseconds": dict})
    with pytest.raises(ValueError, match=r"place: ratio is .*, expected a positive number"):
        tuned._times({"ratio": value, "measured": [1]}, "place", {})
