"""Builds csrc into red_kernels/lib, under the LibTorch stable ABI: one library for every Python and torch >= 2.11.

Torch is never imported here: only its headers are read, and its library is named to the linker. Without a compiler or
without torch the package installs all the same; the reason is kept in red_kernels/lib/cpu.missing, for
`red-kernels info`.

Variables: CXX, the compiler; RED_KERNELS_REQUIRE_CPU=1, to make a failed build an error; RED_KERNELS_TORCH, the
folder of the torch package to build against.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
TORCH_TARGET = 0x020B000000000000  # the oldest torch that the library loads in: 2.11
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
WITHOUT = ["-Wno-psabi", "-Wno-unused-parameter", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
X86_SETS = {
    "base": (4, []),
    "avx2": (8, ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (16, AVX512),
    "avx512_bf16": (16, [*AVX512, "-mavx512bf16"]),
}


class BuildError(Exception):
    """Why the library cannot be built, with the remedy."""


def find_torch() -> Path:
    """The folder of the installed torch package. Under build isolation it lies outside sys.path, in site-packages."""
    candidates = [os.environ.get("RED_KERNELS_TORCH")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        candidates.append(spec.submodule_search_locations[0])
    candidates += [os.path.join(sysconfig.get_path(kind), "torch") for kind in ("purelib", "platlib")]
    for folder in candidates:
        if folder and (Path(folder) / "include/torch/csrc/stable/ops.h").is_file():
            return Path(folder)
    raise BuildError("torch's headers were not found; remedy: install torch >= 2.11, then red-kernels again")


def find_compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise BuildError("no C++ compiler was found; remedy: install g++ or clang++, then red-kernels again")


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BuildError(
            f"{command[0]} failed on {command[-1]}: {last}; remedy: see the build's output (pip install -v)"
        )


def build_cpu_library(target: Path, objects: Path) -> None:
    """Compile the kernels once for each instruction set and everything else for the oldest processor, and link."""
    torch, compiler = find_torch(), find_compiler()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = X86_SETS if x86 else {"base": (4, [])}
    common = [
        compiler,
        *FLAGS,
        *WITHOUT,
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET:#x}ULL",
        *(["-DRED_X86"] if x86 else []),
    ]
    include = ["-isystem", str(torch / "include")]
    objects.mkdir(parents=True, exist_ok=True)
    jobs = [
        [
            *common,
            f"-DRED_ISA={name}",
            f"-DRED_LANES={lanes}",
            *flags,
            "-o",
            str(objects / f"{name}.o"),
            "-c",
            "csrc/cpu/isa.cpp",
        ]
        for name, (lanes, flags) in sets.items()
    ]
    for source in ("ops.cpp", "cpu/launch.cpp", "cpu/dispatch.cpp", "cpu/memory.cpp"):
        built = objects / (Path(source).stem + ".o")
        jobs.append([*common, *include, "-o", str(built), "-c", str(CSRC / source)])
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, jobs))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    files = [job[job.index("-o") + 1] for job in jobs]
    run([compiler, "-shared", "-o", str(temporary), *files, f"-L{torch / 'lib'}", "-ltorch_cpu"])
    temporary.replace(target)


class BuildLibraries(build_ext):
    """Builds plain shared libraries, which need no Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        missing = target.with_name("cpu.missing")
        try:
            build_cpu_library(target, ROOT / self.build_temp / "cpu")
        except BuildError as error:
            if os.environ.get("RED_KERNELS_REQUIRE_CPU") == "1":
                raise
            print(f"red-kernels: the CPU kernels are left out: {error}", file=sys.stderr)
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            missing.write_text(str(error))
        else:
            missing.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """An editable install has the library beside the sources."""
        for ext in self.extensions:
            built = ROOT / self.build_lib / self.get_ext_filename(ext.name)
            for file in (built, built.with_name("cpu.missing")):
                if file.is_file():
                    target = ROOT / "red_kernels/lib" / file.name
                    temporary = target.with_suffix(".tmp")  # whoever runs the old library keeps it whole
                    shutil.copy2(file, temporary)
                    temporary.replace(target)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "red_kernels/lib"
        return [str(file) for file in folder.glob("*") if file.suffix in (".so", ".missing")]


class Wheel(bdist_wheel):
    """Tagged py3-none: the library calls torch's C functions only."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("red_kernels.lib.libred_kernels_cpu", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
