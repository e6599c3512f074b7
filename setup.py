"""Builds csrc into red_kernels/lib (csrc/build.py does): the CPU kernels, autograd's nodes in C++, and the CUDA kernels
where nvcc is found.

Without a compiler or without torch the package installs all the same; the reasons are kept in
red_kernels/lib/cpu.missing, nodes.missing and cuda.missing, for `red-kernels info`.

Variables, beside those of csrc/build.py: RED_KERNELS_REQUIRE_CPU=1, to make a failed build of the first two an error;
RED_KERNELS_CUDA=1, the same for the CUDA kernels, or RED_KERNELS_CUDA=0, to leave them out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def _load_build() -> ModuleType:
    """csrc/build.py, which is in no package: under build isolation it is not even beside what runs this."""
    spec = importlib.util.spec_from_file_location("red_kernels_build", ROOT / "csrc/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


build = _load_build()
LIBRARIES = {"cpu": build.build_cpu_library, "nodes": build.build_nodes_library, "cuda": build.build_cuda_library}
CALLED = {"cpu": "CPU kernels", "nodes": "nodes of autograd in C++", "cuda": "CUDA kernels"}
NO_CUDA = "it was left out by RED_KERNELS_CUDA=0; remedy: install red-kernels again without that, where nvcc is found"


class BuildLibraries(build_ext):
    """Builds plain shared libraries, which need no Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def run(self) -> None:
        setting = os.environ.get("RED_KERNELS_CUDA", "")
        if setting not in ("", "0", "1"):
            raise build.SettingError(
                f"RED_KERNELS_CUDA is {setting!r}; expected 1 (build the CUDA kernels or fail), 0 (leave them out) or "
                "nothing (build them where nvcc is found)"
            )
        self.parallel = len(LIBRARIES)  # they share the cores, see csrc/build.py
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        name = target.stem.rpartition("_")[2]
        missing = _missing(target)
        required = os.environ.get("RED_KERNELS_CUDA" if name == "cuda" else "RED_KERNELS_REQUIRE_CPU")
        try:
            if name == "cuda" and required == "0":
                raise build.BuildError(NO_CUDA)
            LIBRARIES[name](target)
        except build.BuildError as error:
            if required == "1" or isinstance(error, build.SettingError):
                raise
            print(f"red-kernels: the {CALLED[name]} are left out: {error}", file=sys.stderr)
            target.unlink(missing_ok=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            missing.write_text(str(error))
        else:
            missing.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """An editable install has the libraries beside the sources, or the reasons why not."""
        for ext in self.extensions:
            library = ROOT / self.build_lib / self.get_ext_filename(ext.name)
            pair = (library, _missing(library))
            for file, other in (pair, pair[::-1]):
                if file.is_file():
                    target = ROOT / "red_kernels/lib" / file.name
                    temporary = target.with_suffix(".tmp")  # whoever runs the old library keeps it whole
                    shutil.copy2(file, temporary)
                    temporary.replace(target)
                    target.with_name(other.name).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "red_kernels/lib"
        return [str(file) for file in folder.glob("*") if file.suffix in (".so", ".missing")]


def _missing(library: Path) -> Path:
    """Where the reason is kept that there is no such library: cpu.missing, and so on."""
    return library.with_name(library.stem.rpartition("_")[2] + ".missing")


class Wheel(bdist_wheel):
    """Tagged py3-none: the kernels call torch's C functions only; where the nodes do not fit, they are not loaded."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


# The benchmark suite is a folder of its own in the sources, and is installed inside of the package.
SUITE = "red_kernels.benchmarks"
FOLDER = ROOT / "benchmarks"
suite = {SUITE: FOLDER.name} if FOLDER.is_dir() else {}
suite |= {f"{SUITE}.{name}": f"{FOLDER.name}/{name.replace('.', '/')}" for name in find_packages(str(FOLDER))}

setup(
    packages=[*find_packages(str(ROOT), include=["red_kernels*"]), *suite],
    package_dir=suite,
    ext_modules=[Extension(f"red_kernels.lib.libred_kernels_{name}", sources=[]) for name in LIBRARIES],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
