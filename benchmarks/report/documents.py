"""docs/performance.md, generated from results, and the generated part of other pages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from .figures import (
    COPY,
    FLOOR,
    METHODS,
    OPERATIONS,
    PEERS,
    QUALITY_METHODS,
    in_order,
    method_figures,
    peers_in,
    rank,
    spread,
)
from .losses import comparisons, goals, incomplete, missed_goals, score
from .results import Device
from .summary import NOTHING, filled, machine, over_ours
from .tables import PROTOCOL, name_of, section
from .text import NONE, ratios, table

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
SHOWN = ("frozen", "frozen-compile", "red", "red-compile", "naive", "naive-compile", "lora-qv", "lora-all", "full")
SHOWN_MEMORY = ("red", "naive", "lora-all", "full")
HEAD = f"""\
# Performance

Written from `benchmarks/results/` by `make report`; changes by hand are lost. Losses are listed like wins:
each device has a complete list.

{PROTOCOL}"""
AGAIN = """\
## To repeat the measurements

Keep the machine otherwise idle. `red-kernels bench all --output benchmarks/results/NAME` measures and draws;
`ops`, `step` or `quality` instead of `all` measures a part. On a machine with a GPU and little time,
`benchmarks/gpu_suite.sh FOLDER` tests and measures in parts. `make report` then writes this page and the README's
table. `make report CHECK=1`, like the tests, only compares them with the files."""


def performance(devices: Sequence[Device], docs: Path) -> str:
    """The whole docs/performance.md; ``docs`` is its folder."""
    parts = [*overview(devices), *(section(device, docs) for device in devices)] if devices else [NOTHING]
    return "\n\n".join([HEAD, *parts, AGAIN]) + "\n"


def overview(devices: Sequence[Device]) -> list[str]:
    """All devices side by side: an explanation, and one table with a column for each device."""
    rows = [
        row
        for make in (_operation_rows, _step_rows, _quality_rows, _loss_rows)
        for row in make(devices)
        if any(cell != NONE for cell in row[1:])
    ]
    notes = [f"{device.name}: {' '.join(found)}" for device in devices if (found := incomplete(device))]
    where = "; ".join(f"*{device.name}*: {machine(device)}" for device in devices)
    return [
        "## All devices",
        filled(
            "Geometric means, with the least and the greatest in brackets. In rows *over ours*, above 1 is in our "
            f"favour. {where}."
        ),
        table(("", *(device.name for device in devices)), rows),
        *map(filled, notes),
    ]


def put_block(text: str, block: str, name: str = "README.md") -> str:
    """A page with a new block between its marks; ``name`` is for the message.

    Raises ValueError unless it has exactly one of each mark, on separate lines, in order.
    """
    lines = text.split("\n")
    places = [[number for number, line in enumerate(lines) if line.strip() == mark] for mark in (BEGIN, END)]
    counts = [len(found) for found in places]
    if counts != [1, 1] or places[0][0] > places[1][0]:
        raise ValueError(
            f"{name} has {counts[0]} lines {BEGIN!r} and {counts[1]} lines {END!r}, expected one of each, in order"
        )
    begin, end = places[0][0], places[1][0]
    return "\n".join([*lines[: begin + 1], *block.split("\n"), *lines[end:]])


def _row(title: str, devices: Iterable[Device], cell: Callable[[Device], str]) -> tuple[str, ...]:
    return (title, *map(cell, devices))


def _operation_rows(devices: Sequence[Device]) -> list[tuple[str, ...]]:
    cases = [case for device in devices for case in device.files.get("ops", {}).get("cases", [])]
    operations = sorted(
        {(case["operation"], case["variant"]) for case in cases}, key=lambda key: (rank(key[0], OPERATIONS), key[1])
    )
    peers = in_order({peer for case in cases for peer in peers_in(case["seconds"].get("both", {}))}, PEERS)
    return [
        *(
            _row(f"{name_of(*key)}: best peer over ours", devices, partial(over_ours, peer=None, operation=key))
            for key in operations
        ),
        *(_row(f"all operations: `{peer}` over ours", devices, partial(over_ours, peer=peer)) for peer in peers),
        _row(
            "ours over copies of the least bytes, largest sizes",
            devices,
            partial(over_ours, peer=COPY, largest=True),
        ),
    ]


def _over_floor(device: Device, method: str, memory: bool) -> str:
    values = []
    for case in device.files.get("step", {}).get("cases", []):
        for found in method_figures(case):
            value = found.memory_over_floor if memory else found.over_floor
            if found.method == method and value is not None:
                values.append(value)
    return ratios(spread(values))


def _step_rows(devices: Sequence[Device]) -> list[tuple[str, ...]]:
    cases = [case for device in devices for case in device.files.get("step", {}).get("cases", [])]
    measured = in_order({method for case in cases for method in case["seconds"]}, METHODS)
    methods = [method for method in SHOWN if method in measured]
    rows = [
        _row(f"training step over `{FLOOR}`: `{method}`", devices, partial(_over_floor, method=method, memory=False))
        for method in methods
    ]
    return rows + [
        _row(f"its peak memory: `{method}`", devices, partial(_over_floor, method=method, memory=True))
        for method in SHOWN_MEMORY
        if method in measured
    ]


def _scores(device: Device, task: str, methods: Sequence[str]) -> str:
    cases = {case["method"]: case for case in device.files.get("quality", {}).get("cases", []) if case["task"] == task}
    return ", ".join(f"{method} {score(cases[method])}" for method in methods if method in cases) or NONE


def _quality_rows(devices: Sequence[Device]) -> list[tuple[str, ...]]:
    cases = [case for device in devices for case in device.files.get("quality", {}).get("cases", [])]
    tasks = {case["task"]: case["metric"] for case in cases}
    methods = in_order({case["method"] for case in cases}, QUALITY_METHODS)
    return [
        _row(f"{task}, {tasks[task]}", devices, partial(_scores, task=task, methods=methods)) for task in sorted(tasks)
    ]


def _loss_rows(devices: Sequence[Device]) -> list[tuple[str, ...]]:
    def lost(device: Device) -> str:
        counts = comparisons(device)
        return "; ".join(f"{name} {some} of {of}" for name, (some, of) in counts.items()) or NONE

    def missed(device: Device) -> str:
        return str(len(missed_goals(device))) if goals(device) else NONE

    return [_row("losses beyond the spread", devices, lost), _row("goals missed", devices, missed)]
