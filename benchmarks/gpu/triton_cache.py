"""Compile Triton programs into a cache for an absent GPU. It needs Triton, but neither torch nor a driver.

    python3.12 -m benchmarks.gpu.triton_cache PROGRAMS CACHE [--seconds N] [--processes N]

PROGRAMS has a line for each program, see `benchmarks.gpu.programs`. The key of Triton's cache includes the bytes of its
library, which differ between Pythons: this Python and its Triton must be those of the machine with the GPU. Triton
compiles as for a call there, under a driver that only names the GPU.

The last line of the output is JSON: the numbers of programs in the cache, failed and left, and the versions.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "red_kernels"
FILES = ("edit", "linear", "mix", "norm", "sums", "wide")
CAPABILITY, WARP = 90, 32
VARIABLES = {"TRITON_STORE_BINARY_ONLY": "1"}  # a launch reads nothing else


class NotLoaded(types.ModuleType):
    """Replaces a module that was compiled for another machine."""

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)

    def __getattr__(self, name: str) -> None:
        return None


class Driver:
    """Replaces the driver of an absent GPU."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def kernels() -> dict[str, Any]:
    """The Triton kernels by their names. Their packages are not run: those import torch, the kernels do not."""
    for folder in (PACKAGE, PACKAGE / "backends", PACKAGE / "backends/triton"):
        name = ".".join(folder.relative_to(PACKAGE.parent).parts)
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
    from triton.runtime.jit import JITFunction

    found = {}
    for file in FILES:
        module = importlib.import_module(f"red_kernels.backends.triton.kernels.{file}")
        found.update({name: value for name, value in vars(module).items() if isinstance(value, JITFunction)})
    return found


def use(cache: str) -> None:
    """Make Triton store its results in a folder, under the replaced driver."""
    os.environ.update(VARIABLES, TRITON_CACHE_DIR=cache)
    os.environ.pop("TRITON_PTXAS_PATH", None)  # its version is part of the key
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    driver.set_active(Driver(GPUTarget("cuda", CAPABILITY, WARP)))


def compiled(program: dict[str, Any], functions: dict[str, Any]) -> Any:
    """Triton's kernel for a program, as in a call with aligned tensors."""
    from triton.runtime.jit import MockTensor

    function = functions[program["kernel"]]
    constants = len(program["constants"])
    numbers = function.params[len(program["dtypes"]) : len(function.params) - constants]
    tensors = [None if dtype is None else MockTensor(dtype) for dtype in program["dtypes"]]
    values = [1 if parameter.annotation_type == "i64" else 1.0 for parameter in numbers]
    return function.warmup(*tensors, *values, *program["constants"], grid=(1,), **program["options"])


def add_launcher(kernel: Any) -> None:
    """Compile the launcher and the loader of a kernel, for kinds of calls with a C function."""
    from triton.backends.nvidia import driver as nvidia

    if not hasattr(nvidia, "make_launcher"):
        return
    nvidia.CudaUtils()
    nvidia.CudaLauncher(kernel.src, kernel.metadata)


def without_libcuda(folder: Path) -> None:
    """Link against an empty libcuda, and do not load the result."""
    from triton.runtime import build

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("no C compiler; remedy: install gcc")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda.so.1"
    if not library.exists():
        made = library.with_name(f"{os.getpid()}.so")
        command = [compiler, "-shared", "-x", "c", os.devnull, "-o", str(made), "-Wl,-soname,libcuda.so.1"]
        subprocess.run(command, check=True, capture_output=True)
        made.replace(library)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    build._load_module_from_path = NotLoaded


def _begin(cache: str, libcuda: str) -> None:
    use(cache)
    without_libcuda(Path(libcuda))
    _functions.update(kernels())


def _make(line: str) -> str | None:
    try:
        kernel = compiled(json.loads(line), _functions)
        add_launcher(kernel)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


_functions: dict[str, Any] = {}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.triton_cache", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("programs", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no program after this time")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    given = parser.parse_args(arguments)
    import triton

    lines = given.programs.read_text().splitlines()
    given.cache.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    done, failures = 0, []
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        start = (str(given.cache), folder)
        with ProcessPoolExecutor(given.processes, mp_context=context, initializer=_begin, initargs=start) as pool:
            for first in range(0, len(lines), 8 * given.processes):
                if time.monotonic() - begun > given.seconds:
                    break
                some = lines[first : first + 8 * given.processes]
                failures += [error for error in pool.map(_make, some) if error is not None]
                done += len(some)
                print(f"{done} of {len(lines)} programs, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    said = {
        "programs": done - len(failures),
        "failed": len(failures),
        "left": len(lines) - done,
        "errors": failures[:3],
    }
    print(json.dumps(said | {"python": platform.python_version(), "triton": triton.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
