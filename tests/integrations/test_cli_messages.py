"""What the command says: of options it does not know, of errors, and of edits that will not merge; in one line each."""

from __future__ import annotations

import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import tiny_folders
import transformers
from places import ROOT
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import red_kernels as rk
from red_kernels import cli


@pytest.mark.parametrize(
    ("command", "words", "meant"),
    [
        ("finetune", ["--max-steps", "3"], "--max-steps: unknown; did you mean --steps?"),
        ("finetune", ["--max-steps=3"], "--max-steps: unknown; did you mean --steps?"),
        ("finetune", ["--num_train_epochs", "3"], "--num_train_epochs: unknown; did you mean --epochs?"),
        ("finetune", ["--gradient_accumulation_steps", "3"], "did you mean --accumulate?"),
        ("finetune", ["--batch_size", "3"], "--batch_size: unknown; did you mean --batch-size?"),
        ("finetune", ["--learning-rat", "3", "--lenght", "3"], "--lenght: unknown; did you mean --length?"),
        ("finetune", ["--max-seq-length", "3"], "did you mean --length?"),
        ("finetune", ["--output-dir", "x"], "did you mean --output?"),
        ("finetune", ["--dataset", "x"], "did you mean --data?"),
        ("finetune", ["--xyzzy", "x"], "--xyzzy: unknown"),
        ("finetune", ["stray"], "unexpected 'stray'"),
        ("finetune", ["--max-steps", "3", "--qqq"], "--max-steps: unknown; did you mean --steps?; --qqq: unknown"),
        ("merge", ["--model", "a", "--edits", "b", "--output", "c", "--base-mode", "d"], "--base-mode: unknown"),
        ("convert", ["a", "b", "--overwite"], "did you mean --overwrite?"),
        ("bench", ["--second", "1", "--minuts", "3"], "--minuts: unknown; did you mean --minutes?"),
        ("info", ["--verbose"], "--verbose: unknown"),
    ],
)
def test_unknown_options(command: str, words: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *words])
    assert stopped.value.code == cli.EXIT_ERROR
    shown = capsys.readouterr().err
    assert meant in shown
    assert f"usage: red-kernels {command} " in shown


