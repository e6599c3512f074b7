"""Revisions of the package side by side: `python -m benchmarks.gpu.variants --kit FOLDER ...`.

Each runs in its own processes, alternating with the present package, called `here`: A B A B, so that changes of the
machine affect all of them. A round starts only if the time suffices for one as long as the earlier ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import contents

HERE = "here"
MOST_ROUNDS = 5
KEYS = ("operation", "variant", "width", "rows")


def medians(content: Mapping[str, Any]) -> dict[str, float]:
    """Operation, size, backend and pass, in words, to the time over a copy's in the same process."""
    return {
        " ".join([*(str(case[name]) for name in KEYS if case[name] != ""), backend, one]): of["over_floor"]
        for case in content["cases"]
        for one in ("forward", "backward")
        for backend, of in case["result"][one].items()
    }


def side_by_side(rounds: Mapping[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Measurement to variant to the median over its rounds, for measurements that all of them have."""
    shared = set.intersection(*(set(one) for of in rounds.values() for one in of)) if all(rounds.values()) else set()
    return {
        what: {name: statistics.median(one[what] for one in of) for name, of in rounds.items()}
        for what in sorted(shared)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.variants")
    for name in ("--kit", "--work", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--settings", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    given = parser.parse_args(arguments)
    begun = time.monotonic()
    folders = {HERE: contents.ROOT}
    for archive in sorted((given.kit / contents.VARIANTS).glob("*.tar.xz")):
        name = archive.name.removesuffix(".tar.xz")
        contents.unpack(archive, given.work / name)
        folders[name] = given.work / name
    given.work.mkdir(parents=True, exist_ok=True)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    failed: dict[str, str] = {}
    longest = 0.0
    for number in range(MOST_ROUNDS):
        left = given.seconds - (time.monotonic() - begun)
        if number and left < longest:
            break
        start = time.monotonic()
        for name, folder in folders.items():
            if name not in failed:
                found = _measure(given, name, folder, number)
                if isinstance(found, str):
                    failed[name] = found
                else:
                    rounds[name].append(found)
        longest = max(longest, time.monotonic() - start)
        said = {"rounds": number + 1, "failed": failed}
        whole = {name: of for name, of in rounds.items() if name not in failed}
        given.output.write_text(json.dumps(said | {"over_copy": side_by_side(whole)}, indent=1) + "\n")
        print(f"round {number + 1}: {time.monotonic() - start:.0f} s", flush=True)
    for name, error in failed.items():
        print(f"{name}: {error}")
    return int(bool(failed))


def _measure(given: argparse.Namespace, name: str, folder: Path, number: int) -> dict[str, float] | str:
    """One round of a variant in its own process; its results, or the end of its output."""
    output = given.work / f"{name}-{number}"
    command = [sys.executable, "-m", "benchmarks.gpu.measure", "ops", "--output", str(output), "--settings"]
    command += [given.settings, "--seconds", str(given.seconds), "--device", given.device]
    command += ["--quick"] if given.device == "cpu" else []
    path = [str(folder), str(contents.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Not in the root, whose package would be imported first.
    done = subprocess.run(
        command, cwd=given.work, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}, capture_output=True, text=True
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
    return medians(json.loads((output / "ops.json").read_text()))


if __name__ == "__main__":
    sys.exit(main())
