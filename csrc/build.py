"""Compiles csrc, for setup.py and as a command: `python csrc/build.py cpu|cuda|nodes|emulator`.

The kernels are compiled under the LibTorch stable ABI: their libraries work with every Python and every torch >= 2.11.
The library of autograd's nodes, in csrc/nodes, works with the Python and the torch that it was built for, and says
which. Torch is never imported here: only its headers are read, and its library is named to the linker. What has not
changed since the last build is not compiled again.

Variables: CXX, the C++ compiler; NVCC, CUDA's; RED_KERNELS_ARCHS, the GPUs to build for, as in "80 90 100" or
"9.0;10.0+PTX"; RED_KERNELS_TORCH, the folder of the torch package to build against; RED_KERNELS_LINEINFO=1 has the CUDA
kernels name source lines for profilers and sanitizers, in a library of nearly three times the size.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / "csrc"
TORCH_TARGET = 0x020B000000000000  # the oldest torch that the libraries load in: 2.11
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wall", "-Wextra"]
WITHOUT = [
    "-Wno-unknown-warning-option",
    "-Wno-psabi",
    "-Wno-unused-parameter",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprfchw"]
# Of a set for bf16 only the kernels of that type are compiled: the set before it has the others.
BF16 = ["-DRED_BFLOAT16_ONLY"]
X86_SETS = {
    "base": (4, []),
    "avx2": (8, ["-mavx2", "-mfma", "-mf16c", "-mprfchw"]),
    "avx512": (16, AVX512),
    "avx512_bf16": (16, [*AVX512, "-mavx512bf16", *BF16]),
}
# The second has instructions from fp32 to bf16: Graviton 3 and 4, Grace, Apple's M2 and later.
AARCH64_SETS = {"neon": (4, []), "neon_bf16": (4, ["-march=armv8.2-a+bf16", *BF16])}
TOOLKITS = ("/usr/local/cuda",)
OLDEST_GPU = 80
GPUS = (80, 90, 100)
# -v has the assembler say what every kernel takes of registers and memory.
CUDA_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
EMULATOR_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-DRED_EMULATED"]


class BuildError(Exception):
    """Why a library cannot be built, with the remedy."""


class SettingError(BuildError):
    """A variable that cannot be followed: never passed over."""


@dataclass(frozen=True)
class Architectures:
    """GPUs to build for: ``code`` for those (80 for sm_80), and ``ptx`` for all later than each."""

    code: tuple[int, ...]
    ptx: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join([*(f"sm_{n}" for n in self.code), *(f"compute_{n}" for n in self.ptx)])

    def flags(self) -> list[str]:
        found = []
        for n in sorted({*self.code, *self.ptx}):
            kinds = [f"sm_{n}"] * (n in self.code) + [f"compute_{n}"] * (n in self.ptx)
            found.append(f"-gencode=arch=compute_{n},code=[{','.join(kinds)}]")
        return found


@dataclass(frozen=True)
class Job:
    """One file to compile. ``report`` gets what the compiler said, where that is wanted."""

    source: Path
    built: Path
    command: tuple[str, ...]  # without the source and -o
    report: Path | None = None


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


def find_nvcc() -> str:
    """The CUDA compiler: $NVCC, or else the first on PATH, in $CUDA_HOME and in /usr/local/cuda."""
    named = os.environ.get("NVCC")
    if named:
        if shutil.which(named):
            return named
        raise SettingError(f"NVCC is {named!r}, and that is no program; remedy: the path of nvcc, or leave it unset")
    homes = [home for home in (os.environ.get("CUDA_HOME"), *TOOLKITS) if home]
    for name in ("nvcc", *(os.path.join(home, "bin", "nvcc") for home in homes)):
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        "nvcc was not found; remedy: install the CUDA toolkit (12 or later), or set CUDA_HOME or NVCC to where it is, "
        "then install red-kernels again"
    )


def architectures(text: str | None = None) -> Architectures:
    """What to build for: ``text`` or the variable RED_KERNELS_ARCHS, or else the GPUs of this machine, or else all.

    Each has code of its own; the highest, and those written with +PTX, have PTX too, for later GPUs. Raises
    SettingError for a list that is wrong, BuildError if all GPUs here are too old.
    """
    asked = os.environ.get("RED_KERNELS_ARCHS", "") if text is None else text
    if asked.strip():
        return _parsed(asked)
    here = _gpus()
    good = sorted({n for n in here if n >= OLDEST_GPU})
    if here and not good:
        raise BuildError(
            f"the GPU here is sm_{max(here)}, and the kernels need sm_{OLDEST_GPU} or later; remedy: use the backend "
            "'triton', or set RED_KERNELS_ARCHS to build for other GPUs"
        )
    code = tuple(good or GPUS)
    return Architectures(code, code[-1:])


def build_cpu_library(target: Path, objects: Path = OBJECTS / "cpu") -> None:
    """Compile the kernels once for each instruction set and everything else for the oldest processor, and link."""
    torch, compiler = find_torch(), find_compiler()
    machine = platform.machine()
    jobs = kernel_jobs(compiler, machine, objects)
    common = (*cpu_command(compiler, machine), _torch_target(), "-isystem", str(torch / "include"))
    for source in ("ops", "cpu/launch", "cpu/mix_launch", "cpu/dispatch", "cpu/plan", "cpu/memory"):
        path = ROOT / f"csrc/{source}.cpp"
        jobs.append(Job(path, objects / f"{path.stem}.o", common))
    _compile(jobs, objects, torch)
    _link([compiler, "-shared"], target, jobs, [f"-L{torch / 'lib'}", "-ltorch_cpu"])


def kernel_jobs(compiler: str, machine: str, objects: Path) -> list[Job]:
    """The kernels, once for each instruction set of a machine (a name as of ``platform.machine()``). Needs no torch."""
    sets = X86_SETS if _x86(machine) else AARCH64_SETS if _aarch64(machine) else {"base": (4, [])}
    return [
        Job(
            ROOT / "csrc/cpu" / source,
            objects / f"{prefix}{name}.o",
            # Vectors are written out: -O3 adds compile time.
            (*cpu_command(compiler, machine), "-O2", f"-DRED_ISA={name}", f"-DRED_LANES={lanes}", *flags),
        )
        for name, (lanes, flags) in sets.items()
        for source, prefix in (("isa.cpp", ""), ("isa_mix.cpp", "mix_"))
    ]


def cpu_command(compiler: str, machine: str) -> tuple[str, ...]:
    """How a file of csrc/cpu is compiled for a machine, without the flags of an instruction set."""
    sets = ["-DRED_X86"] * _x86(machine) + ["-DRED_AARCH64"] * _aarch64(machine)
    return (compiler, *FLAGS, *WITHOUT, *sets, "-c")


def build_cuda_library(target: Path, objects: Path = OBJECTS / "cuda", archs: Architectures | None = None) -> None:
    """Compile every file of csrc/cuda by nvcc and link, for ``archs`` (without: see :func:`architectures`).

    What the assembler says of each file's kernels is kept as ``objects``/NAME.ptxas.txt.
    """
    nvcc, torch = find_nvcc(), find_torch()
    wanted = architectures() if archs is None else archs
    _check_known(nvcc, wanted)
    names = '-DRED_ARCHITECTURES="' + str(wanted) + '"'
    host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
    common = (
        nvcc, *host, *CUDA_FLAGS, *line_numbers(), *wanted.flags(), "-DUSE_CUDA", _torch_target(), names,
        "-isystem", str(torch / "include"), "-c",
    )  # fmt: skip
    jobs = [
        Job(source, objects / f"{source.name}.o", common, objects / f"{source.stem}.ptxas.txt")
        for source in _sources("*.cu")
    ]
    _compile(jobs, objects, torch)
    # What only a torch with CUDA has is a weak symbol: a torch without has none of it, and the library loads there too.
    # It is in libtorch_cuda, which libtorch brings along where there is one.
    options = "-Xlinker=--exclude-libs,ALL,--no-as-needed"
    _link(
        [nvcc, *host, "-shared", "-cudart=static", "--no-device-link", options],
        target,
        jobs,
        [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"],
    )


def line_numbers() -> list[str]:
    """The flag for source lines in CUDA's machine code, which changes no instruction, where it is asked for."""
    asked = os.environ.get("RED_KERNELS_LINEINFO", "")
    if asked not in ("", "0", "1"):
        raise SettingError(f"RED_KERNELS_LINEINFO is {asked!r}, expected 1 for source lines, or 0")
    return ["-lineinfo"] if asked == "1" else []


