"""`red-kernels bench --instruction-sets`: a process and a folder for each set, in which torch is held to the same."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch._inductor import config

from benchmarks import sets
from red_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.load_error() is not None, reason="no CPU kernels are built")


class Ran:
    """Stands for subprocess.run, and remembers what it was asked for."""

    def __init__(self, codes: dict[str, int]) -> None:
        self.codes, self.calls = codes, list[tuple[list[str], dict[str, str]]]()

    def __call__(self, command: list[str], env: dict[str, str], check: bool) -> Any:
        assert not check
        self.calls.append((command, env))
        return subprocess.CompletedProcess(command, self.codes.get(env["RED_KERNELS_CPU"], 0))


@pytest.fixture
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ["base", "avx2", "avx512", "avx512_bf16"])


def test_all_are_each_of_the_processor() -> None:
    assert sets.chosen([sets.ALL]) == cpu.instruction_sets()
    assert sets.chosen(cpu.instruction_sets()[::-1]) == cpu.instruction_sets()


@pytest.mark.parametrize("names", [["sse9"], ["base", "sse9"], []])
def test_another_is_an_error_before_anything_runs(names: list[str], four: None, tmp_path: Path) -> None:
    run = Ran({})
    with pytest.raises(ValueError, match=r"--instruction-sets: got (sse9|nothing), expected some of base, avx2,"):
        sets.run_sets(names, {}, tmp_path, run)
    assert not run.calls


def test_each_has_its_process_and_its_folder(four: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Ran({})
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # which would hold the newest set's torch back
    given = {
        "job": "ops", "run": print, "output": tmp_path, "resume": True, "overwrite": False, "minutes": 2.5,
        "tune": False, "widths": (64, 768), "instruction_sets": ("all",), "dtypes": ("bf16",), "device": "cpu",
    }  # fmt: skip
    assert sets.run_sets(["all"], given, tmp_path, run) == 0
    assert [env["RED_KERNELS_CPU"] for _, env in run.calls] == ["base", "avx2", "avx512", "avx512_bf16"]
    assert [env.get("ATEN_CPU_CAPABILITY") for _, env in run.calls] == [
        "default", "avx2", "avx512", None,
    ]  # fmt: skip
    assert [env.get("TORCHINDUCTOR_CPP_MARCH") for _, env in run.calls] == ["x86-64", "haswell", "skylake-avx512", None]
    options = ["--resume", "--minutes", "2.5", "--widths", "64", "768", "--dtypes", "bf16", "--device", "cpu"]
    for command, env in run.calls:
        folder = tmp_path / env["RED_KERNELS_CPU"]
        assert command == [sys.executable, "-m", "red_kernels", "bench", "ops", "--output", str(folder), *options]
        assert env["PATH"] == os.environ["PATH"]


def test_a_zero_is_handed_on(four: None, tmp_path: Path) -> None:
    """Each set's own run says what is wrong with it."""
    run = Ran({})
    sets.run_sets(["avx2"], {"job": "ops", "minutes": 0.0, "seconds": 0.0, "quick": False}, tmp_path, run)
    assert run.calls[0][0][-4:] == ["--minutes", "0.0", "--seconds", "0.0"]


COMPILED = """
import torch
torch.set_num_threads(1)
def edited(x, residual, scale, bias, weight, norm_bias):
    z = (x * scale + bias).to(x.dtype) + residual
    return torch.nn.functional.layer_norm(z, (768,), weight, norm_bias), z
halves = [torch.randn(size).bfloat16().requires_grad_() for size in ((64, 768), (64, 768), 768, 768)]
scale, bias = (torch.randn(768).requires_grad_() for _ in range(2))
y, z = torch.compile(edited)(halves[0], halves[1], scale, bias, halves[2].detach(), halves[3].detach())
(y.sum() + z.sum()).backward()
"""


@pytest.mark.long
@pytest.mark.skipif("avx512" not in cpu.instruction_sets(), reason="the processor has nothing newer than AVX2")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.skipif(not hasattr(config.cpp, "march"), reason="this torch cannot be told")
def test_compiled_code_has_nothing_newer(tmp_path: Path) -> None:
    """The registers from 16 on are of AVX-512, whatever their width: torch.compile's compiler would use them."""
    subprocess.run([sys.executable, "-c", COMPILED], env=sets.held_to("avx2", str(tmp_path)), check=True)
    built = list(tmp_path.rglob("*.main.so"))
    assert built
    for library in built:
        code = subprocess.run(["objdump", "-d", str(library)], check=True, capture_output=True, text=True).stdout
        assert "ymm" in code
        assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])", code)


def test_each_has_its_own_cache_of_compiled_code(four: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of torch.compile does not tell the sets apart: code of one set may not even compile for another."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = Ran({})
    sets.run_sets(["all"], {}, tmp_path, run)
    folders = {env["TORCHINDUCTOR_CACHE_DIR"] for _, env in run.calls}
    assert len(folders) == 4
    assert str(tmp_path) not in folders
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.parametrize("code", [1, -9])
def test_one_that_fails_does_not_stop_the_others(
    code: int, four: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Ran({"avx2": code})
    assert sets.run_sets(["all"], {}, tmp_path, run) == 1
    assert len(run.calls) == 4
    assert capsys.readouterr().err == (
        "" if code == 1 else "Instruction set avx2: ended by SIGKILL; --resume continues\n"
    )


def test_torch_and_the_kernels_are_held_to_the_same_set(tmp_path: Path) -> None:
    name = cpu.instruction_sets()[0]
    command = ["-m", "red_kernels", "bench", "ops", "--quick", "--instruction-sets", name, "--output", str(tmp_path)]
    narrow = ["--operations", "edit", "--dtypes", "bf16", "--widths", "64", "--rows", "64", "--inputs", "fresh"]
    subprocess.run([sys.executable, *command, *narrow], check=True, capture_output=True)
    found = json.loads((tmp_path / name / "ops.json").read_text())["environment"]
    assert found["instruction_set"] == name
    assert found["device"].endswith(f", held to {name}")
    if name == "base":
        assert found["torch_capability"] == "DEFAULT"


def test_a_gpu_has_none() -> None:
    command = [sys.executable, "-m", "red_kernels", "bench", "ops", "--instruction-sets", "all", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "--instruction-sets: needs --device cpu, got --device cuda" in done.stderr
