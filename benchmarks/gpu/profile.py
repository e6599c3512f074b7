"""The slowest of our kernels under ncu: `python -m benchmarks.gpu.profile --results FILE --output FOLDER [--ncu PATH]`.

The results of the bandwidth choose them: the next two by their time over that of a copy, each operation and pass once.
Without ncu, in a rehearsal, the same call runs alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PASSES = ("forward", "backward")
NUMBER = 2
LARGEST = 4 << 20  # bytes of a returned report


def worst(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Backend, operation, pass and size of all measurements, the slowest over a copy first; of one operation, pass and
    backend only the slowest width."""
    found = [
        {name: case[name] for name in ("operation", "variant", "width", "rows", "dtype")}
        | {"backend": backend, "pass": one, "over_copy": of["over_floor"]}
        for case in content["cases"]
        for one in PASSES
        for backend, of in case["result"][one].items()
    ]
    seen: set[tuple[str, ...]] = set()
    chosen = []
    for one in sorted(found, key=lambda one: -one["over_copy"]):
        key = tuple(one[name] for name in ("operation", "variant", "backend", "pass"))
        if key not in seen:
            seen.add(key)
            chosen.append(one)
    return chosen


def command(one: Mapping[str, Any], report: Path, ncu: str | None, device: str) -> list[str]:
    """The call under ncu, which profiles only between two marks."""
    call = [sys.executable, "-m", "benchmarks.gpu.one", "--case", json.dumps(dict(one)), "--device", device]
    if ncu is None:
        return call
    options = ["--set", "full", "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all"]
    return [ncu, *options, "--force-overwrite", "--export", str(report), "--print-details", "all", *call]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profile")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--ncu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args(arguments)
    try:
        content = json.loads(given.results.read_text())
    except (OSError, ValueError) as error:
        print(f"no results of the bandwidth to choose from: {error}")
        return 1
    status = 0
    for number, one in enumerate(worst(content)[given.skip : given.skip + NUMBER], start=given.skip + 1):
        print(f"{number}. {one}", flush=True)
        report = given.output / f"worst-{number}.ncu-rep"
        status = subprocess.run(command(one, report, given.ncu, given.device)).returncode or status
        if report.is_file() and report.stat().st_size > LARGEST:
            print(f"{report.name} has {report.stat().st_size} bytes and is not returned; its text is above")
            report.unlink()
    return status


if __name__ == "__main__":
    sys.exit(main())
