"""csrc/build.py: which GPUs are built for, which compiler is taken, what is not compiled again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from build_tools import build, program


@pytest.mark.parametrize(
    ("text", "code", "ptx"),
    [
        ("80 90 100", (80, 90, 100), (100,)),
        ("8.0;9.0+PTX", (80, 90), (90,)),
        (" 10.0, 8.6+ptx ", (86, 100), (86, 100)),
        ("90;90", (90,), (90,)),
    ],
)
def test_architectures_that_are_asked_for(
    text: str, code: tuple[int, ...], ptx: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RED_KERNELS_ARCHS", text)
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.architectures() == build.architectures(text) == build.Architectures(code, ptx)


def test_architectures_for_nvcc() -> None:
    both = build.Architectures((80, 90), (80, 90))
    assert str(both) == "sm_80 sm_90 compute_80 compute_90"
    assert build.Architectures((80, 90), (90,)).flags() == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


@pytest.mark.parametrize("text", ["7.5", "75", "8", "80 Hopper", "9.0a", "sm_90", "80+PTX+PTX", ";", "all"])
def test_architectures_that_are_wrong(text: str) -> None:
    with pytest.raises(build.SettingError, match=re.escape(f"RED_KERNELS_ARCHS (or --archs) is {text!r}, with ")):
        build.architectures(text)


@pytest.mark.parametrize(("asked", "flags"), [(None, []), ("0", []), ("1", ["-lineinfo"])])
def test_source_lines_where_asked(asked: str | None, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They make the library nearly three times as large."""
    monkeypatch.delenv("RED_KERNELS_LINEINFO", raising=False)
    if asked is not None:
        monkeypatch.setenv("RED_KERNELS_LINEINFO", asked)
    assert build.line_numbers() == flags
    monkeypatch.setenv("RED_KERNELS_LINEINFO", "yes")
    with pytest.raises(build.SettingError, match="RED_KERNELS_LINEINFO is 'yes', expected 1 for source lines, or 0"):
        build.line_numbers()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("echo 9.0; echo 9.0", "sm_90 compute_90"),
        ("echo 12.0; echo 8.6; echo 7.5", "sm_86 sm_120 compute_120"),
        ("echo 'no devices were found'; exit 6", "sm_80 sm_90 sm_100 compute_100"),
        ("echo '[N/A]'", "sm_80 sm_90 sm_100 compute_100"),
    ],
)
def test_architectures_of_the_gpus_here(
    answer: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One architecture for each kind of GPU is quicker to build than all; without a GPU it is all."""
    program(tmp_path / "nvidia-smi", f"#!/bin/sh\n[ $1 = --query-gpu=compute_cap ] || exit 1\n{answer}\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RED_KERNELS_ARCHS", raising=False)
    assert str(build.architectures()) == expected
    monkeypatch.setenv("RED_KERNELS_ARCHS", "100")
    assert str(build.architectures()) == "sm_100 compute_100"


def test_a_gpu_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "nvidia-smi", "#!/bin/sh\necho 7.5\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RED_KERNELS_ARCHS", raising=False)
    with pytest.raises(build.BuildError, match="the GPU here is sm_75, and the kernels need sm_80 or later; remedy"):
        build.architectures()


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {name: tmp_path / name / "bin" for name in ("path", "home", "toolkit")}
    for folder in places.values():
        folder.mkdir(parents=True)
        program(folder / "nvcc", "#!/bin/sh\n")
    named = program(tmp_path / "named", "#!/bin/sh\n")
    monkeypatch.setattr(build, "TOOLKITS", (str(tmp_path / "toolkit"),))
    monkeypatch.setenv("NVCC", str(named))
    monkeypatch.setenv("PATH", str(places["path"]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == str(named)
    monkeypatch.delenv("NVCC")
    assert build.find_nvcc() == str(places["path"] / "nvcc")
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.find_nvcc() == str(places["home"] / "nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert build.find_nvcc() == str(places["toolkit"] / "nvcc")


@pytest.mark.parametrize(
    ("machine", "defined", "sets"),
    [
        ("x86_64", "-DRED_X86", {"base": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}),
        ("AMD64", "-DRED_X86", {"base": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}),
        ("aarch64", "-DRED_AARCH64", {"neon": 4, "neon_bf16": 4}),
        ("arm64", "-DRED_AARCH64", {"neon": 4, "neon_bf16": 4}),  # as macOS calls it
        ("riscv64", None, {"base": 4}),
    ],
)
def test_instruction_sets_of_a_machine(machine: str, defined: str | None, sets: dict[str, int], tmp_path: Path) -> None:
    jobs = build.kernel_jobs("c++", machine, tmp_path)
    assert [job.built for job in jobs] == [tmp_path / f"{prefix}{name}.o" for name in sets for prefix in ("", "mix_")]
    for job, (name, lanes) in zip(jobs, [one for one in sets.items() for _ in range(2)], strict=True):
        assert {f"-DRED_ISA={name}", f"-DRED_LANES={lanes}"} <= set(job.command)
        flags = {word for word in job.command if word in ("-DRED_X86", "-DRED_AARCH64")}
        assert flags == ({defined} if defined else set())
        assert flags <= set(build.cpu_command("c++", machine))
        assert ("-march=armv8.2-a+bf16" in job.command) == (name == "neon_bf16")
        assert any(word.startswith("-mavx") for word in job.command) == name.startswith("avx")


COUNTING = """#!/bin/sh
[ $1 = --version ] && exec echo one
while [ $# -gt 1 ]; do
  [ $1 = -o ] && out=$2
  shift
done
echo $1 >> {log}
echo "ptxas info    : said of $1"
echo object > $out
"""


def test_what_has_not_changed_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "a.cu": '#include "sub/x.h"\n',
        "b.cu": '  # include "y.h"\n// longer\n',
        "y.h": "",
        "z.h": "",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/x.h").write_text('#include "../z.h"\n#include "../a.cu"\n#include "not/there.h"\n')
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "version.py").write_text("2.11")
    log = tmp_path / "log"
    compiler = program(tmp_path / "compiler", COUNTING.format(log=log))
    monkeypatch.setattr(build, "ROOT", tmp_path)

    def compiled(*flags: str) -> list[str]:
        log.write_text("")
        jobs = [
            build.Job(
                tmp_path / f"{name}.cu", tmp_path / f"{name}.o", (str(compiler), *flags), tmp_path / f"{name}.txt"
            )
            for name in "ab"
        ]
        build._compile(jobs, tmp_path, torch)
        return sorted(log.read_text().split())

    assert compiled() == ["a.cu", "b.cu"]
    assert (tmp_path / "b.txt").read_text() == "ptxas info    : said of b.cu\n"
    assert compiled() == []
    (tmp_path / "z.h").write_text("// a header of a header")
    assert compiled() == ["a.cu"]
    (tmp_path / "y.h").write_text("// a header")
    assert compiled() == ["b.cu"]
    (tmp_path / "b.cu").write_text("// the file")
    assert compiled() == ["b.cu"]
    assert compiled("-O3") == ["a.cu", "b.cu"]
    (tmp_path / "a.o").unlink()
    assert compiled("-O3") == ["a.cu"]
    (tmp_path / "b.txt").unlink()
    assert compiled("-O3") == ["b.cu"]
    (torch / "version.py").write_text("2.12")
    assert compiled("-O3") == ["a.cu", "b.cu"]
    compiler.write_text(COUNTING.format(log=log).replace("echo one", "echo two"))
    assert compiled("-O3") == ["a.cu", "b.cu"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_build_is_not_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.cu").write_text("")
    compiler = program(tmp_path / "compiler", "#!/bin/sh\n[ $1 = --version ] || exit 1\n")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    job = build.Job(tmp_path / "a.cu", tmp_path / "a.o", (str(compiler), "-c"))
    for _ in range(2):
        with pytest.raises(build.BuildError, match=r"compiler failed on a\.cu: no message; remedy"):
            build._compile([job], tmp_path, tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "/nowhere/nvcc")
    assert build.main(["cuda", "--output", str(tmp_path / "x.so"), "--archs", "90"]) == 1
    assert "build.py: NVCC is '/nowhere/nvcc'" in capsys.readouterr().err
    assert build.main(["cuda", "--archs", "Hopper"]) == 1
    assert "is 'Hopper', with 'Hopper'; expected a list" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build.main(["cpu", "--archs", "90"])
    assert "--archs is for 'cuda', not for 'cpu'" in capsys.readouterr().err
