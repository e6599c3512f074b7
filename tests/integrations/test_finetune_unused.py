"""Options that others leave without effect: each is an error, and every option is known to be of one sort."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from finetune_helpers import causal, classify, make_folders, record

from red_kernels import cli
from red_kernels.finetune import options, unused
from red_kernels.finetune.run_folder import open_run
from red_kernels.finetune.settings import Settings, as_options, from_options

# What always has an effect, whatever else is asked for.
ALWAYS = {
    *(
        "config",
        "task",
        "model",
        "dtype",
        "device",
        "kind",
        "data",
        "validation",
        "learning_rate",
        "schedule",
        "warmup",
    ),
    *("clip", "batch_size", "accumulate", "checkpointing", "length", "seed", "report_to", "no_compare", "output"),
    *("resume", "overwrite"),
}
# What is refused beside another one by other checks than those of `unused`: too few processes, two ends of a training,
# an interval that is another's, patience without evaluations, layers beside sites.
ELSEWHERE = {"fsdp", "tp", "steps", "epochs", "save_every", "eval_every", "patience", "layers", "sites"}
IDLE: list[tuple[str, dict[str, Any]]] = [
    ("held_out", {"held_out": 0.1, "validation": ("b.jsonl",)}),
    ("subset", {"subset": "en", "data": ("a.jsonl",)}),
    ("subset", {"subset": "en"}),  # the Python reference
    ("label_column", {"label_column": "y", "data": ("a.csv",)}),
    ("text_column", {"text_column": "x", "data": ("a.txt", "b.txt.gz")}),
    ("text_column", {"text_column": "x"}),
    ("no_header", {"no_header": True, "data": ("a.jsonl",)}),
    ("no_header", {"no_header": True}),
    ("loss_on", {"loss_on": "all", "task": "classification", "data": ("a.csv",)}),
    ("template", {"template": "t.jinja", "task": "regression", "data": ("a.csv",)}),
    ("packing", {"packing": True, "task": "classification", "data": ("a.csv",)}),
    ("sample", {"sample": ("Why?",), "task": "regression", "data": ("a.csv",)}),
    ("position", {"position": "attn", "sites": ("*.o_proj",)}),
]
USED: list[dict[str, Any]] = [
    {"held_out": 0.2},
    {"validation": ("b.jsonl",)},
    {"subset": "en", "data": ("user/name",)},
    {"subset": "en", "data": ("a.jsonl",), "validation": ("user/name",)},
    {"label_column": "y", "text_column": "x", "task": "classification", "data": ("a.csv",)},
    {"text_column": "x", "data": ("a.txt", "b.jsonl")},
    {"no_header": True, "data": ("a.tsv.gz",)},
    {"position": "attn"},
    {"sites": ("*.o_proj",)},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


def test_every_option_is_of_one_sort() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    options.add_options(parser)
    known = [*ALWAYS, *ELSEWHERE, *(rule[0] for rule in unused._RULES)]
    assert sorted(known) == sorted(action.dest for action in parser._actions)
    assert {name for name, _ in IDLE} == {rule[0] for rule in unused._RULES}


@pytest.mark.parametrize(("name", "given"), IDLE, ids=lambda value: value if isinstance(value, str) else "")
def test_an_option_without_effect(name: str, given: dict[str, Any]) -> None:
    settings = from_options(given)
    assert [*unused.unused(settings)] == [name]
    with pytest.raises(ValueError, match=f"{name}: got .*, which has no effect: "):
        unused.check_used(settings)
    assert not unused.unused(unused.without_unused(settings, ()))
    with pytest.raises(ValueError, match=f"{name}: got"):
        unused.without_unused(settings, (name,))


@pytest.mark.parametrize("given", USED, ids=str)
def test_options_with_an_effect(given: dict[str, Any]) -> None:
    settings = from_options(given).filled()
    written = as_options(settings)  # what a run writes is what it takes
    assert from_options(written).filled() == settings


def test_the_command_says_so(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--validation", str(folders["text"]), "--held-out", "0.1"), "held_out: got 0.1, which has no effect"),
        (("--subset", "en"), "subset: got 'en', which has no effect"),
        (("--template", str(folders["text"])), "has no effect: the data holds no conversations"),
    ):
        assert cli.main(causal(folders, tmp_path / "out", *more)) == cli.EXIT_ERROR
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out" / "run.json").exists()


def test_a_template_for_samples_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    more = ("--template", str(template), "--sample", "line 3", "--steps", "1", "--no-compare")
    assert cli.main(causal(folders, tmp_path / "out", *more)) == 0


def test_a_run_with_a_validation_source_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    """The fraction that older versions wrote beside a source of its own is no reason to refuse it."""
    validation = tmp_path / "other.txt"
    validation.write_text("".join(f"another line {i} of the text.\n" for i in range(60)))
    output = tmp_path / "out"
    assert cli.main(causal(folders, output, "--validation", str(validation), "--steps", "1", "--no-compare")) == 0
    kept = record(output)
    assert kept["settings"]["held_out"] is None
    kept["settings"]["held_out"] = 0.1
    (output / "run.json").write_text(json.dumps(kept))
    again = from_options({"resume": True, "output": str(output), "steps": 2}, kept["settings"]).filled()
    open_run(output, dataclasses.replace(again, dtype="fp32"))
    assert cli.main(["finetune", "--output", str(output), "--resume", "--steps", "2"]) == 0
    config = str(output / "config.yaml")
    assert cli.main(["finetune", "--config", config, "--output", str(tmp_path / "again"), "--device", "cpu"]) == 0


# ---- the commands beside it


def test_evaluate(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the run had for other data is left aside, what is asked for is not."""
    table = tmp_path / "table.csv"
    table.write_text(
        "words\n" + "".join(f"line {i} of it, with {i * i} words in it.\n".replace(",", "") for i in range(90))
    )
    wanted = {**folders, "text": table}
    run = tmp_path / "run"
    more = ("--text-column", "words", "--steps", "1", "--no-compare")
    assert cli.main(causal(wanted, run, *more)) == 0
    other = ["evaluate", str(run), "--data", str(folders["text"]), "--device", "cpu"]
    assert cli.main(other) == 0
    for option, value in (("--text-column", "words"), ("--subset", "en"), ("--template", str(table))):
        assert cli.main([*other, option, value]) == cli.EXIT_ERROR
        assert "no effect" in capsys.readouterr().err