def build_nodes_library(target: Path, objects: Path = OBJECTS / "nodes") -> None:
    """Compile csrc/nodes, a module of the Python that runs this, for the torch that it finds."""
    torch, compiler = find_torch(), find_compiler()
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        raise BuildError(
            f"Python's headers are not in {headers}; remedy: install them (apt-get install python3-dev), then "
            "red-kernels again"
        )
    built_for = f'-DRED_BUILT_FOR="{sysconfig.get_config_var("SOABI")}, torch {_torch_version(torch)}"'
    common = (
        compiler, *FLAGS, *WITHOUT, "-O2", "-Wno-missing-field-initializers", "-DRED_ATEN", built_for,
        "-isystem", str(torch / "include"), "-isystem", str(headers), "-c",
    )  # fmt: skip
    jobs = [Job(ROOT / "csrc/nodes/all.cpp", objects / "all.o", common)]
    _compile(jobs, objects, torch)
    libraries = [f"-l{name}" for name in ("torch_python", "torch", "torch_cpu", "c10")]
    _link([compiler, "-shared"], target, jobs, [f"-L{torch / 'lib'}", *libraries])


def build_emulator(target: Path, objects: Path = OBJECTS / "emulator") -> None:
    """Compile csrc/cuda by the C++ compiler: the kernels run on the CPU, slowly, for tests."""
    torch, compiler = find_torch(), find_compiler()
    common = (
        compiler, *EMULATOR_FLAGS, *_own_instructions(), _torch_target(),
        "-isystem", str(torch / "include"), "-c", "-x", "c++",
    )  # fmt: skip
    jobs = [Job(source, objects / f"{source.name}.o", common) for source in _sources("*.cu", "*.cpp")]
    _compile(jobs, objects, torch)
    _link([compiler, "-shared", "-pthread"], target, jobs, [f"-L{torch / 'lib'}", "-ltorch_cpu"])


