"""The build: what a wheel and an sdist hold, a build that never imports torch, an installation without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from build_tools import CUDA_LIBRARY, LIBRARY, NODES_LIBRARY, ROOT, build, dynamic_symbols, program
from patience import HANGS

from red_kernels.backends import cpu, nodes

# A compiler of CUDA that makes empty objects in no time, and knows two GPUs.
QUICK_NVCC = """#!/bin/sh
for word in "$@"; do
  case $word in
    --version) echo quick; exit;;
    --list-gpu-code) echo sm_80; echo sm_90; exit;;
    -shared) shared=-shared;;
    *.so|*.tmp) out=$word;;
  esac
done
echo 'int red_quick_nvcc;' | {compiler} -x c -fPIC ${{shared:--c}} -o "$out" -
"""
# The real one, but for the kernels and the nodes, which take a minute: those compiled for this checkout are taken.
QUICK_COMPILER = """#!/bin/sh
for word in "$@"; do
  case $word in
    -DRED_ISA=*) set=${{word#*=}};;
    csrc/cpu/isa.cpp) kernels=cpu/;;
    csrc/cpu/isa_mix.cpp) kernels=cpu/mix_;;
    csrc/nodes/*.cpp) made={objects}/nodes/$(basename "$word" .cpp).o;;
    *.tmp) out=$word;;
  esac
done
[ -n "$kernels" ] && made={objects}/$kernels$set.o
[ -n "$made" ] && [ -f "$made" ] && exec cp "$made" "$out"
exec {compiler} "$@" -O0
"""
NO_TORCH = """
import builtins
_import = builtins.__import__
def _without_torch(name, *rest, **named):
    if name.partition(".")[0] == "torch":
        raise ImportError("torch may be found, but not imported")
    return _import(name, *rest, **named)
builtins.__import__ = _without_torch
"""


pytestmark = pytest.mark.xdist_group("wheels")  # one worker builds them


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the sources: builds leave nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    unwanted = shutil.ignore_patterns("*.so", "*.missing", "*.tmp", "__pycache__", "*.egg-info")
    for name in ("csrc", "red_kernels", "tests", "benchmarks", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for path in ROOT.glob("[!.]*"):
        if path.is_file() and path.suffix != ".log":
            shutil.copy2(path, folder / path.name)
    return folder


def _environment(**changes: str | None) -> dict[str, str]:
    """Without the CUDA kernels, which take minutes, unless ``changes`` says otherwise."""
    unwanted = ("CXX", "NVCC", "CUDA_HOME", "PYTHONPATH")
    found = {k: v for k, v in os.environ.items() if not k.startswith("RED_KERNELS") and k not in unwanted}
    return found | {"RED_KERNELS_CUDA": "0"} | {k: v for k, v in changes.items() if v is not None}


def _run(*command: str, folder: Path, **changes: str | None) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=_environment(**changes),
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both libraries, built by a Python that cannot import torch."""
    if cpu.load_error() is not None:
        pytest.skip(f"no CPU kernels: {cpu.load_error()}")
    folder, torchless = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("torchless")
    (torchless / "sitecustomize.py").write_text(NO_TORCH)
    checked = _run(
        "-c", "try: import torch\nexcept ImportError as e: print(e)", folder=source, PYTHONPATH=str(torchless)
    )
    assert "but not imported" in checked
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        pytest.skip("no C++ compiler")
    text = QUICK_COMPILER.format(compiler=found, objects=ROOT / "build/csrc")
    compiler = program(torchless / "c++", text)
    _run(
        "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder),
        folder=source, PYTHONPATH=str(torchless), RED_KERNELS_REQUIRE_CPU="1",
        CXX=str(compiler), NVCC=str(program(torchless / "nvcc", QUICK_NVCC.format(compiler=found))),
        RED_KERNELS_CUDA="1", RED_KERNELS_ARCHS="80 90",
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_is_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"red_kernels-[^-]+-py3-none-(?!any)\w+\.whl", wheel.name), wheel.name


def test_wheel_holds_the_package_and_its_libraries(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {LIBRARY, CUDA_LIBRARY, NODES_LIBRARY} <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 3
    assert "red_kernels/py.typed" in names
    assert "red_kernels/backends/cpu.py" in names
    assert {"red_kernels/benchmarks/suite.py", "red_kernels/benchmarks/ops/implementations/quack.py"} <= set(names)
    packages = {name.split("/")[0] for name in names}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"red_kernels"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".cu", ".cuh", ".o", ".missing", ".tmp"))]


def test_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import torch, red_kernels as rk; assert rk.available_backends()['cpu'] is None, rk.available_backends();"
        "rk.backend('cpu').__enter__(); x = torch.randn(3, 5); assert torch.equal(rk.edit(x, x[0]), x * x[0]);"
        "from red_kernels import cli; suite = cli._benchmarks('suite');"
        "print(rk.__file__, suite.__name__, suite.__file__)"
    )
    found = _run("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path)).split()
    folder = tmp_path / "red_kernels"
    assert found[-3:] == [
        str(folder / "__init__.py"),
        "red_kernels.benchmarks.suite",
        str(folder / "benchmarks/suite.py"),
    ]


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "from setuptools.build_meta import build_sdist; import sys; print(build_sdist(sys.argv[1]))"
    _run("-c", code, str(folder), folder=source)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_sdist_holds_what_a_build_needs(source: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    kinds = {".cpp", ".h", ".cu", ".cuh", ".py"}
    sources = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.suffix in kinds}
    assert sources
    assert sources <= names
    assert {
        "setup.py",
        "csrc/build.py",
        "pyproject.toml",
        "red_kernels/backends/reference.py",
        "tests/backends/test_build.py",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "mkdocs.yml",
        "docs/site/requirements.txt",
        "docs/pictures/edit-dark.svg",
    } <= names
    assert not [name for name in names if name.endswith((".so", ".missing", ".o"))]


def test_the_sdist_installs_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    """It works on the reference backend, and says why: the build does, and the package as well."""
    empty = tmp_path / "bin"
    empty.mkdir()
    target = tmp_path / "target"
    built = _run(
        "-m", "pip", "install", str(sdist), "--no-deps", "--no-build-isolation", "-v", "--target", str(target),
        folder=tmp_path, PATH=str(empty),
    )  # fmt: skip
    assert "red-kernels: the CPU kernels are left out: no C++ compiler was found" in built
    assert not (target / LIBRARY).exists()
    code = (
        "import torch, red_kernels as rk; x = torch.randn(3, 5); assert torch.equal(rk.edit(x, x[0]), x * x[0]);"
        "print(rk.available_backends()['cpu'])"
    )
    said = _run("-c", code, folder=tmp_path, PYTHONPATH=str(target))
    assert "no C++ compiler was found; remedy: install g++ or clang++, then red-kernels again" in said


CONSUMER = """
import red_kernels as rk
from torch import nn

def edited(model: nn.Module) -> int:
    report = rk.patch(model, rk.RedConfig(position="ffn", layers=range(2)))
    reveal_type(report)
    reveal_type(report.trainable)
    rk.RedConfig(position=3)
    rk.patch(model, positions="ffn")
    return report
"""


def test_a_user_of_the_wheel_has_its_types(wheel: Path, tmp_path: Path) -> None:
    """mypy reads the annotations of an installed package only if `py.typed` is in it."""
    pytest.importorskip("mypy")
    _run("-m", "venv", "--without-pip", "user", folder=tmp_path)
    (packages,) = tmp_path.glob("user/lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "mypy.ini").write_text("[mypy]\nignore_missing_imports = True\n")

    def said() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--python-executable", "user/bin/python", "consumer.py"],
            cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=HANGS,
        )  # fmt: skip
        return done.stdout + done.stderr

    found = said()
    assert '"red_kernels.patching.report.PatchReport"' in found
    assert 'Revealed type is "int"' in found.replace("builtins.int", "int")
    assert 'Argument "position" to "RedConfig" has incompatible type "int"; expected "str"' in found
    assert 'Unexpected keyword argument "positions" for "patch"' in found
    assert 'Incompatible return value type (got "PatchReport", expected "int")' in found
    assert "Found 3 errors in 1 file" in found
    (packages / "red_kernels/py.typed").unlink()
    assert "PatchReport" not in said()


def test_a_build_that_must_have_the_library(source: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "o")],
        cwd=source,
        env=_environment(PATH=str(tmp_path), RED_KERNELS_REQUIRE_CPU="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "no C++ compiler was found" in done.stderr


def test_a_compiler_that_fails(source: Path, tmp_path: Path) -> None:
    """The reason is kept, and an earlier library does not stay behind."""
    compiler = program(tmp_path / "g++", "#!/bin/sh\necho 'fatal error: out of transistors' >&2\nexit 1\n")
    library = tmp_path / "build" / LIBRARY
    library.parent.mkdir(parents=True)
    library.write_bytes(b"old")
    _run(
        "setup.py", "build_ext", "--build-lib", str(tmp_path / "build"), "--build-temp", str(tmp_path / "o"),
        folder=source, CXX=str(compiler),
    )  # fmt: skip
    assert not library.exists()
    assert "out of transistors" in library.with_name("cpu.missing").read_text()


def test_nodes_without_the_headers_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.sysconfig, "get_path", lambda kind: str(tmp_path))
    with pytest.raises(build.BuildError, match=r"Python's headers are not in .*; remedy: install them \(apt-get"):
        build.build_nodes_library(tmp_path / "nodes.so", tmp_path)


def test_every_file_of_the_nodes_is_compiled() -> None:
    """One unit includes them all: a file that it leaves out would be missing only when the library is loaded."""
    folder = ROOT / "csrc/nodes"
    named = re.findall(r'^#include "(\w+\.cpp)"$', (folder / "all.cpp").read_text(), re.MULTILINE)
    assert named == sorted(path.name for path in folder.glob("*.cpp") if path.name != "all.cpp")


def test_nodes_say_what_they_were_built_for() -> None:
    if nodes.load_error() is not None:
        pytest.skip(f"no nodes: {nodes.load_error()}")
    assert f"torch {torch.__version__}" in nodes._here()
    assert (ROOT / NODES_LIBRARY).read_bytes().count(nodes._here().encode()) == 1


def _build_cuda(source: Path, folder: Path, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """A build into ``folder`` that lacks the CPU kernels, to be quick."""
    none = program(folder / "no-c++", "#!/bin/sh\nexit 1\n")
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder)],
        cwd=source,
        env=_environment(CXX=str(none), **changes),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def without_nvcc(source: Path, tmp_path: Path) -> Path:
    """Sources that look for nvcc in a folder that is not there; a PATH without it is up to the test."""
    folder = tmp_path / "without_nvcc"
    shutil.copytree(source, folder)
    build = folder / "csrc/build.py"
    text = build.read_text()
    assert text.count('TOOLKITS = ("/usr/local/cuda",)') == 1
    build.write_text(text.replace('TOOLKITS = ("/usr/local/cuda",)', 'TOOLKITS = ("/nowhere/cuda",)'))
    return folder


def test_no_nvcc_leaves_the_reason(without_nvcc: Path, tmp_path: Path) -> None:
    library = tmp_path / CUDA_LIBRARY
    library.parent.mkdir(parents=True)
    library.write_bytes(b"old")
    done = _build_cuda(without_nvcc, tmp_path, RED_KERNELS_CUDA="", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    reason = library.with_name("cuda.missing").read_text()
    assert reason.startswith("nvcc was not found; remedy: install the CUDA toolkit")
    assert f"the CUDA kernels are left out: {reason}" in done.stderr
    assert not library.exists()


def test_cuda_kernels_that_are_asked_for(without_nvcc: Path, tmp_path: Path) -> None:
    done = _build_cuda(without_nvcc, tmp_path, RED_KERNELS_CUDA="1", PATH=str(tmp_path))
    assert done.returncode != 0
    assert "nvcc was not found; remedy: install the CUDA toolkit" in done.stderr


def test_cuda_kernels_that_are_not_wanted(source: Path, tmp_path: Path) -> None:
    trap = program(tmp_path / "nvcc", f"#!/bin/sh\ntouch {tmp_path}/called\nexit 1\n")
    done = _build_cuda(source, tmp_path, RED_KERNELS_CUDA="0", NVCC=str(trap))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "called").exists()
    assert "RED_KERNELS_CUDA=0" in (tmp_path / CUDA_LIBRARY).with_name("cuda.missing").read_text()


@pytest.mark.parametrize("asked", ["", "1"])
def test_nvcc_that_fails(asked: str, source: Path, tmp_path: Path) -> None:
    text = "#!/bin/sh\n[ $1 = --list-gpu-code ] && exec echo sm_90\n"
    nvcc = program(tmp_path / "nvcc", f"{text}echo 'x.cu(1): error: out of warps' >&2\necho '1 error' >&2\nexit 1\n")
    done = _build_cuda(source, tmp_path, RED_KERNELS_CUDA=asked, RED_KERNELS_ARCHS="90", NVCC=str(nvcc))
    assert (done.returncode != 0) == (asked == "1")
    missing = (tmp_path / CUDA_LIBRARY).with_name("cuda.missing")
    said = done.stderr if asked else missing.read_text()
    assert re.search(
        r"nvcc failed on csrc/cuda/\w+\.cu: x\.cu\(1\): error: out of warps; remedy: see the build's", said
    )


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"RED_KERNELS_CUDA": "yes"}, "RED_KERNELS_CUDA is 'yes'; expected 1"),
        ({"RED_KERNELS_ARCHS": "Hopper"}, "RED_KERNELS_ARCHS (or --archs) is 'Hopper', with 'Hopper'; expected a list"),
        ({"RED_KERNELS_ARCHS": "100"}, "does not know sm_100, only sm_80, sm_90; remedy: a newer CUDA toolkit"),
        ({"NVCC": "/nowhere/nvcc"}, "NVCC is '/nowhere/nvcc', and that is no program"),
    ],
)
def test_wrong_settings_are_errors(wrong: dict[str, str], expected: str, source: Path, tmp_path: Path) -> None:
    """Also where the CUDA kernels are not asked for: a wish that cannot be met is never passed over."""
    nvcc = program(tmp_path / "nvcc", QUICK_NVCC.format(compiler="false"))
    done = _build_cuda(source, tmp_path, **({"RED_KERNELS_CUDA": "", "NVCC": str(nvcc)} | wrong))
    assert done.returncode != 0
    assert expected in done.stderr
    assert not (tmp_path / CUDA_LIBRARY).exists()


def test_editable_install_follows_the_last_build(source: Path, tmp_path: Path) -> None:
    """A library that was left out does not stay behind from before, nor a reason when there is a library."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    quick = program(tmp_path / "nvcc", QUICK_NVCC.format(compiler=compiler))
    none = program(tmp_path / "no-c++", "#!/bin/sh\nexit 1\n")
    library, lib = folder / CUDA_LIBRARY, (folder / CUDA_LIBRARY).parent
    for asked in ("1", "0", "1"):
        _run(
            "setup.py", "build_ext", "--inplace", folder=folder,
            CXX=str(none), NVCC=str(quick), RED_KERNELS_CUDA=asked, RED_KERNELS_ARCHS="80;9.0+PTX",
        )  # fmt: skip
        assert library.is_file() == (asked == "1")
        assert (lib / "cuda.missing").is_file() == (asked == "0")
        assert (lib / "cpu.missing").is_file()


libraries = pytest.mark.parametrize("library", [LIBRARY, CUDA_LIBRARY])


@libraries
def test_library_needs_no_python_and_no_c10(library: str) -> None:
    """Only torch's stable C functions: no symbol of Python, of c10 or at."""
    needed = dynamic_symbols(library, "--undefined-only")
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in needed)
    assert not [name for name in needed if re.match(r"_?Py[A-Z_]|_ZN\w*(3c10|2at)\w*", name)]


@libraries
def test_library_needs_no_newer_standard_library_than_torch_does(library: str) -> None:
    """GLIBCXX_3.4.30 is GCC 12's; torch's own wheels are manylinux_2_28."""
    versions = {"GLIBCXX": (3, 4, 30), "GLIBC": (2, 34), "CXXABI": (1, 3, 13)}
    for name in dynamic_symbols(library, "--undefined-only"):
        kind, _, version = name.rpartition("@")[2].partition("_")
        if kind in versions:
            assert tuple(map(int, version.split("."))) <= versions[kind], name


@libraries
def test_library_shows_only_its_own_functions(library: str) -> None:
    defined = dynamic_symbols(library, "--defined-only")
    shown = [name for name in defined if name.startswith("red_")]
    assert shown
    assert all(name.startswith(Path(library).stem.removeprefix("lib") + "_") for name in shown), shown
    # What else is shown are templates of the standard library, which are weak: nothing of CUDA's library inside.
    assert not [name for name in defined if re.match(r"(__)?cu(da)?[A-Z]", name) or "3red" in name]