def test_generate(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert cli.main(causal(folders, run, "--steps", "1", "--no-compare")) == 0
    ask = ["generate", str(run), "--prompt", "line", "--device", "cpu", "--new-tokens", "2"]
    for more, message in (
        (("--seed", "3"), "seed: got 3, which has no effect: without temperature"),
        (("--template", "t.jinja", "--no-chat"), "template: got 't.jinja', which has no effect"),
        (("--prompt", ""), "prompt: got '', for which the tokenizer gives no token"),
        (("--chat",), "chat: the model's tokenizer has no chat template"),
    ):
        assert cli.main([*ask, *more]) == cli.EXIT_ERROR
        assert message in capsys.readouterr().err
    assert cli.main([*ask, "--seed", "3", "--temperature", "0.7"]) == 0


@pytest.mark.parametrize("option", ["--sample=x", "--no-compare", "--learning-rate=1", "--fsdp", "--tp=2"])
def test_sweep_has_no_option_that_it_cannot_use(option: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sweep", option])


def test_sweep_says_what_of_a_file_it_does_not_use(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    lines = [f"model: {folders['llama']}", f"data: {folders['text']}", "length: 16", "device: cpu", "steps: 2"]
    config.write_text("\n".join([*lines, "learning-rate: 0.5", "sample: line", "batch-size: 2", ""]))
    output = str(tmp_path / "rates")
    assert cli.main(["sweep", "--config", str(config), "--rates", "1e-3", "1e-2", "--output", output]) == 0
    assert "Ignored by a sweep" in (said := capsys.readouterr().out)
    assert "learning_rate, sample" in said


def test_settings_of_labels(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(classify(folders, tmp_path / "out", "--loss-on", "all")) == cli.EXIT_ERROR
    assert "loss_on: got 'all', which has no effect" in capsys.readouterr().err
    assert Settings().filled().held_out == 0.1