def run(command: list[str], what: str) -> str:
    """Run a compiler in the root of the sources; returns what it said. BuildError, with the last error, if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not run ({error}); remedy: install it again") from error
    if done.returncode:
        sys.stderr.write(done.stdout)
        said = done.stdout.strip().splitlines() or ["no message"]
        last = ([line for line in said if _ERROR.search(line)] or said)[-1]
        raise BuildError(
            f"{command[0]} failed on {what}: {last.strip()}; remedy: see the build's output (pip install -v)"
        )
    return done.stdout


def included(source: Path) -> Iterator[Path]:
    """``source`` and the files that it includes by name in quotes, and so on."""
    seen = {source.resolve()}
    left = list(seen)
    while left:
        path = left.pop()
        yield path
        for name in _INCLUDE.findall(path.read_text()):
            found = (path.parent / name).resolve()
            if found.is_file() and found not in seen:
                seen.add(found)
                left.append(found)


def stamp(job: Job, tools: str) -> str:
    """Changes with anything that the compiled file depends on; ``tools`` are the versions of torch and compilers."""
    found = hashlib.sha256(repr((job.command, str(job.source), tools)).encode())
    for path in sorted(included(job.source)):
        found.update(repr((str(path), path.read_bytes())).encode())
    return found.hexdigest()


def _compile(jobs: list[Job], objects: Path, torch: Path) -> None:
    """One file for each core, the longest first; those whose stamp is the one of the last build are left alone.

    Libraries that are built at the same time share the cores: what one leaves idle at its end another one has.
    """
    objects.mkdir(parents=True, exist_ok=True)
    tools = _tools({job.command[0] for job in jobs}, torch)
    ordered = sorted(jobs, key=lambda job: -sum(path.stat().st_size for path in included(job.source)))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = [pool.submit(_compile_one, job, stamp(job, tools)) for job in ordered]
        try:
            for future in running:
                future.result()
        finally:  # after an error nothing more is started
            for future in running:
                future.cancel()


def _compile_one(job: Job, wanted: str) -> None:
    mark = job.built.with_name(job.built.name + ".stamp")
    results = [path for path in (job.built, job.report) if path is not None]
    if mark.is_file() and mark.read_text() == wanted and all(path.is_file() for path in results):
        return
    mark.unlink(missing_ok=True)
    temporary = job.built.with_name(f"{job.built.name}.{os.getpid()}.tmp")
    try:
        source = str(job.source.relative_to(ROOT))
        with _CORES:
            said = run([*job.command, "-o", str(temporary), source], source)
        sys.stderr.write("".join(line for line in said.splitlines(True) if not _ASSEMBLER.match(line)))
        temporary.replace(job.built)
    finally:
        temporary.unlink(missing_ok=True)
    if job.report is not None:
        _write(job.report, said)
    _write(mark, wanted)


def _link(command: list[str], target: Path, jobs: list[Job], libraries: list[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")  # whoever runs the old library keeps it whole
    try:
        sys.stderr.write(
            run([*command, "-o", str(temporary), *(str(job.built) for job in jobs), *libraries], target.name)
        )
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _tools(programs: Iterable[str], torch: Path) -> str:
    """The versions of what a build is made with."""
    version = torch / "version.py"
    found = [version.read_text() if version.is_file() else ""]
    for program in sorted(programs):
        done = subprocess.run([program, "--version"], capture_output=True, text=True)
        found.append(done.stdout)
    return "\n".join(found)


def _torch_version(torch: Path) -> str:
    found = re.search(r"^__version__ = ['\"](.+)['\"]$", (torch / "version.py").read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f"{torch / 'version.py'} does not say which torch it is; remedy: install torch again")
    return found[1]


def _sources(*patterns: str) -> list[Path]:
    """Of the CUDA kernels, and their registration."""
    found = sorted(path for pattern in patterns for path in (ROOT / "csrc/cuda").glob(pattern))
    if not found:
        raise BuildError(f"csrc/cuda has no {' or '.join(patterns)}; remedy: install from complete sources")
    return [*found, ROOT / "csrc/ops.cu"]


def _parsed(text: str) -> Architectures:
    code, ptx = set(), set()
    for word in re.split(r"[\s;,]+", text.strip(" \t\n;,")):
        match = re.fullmatch(r"(?:([0-9]{1,2})\.([0-9])|([0-9]{2,3}))(\+PTX)?", word, re.IGNORECASE)
        given = f"RED_KERNELS_ARCHS (or --archs) is {text!r}, with {word!r}"
        if match is None:
            raise SettingError(f"{given}; expected a list such as '80 90 100' or '9.0;10.0+PTX'")
        number = int(match[3]) if match[3] else 10 * int(match[1]) + int(match[2])
        if number < OLDEST_GPU:
            raise SettingError(f"{given}; the kernels need {OLDEST_GPU} ({OLDEST_GPU / 10}) or later")
        code.add(number)
        if match[4]:
            ptx.add(number)
    return Architectures(tuple(sorted(code)), tuple(sorted({*ptx, max(code)})))


def _gpus() -> list[int]:
    """The architectures of the GPUs here; none where the driver's tool does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    done = subprocess.run([tool, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True)
    if done.returncode:
        return []
    return [10 * int(major) + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", done.stdout, re.M)]


def _check_known(nvcc: str, wanted: Architectures) -> None:
    """Raise BuildError if nvcc does not know one of the architectures, SettingError if it was asked for."""
    known = set(re.findall(r"\bsm_(\d+)", run([nvcc, "--list-gpu-code"], "--list-gpu-code")))
    unknown = [f"sm_{n}" for n in wanted.code if str(n) not in known]
    if unknown:
        asked = os.environ.get("RED_KERNELS_ARCHS", "").strip()
        raise (SettingError if asked else BuildError)(
            f"{nvcc} does not know {', '.join(unknown)}, only {', '.join(f'sm_{n}' for n in sorted(known, key=int))}; "
            "remedy: a newer CUDA toolkit, or RED_KERNELS_ARCHS with older ones (the last has PTX, for later GPUs)"
        )


def _torch_target() -> str:
    return f"-DTORCH_TARGET_VERSION={TORCH_TARGET:#x}ULL"


def _x86(machine: str) -> bool:
    return machine.lower() in ("x86_64", "amd64")


def _aarch64(machine: str) -> bool:
    return machine.lower() in ("aarch64", "arm64")


def _own_instructions() -> list[str]:
    """Flags for what this processor has of AVX2: the emulator runs on no other."""
    cpus = Path("/proc/cpuinfo")
    found = cpus.read_text().split() if _x86(platform.machine()) and cpus.is_file() else []
    return ["-mfma", "-mf16c", "-mavx2"] if {"fma", "f16c", "avx2"} <= set(found) else []


_CORES = BoundedSemaphore(os.cpu_count() or 1)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.M)
# What ptxas says of every kernel, which is in the reports.
_ASSEMBLER = re.compile(r"ptxas info|    (?:Function properties for \S+|\d+ bytes stack frame, .*)$")
_ERROR = re.compile(r"\b(?:error|fatal)\b[^:]*:")  # of g++, nvcc and ptxas
_LIBRARIES: dict[str, tuple[Callable[..., None], Path]] = {
    "cpu": (build_cpu_library, ROOT / "red_kernels/lib/libred_kernels_cpu.so"),
    "cuda": (build_cuda_library, ROOT / "red_kernels/lib/libred_kernels_cuda.so"),
    "nodes": (build_nodes_library, ROOT / "red_kernels/lib/libred_kernels_nodes.so"),
    "emulator": (build_emulator, ROOT / "build/libred_kernels_cuda_emulated.so"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build one of the libraries of csrc.")
    parser.add_argument("kind", choices=_LIBRARIES)
    parser.add_argument("--output", type=Path, help="the library (default: where red_kernels or its tests look for it)")
    parser.add_argument("--objects", type=Path, help="folder of compiled files (default: build/csrc/...)")
    parser.add_argument("--archs", help="GPUs that 'cuda' is built for (default: RED_KERNELS_ARCHS, or those here)")
    given = parser.parse_args(arguments)
    if given.archs is not None and given.kind != "cuda":
        parser.error(f"--archs is for 'cuda', not for {given.kind!r}")
    build, output = _LIBRARIES[given.kind]
    target = (given.output or output).resolve()
    try:
        more = {"archs": architectures(given.archs)} if given.kind == "cuda" else {}
        build(target, (given.objects or OBJECTS / given.kind).resolve(), **more)
    except BuildError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
