"""A run of the suite for each instruction set of the processor.

A process chooses its instruction set once; torch and oneDNN do when they are loaded. So each set gets its own process,
in which our kernels and those of the peers are held to the same set, and a folder of its own.
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from red_kernels.backends import cpu

ALL = "all"
# What holds torch's own kernels, the code of torch.compile and oneDNN's products to a set; the newest needs no holding.
# torch.compile takes its vectors by the first, but has the compiler use all that the processor has, but for the third.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "TORCHINDUCTOR_CPP_MARCH")
_HELD = {
    "base": ("default", "SSE41", "x86-64"),
    "avx2": ("avx2", "AVX2", "haswell"),
    "avx512": ("avx512", "AVX512_CORE", "skylake-avx512"),
}


def chosen(names: Sequence[str]) -> list[str]:
    """The sets that are asked for, `all` being each that this processor runs, the oldest first.

    Raises:
        ValueError: this processor does not run one of them.
    """
    known = cpu.instruction_sets()
    unknown = [name for name in names if name not in (*known, ALL)]
    if unknown or not names:
        raise ValueError(
            f"--instruction-sets: got {', '.join(unknown) or 'nothing'}, expected some of {', '.join(known)}, or {ALL}"
        )
    return [name for name in known if name in names or ALL in names]


def held_to(name: str, compiled: str) -> dict[str, str]:
    """The environment of a process in which this package, torch and oneDNN are held to an instruction set.

    ``compiled`` is a folder for what torch.compile keeps: its cache does not tell the sets apart.
    """
    free = {variable: value for variable, value in os.environ.items() if variable not in _VARIABLES}
    held = dict(zip(_VARIABLES, _HELD.get(name, ()), strict=False))
    if platform.machine().lower() not in ("x86_64", "amd64"):
        held.pop("TORCHINDUCTOR_CPP_MARCH", None)  # there `base` is what the compiler takes by itself
    return {**free, "RED_KERNELS_CPU": name, "TORCHINDUCTOR_CACHE_DIR": compiled, **held}


def arguments(given: Mapping[str, Any], output: Path) -> list[str]:
    """The options of `red-kernels bench` for one set, out of those that were given."""
    found = [] if given.get("job") is None else [str(given["job"])]
    found += ["--output", str(output)]
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if name in ("job", "output", "instruction_sets", "run") or value is None or value is False:
            continue
        if value is True:
            found.append(option)
        elif name == "case":  # given once for each
            found += [part for one in value for part in (option, *map(str, one))]
        elif isinstance(value, tuple | list):
            found += [option, *map(str, value)]
        else:
            found += [option, str(value)]
    return found


def run_sets(
    names: Sequence[str],
    given: Mapping[str, Any],
    output: Path,
    run: Callable[..., subprocess.CompletedProcess[bytes]] = subprocess.run,
) -> int:
    """Measure one set after the other, into `output/SET`; returns 1 where one of them failed, which the others do not
    wait for.

    Raises:
        ValueError: as `chosen`, before anything is measured.
    """
    failed = False
    for name in chosen(names):
        print(f"Instruction set {name}: {output / name}", flush=True)
        command = [sys.executable, "-m", "red_kernels", "bench", *arguments(given, output / name)]
        with tempfile.TemporaryDirectory() as compiled:
            code = run(command, env=held_to(name, compiled), check=False).returncode
        if code < 0:
            print(f"Instruction set {name}: ended by {signal.Signals(-code).name}; --resume continues", file=sys.stderr)
        failed |= code != 0
    return int(failed)