def test_an_option_of_finetune_is_suggested_to_finetune_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["info", "--max-steps", "3"])
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        ["info"],
        ["sweep", "--output", "o"],
        ["evaluate", "o"],
        ["generate", "o"],
        ["merge", "--model", "m", "--edits", "e", "--output", "o"],
        ["convert", "e", "o"],
        ["push", "e", "r"],
        ["bench"],
    ],
    ids=lambda line: line[0],
)
def test_commands_that_share_no_work_refuse_a_launcher(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(3):
        for name, value in {"WORLD_SIZE": 3, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        assert cli.main(line) == cli.EXIT_ERROR
        shown = capsys.readouterr()
        said = f"error: {line[0]} runs in one process, got 3; start it without a launcher\n"
        assert (shown.out, shown.err) == ("", "" if rank else said)


def test_a_cluster_that_only_counts_its_processes_is_no_launcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["convert", str(tmp_path / "none"), str(tmp_path / "o")]) == cli.EXIT_ERROR
    assert "one process" not in capsys.readouterr().err


class Parser(Exception):
    """What some library might raise."""


EXPLAINED = [
    ValueError("a value"),
    TypeError("a type"),
    RuntimeError("of torch"),
    RecursionError("deep"),
    OSError(28, "No space left on device"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    EOFError("Ran out of input"),
    MemoryError("all of it"),
    pickle.UnpicklingError("odd byte"),
    struct.error("unpack requires 4 bytes"),
    zipfile.BadZipFile("no zip"),
    safetensors.SafetensorError("header too large"),
    ModuleNotFoundError("pip install it"),
]
UNEXPECTED = [KeyError("x"), AttributeError("no x"), IndexError("7"), AssertionError(), Parser("odd")]


@pytest.mark.parametrize("error", [*EXPLAINED, *UNEXPECTED], ids=lambda error: type(error).__name__)
def test_every_error_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "_info", fail)
    expected = error in EXPLAINED
    assert cli.main(["info"]) == (cli.EXIT_ERROR if expected else cli.EXIT_UNEXPECTED)
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    if expected:
        assert shown.startswith("error: ")
        assert "unexpected" not in shown
    else:
        assert shown.startswith(f"error: unexpected {type(error).__name__}: ")
        assert "--traceback shows where" in shown
    with pytest.raises(type(error)):
        cli.main(["info", "--traceback"])


def test_an_error_of_many_lines_is_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: Any) -> int:
        raise ValueError("a\n  b\r\nc \x1b[31m \u2028 d\x00")

    monkeypatch.setattr(cli, "_info", fail)
    assert cli.main(["info"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err == "error: a b c \\x1b[31m d\\x00\n"


# ---- edits that will not merge


def folder_of(kind: Any, config: Any, folder: Path) -> Path:
    kind(config).save_pretrained(folder)
    tiny_folders.tokenizer().save_pretrained(folder)
    return folder


def small(kind: Any) -> Any:
    return kind(
        vocab_size=tiny_folders.VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
    )


MODELS = {
    "qwen2": lambda folder: folder_of(Qwen2ForCausalLM, small(Qwen2Config), folder),
    "mistral": lambda folder: folder_of(MistralForCausalLM, small(MistralConfig), folder),
    "llama": tiny_folders.tiny_llama,
}
NOTE = "Note: red-kernels merge will refuse these edits: "


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_biases_without_a_place(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`finetune` says it before it trains, and `merge` in the command's own words."""
    base = MODELS[name](tmp_path / "base")
    (tmp_path / "text.txt").write_text("a line of text\n" * 100)
    where = ["--model", str(base), "--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")]
    more = ["--length", "16", "--steps", "1", "--no-compare", "--device", "cpu", "--dtype", "fp32", "--lr", "0.5"]
    assert cli.main(["finetune", *where, *more]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert NOTE in shown
    assert "has no place for the biases" in shown
    assert "train --kind scaling, which can be merged" in shown
    assert shown.index(NOTE) < shown.index("Trainable parameters")
    edits = ["--edits", str(tmp_path / "out" / "edits"), "--output", str(tmp_path / "merged")]
    assert cli.main(["merge", "--model", str(base), *edits]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert "has no place for the biases" in error
    assert "--kind scaling" in error
    assert "loadable" not in error
    assert cli.main(["finetune", *where, *more, "--kind", "scaling", "--overwrite"]) == 0
    assert NOTE not in capsys.readouterr().out
    assert cli.main(["merge", "--model", str(base), *edits]) == 0


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("llama", {}, ""),
        ("llama", {"kind": "ln"}, "kind 'ln'"),
        ("llama", {"position": "res"}, "residual stream"),
        ("llama", {"sites": "*.input_layernorm"}, "kind 'scaling'"),
        ("llama", {"sites": "*.input_layernorm", "kind": "scaling"}, ""),
        ("qwen2", {}, "no place for the biases"),
        ("qwen2", {"kind": "scaling"}, ""),
        ("mistral", {"kind": "bias"}, "no place for the biases"),
    ],
)
def test_the_reason_against_a_merge(name: str, config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    from red_kernels.merging.merge import reason_against

    model = transformers.AutoModelForCausalLM.from_pretrained(MODELS[name](tmp_path))
    rk.patch(model, rk.RedConfig(**config))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = reason_against(model)
    assert reason in found
    assert bool(found) == bool(reason)
    assert model.state_dict().keys() == before.keys()
    if reason:
        with pytest.raises(ValueError, match=re.escape(found)):
            rk.merge(model)
    else:
        rk.merge(model)


def test_the_command_advises_its_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_folders.tiny_llama(tmp_path / "base")
    model = tiny_folders.LlamaForCausalLM.from_pretrained(base)
    rk.patch(model, rk.RedConfig(kind="scaling"))
    for parts in rk.edit_parameters(model).values():
        parts["scale"].data.mul_(1.0005)
    rk.save_edits(model, tmp_path / "edits")
    words = ["--model", str(base), "--edits", str(tmp_path / "edits"), "--output", str(tmp_path / "merged")]
    assert cli.main(["merge", *words, "--dtype", "bf16"]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert "merge into --dtype fp32, or pass --force" in error
    assert "model.float()" not in error
    with pytest.raises(ValueError, match=r"merge in float32 \(model\.float\(\)\), or pass force=True"):
        rk.merge(model.bfloat16())


def test_a_report_of_sites_names_them() -> None:
    model = transformers.LlamaForCausalLM(small(transformers.LlamaConfig))
    report = str(rk.patch(model, rk.RedConfig(sites=["*.o_proj", "*.down_proj"])))
    assert "sites *.o_proj, *.down_proj, kind all" in report
    assert "position" not in report


@pytest.mark.parametrize("words", [["info"], ["finetune", "--model", "no/such/folder", "--data", "t.txt"], ["merge"]])
def test_no_line_of_another_package_precedes(words: list[str], tmp_path: Path) -> None:
    """What torchao and bitsandbytes log when they are imported is not the command's."""
    (tmp_path / "t.txt").write_text("a line\n" * 100)
    if words == ["merge"]:
        base = tiny_folders.tiny_llama(tmp_path / "base")
        words = ["merge", "--model", str(base), "--edits", str(tmp_path), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "red_kernels", *words]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert [text for text in lines if not text.startswith("error: ")] == []
    assert len(lines) == (0 if words == ["info"] else 1)
