"""The measured part of docs/kinds.md: kinds of edit and RED's neighbours side by side, and the operations of mixes.

Its files are in `benchmarks/results/kinds/<device>/`: `step.json` of the suite, by `red-kernels bench step --methods
...`, and `mixes*.json` of `benchmarks.tools.mixes`. The scores come from the files of docs/quality.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figures import METHODS, QUALITY_METHODS, case_of_step, in_order, over_floor
from .losses import score
from .quality import Tasks, merged
from .results import Device, load
from .text import NONE, mebibytes, ratio, table

FOLDER = "kinds"
MIXES = "mixes*.json"
NOTHING = "No results of this form yet."


def kinds_block(results: Path) -> str:
    """The text between the marks of docs/kinds.md; ``results`` is the folder of all results.

    Raises:
        ValueError: a file is not a file of results.
    """
    folder = results / FOLDER
    devices = load(folder) if folder.is_dir() else []
    scores = {f"{task}, {next(iter(own.values()))['metric']}": own for task, own in merged(results).items()}
    parts = [part for device in devices for part in _device(device, scores)]
    return "\n" + ("\n\n".join(parts) or NOTHING) + "\n"


def _device(device: Device, tasks: Tasks) -> list[str]:
    found = [f"On {_machine(device)}:"]
    cases = device.files.get("step", {}).get("cases", [])
    measured = {name for case in cases for name in case["seconds"]} | {name for own in tasks.values() for name in own}
    methods = in_order(measured, (*METHODS, *(name for name in QUALITY_METHODS if name not in METHODS)))
    if methods:
        header = ["method", "trained"]
        for case in cases:
            header += [f"step over the frozen model, {case_of_step(case)}", "its memory"]
        found.append(table([*header, *tasks], [_row(name, cases, list(tasks.values())) for name in methods]))
    for path in sorted(device.folder.glob(MIXES), key=lambda path: path.stem):
        found += _mixes(json.loads(path.read_text(encoding="utf-8")))
    return found


def _machine(device: Device) -> str:
    own = device.environment
    threads = f"{own.get('instruction_set')}, {own.get('threads')} threads"
    return f"{own.get('processor')} ({threads}), torch {own.get('torch')}"


def _row(name: str, cases: Sequence[dict[str, Any]], tasks: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    row = [f"`{name}`"]
    counts = [case["trainable"][name] for case in cases if name in case.get("trainable", {})]
    row.append(f"{counts[0]:,}" if counts else NONE)
    for case in cases:
        there = name in case["seconds"]
        spread = over_floor(case, name) if there else {}
        said = f"{ratio(spread['median'])} ({ratio(spread['low'])} to {ratio(spread['high'])})" if there else NONE
        row += [said, mebibytes(case.get("peak_bytes", {}).get(name))]
    return row + [score(own[name]) if name in own else NONE for own in tasks]


def _mixes(content: dict[str, Any]) -> list[str]:
    """Each operation over RED's own edit, with its sum and RMSNorm, by shape."""
    results = content["results"]
    peers = list(dict.fromkeys(name for one in results for name in one["over_all"] if name != "all"))
    header = ["operation over `all`"]
    header += [f"{one['pass']}, {one['dtype']}, {one['rows']} x {one['width']}" for one in results]
    ratios = [[one["over_all"].get(name) for one in results] for name in peers]
    rows = [
        [name, *(NONE if value is None else ratio(value) for value in own)]
        for name, own in zip(peers, ratios, strict=True)
    ]
    where = content["environment"]["instruction_set"]
    return [f"Sum and RMSNorm behind the edit, {results[0]['blocks']} blocks, {where}:", table(header, rows)]
