"""The tables of a device, and the README's, as markdown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .figures import (
    DTYPES,
    FLOOR,
    METHODS,
    OPERATIONS,
    PASSES,
    PEERS,
    QUALITY_METHODS,
    OperationFigures,
    growth_series,
    in_order,
    method_figures,
    operation_figures,
    operation_memory,
    rank,
    worst_cases,
)
from .losses import comparisons, goals, incomplete, losses, missed_goals, not_measured, score
from .results import Device
from .text import NONE, mebibytes, number, numbers, ratio, ratios, table, time, timing

PICTURES = {
    "bandwidth-bf16.png": "Bandwidth by hidden size, bf16",
    "bandwidth-fp16.png": "Bandwidth by hidden size, fp16",
    "bandwidth-fp32.png": "Bandwidth by hidden size, fp32",
    "step-time.png": "Time of a training step by method",
    "step-memory.png": "Peak memory of a training step by method",
    "growth.png": "Growth of time and memory",
    "quality.png": "Scores by method",
}
PROTOCOL = """\
All implementations of a case run in one process, one after the other, in many rounds. So a disturbance of the
machine affects all of them alike. Times are medians with quartiles. Before a case is timed, the values and gradients
of all implementations are compared. Inputs of `fresh` cases rotate through more memory than the last-level cache.
*Over copies*: copies of the least bytes that the operation moves ran in the same rounds. A training step is compared
with the floor: the same model, frozen, with the same fused norms and without edits. The protocol and the file
format: [benchmarks.md](benchmarks.md)."""


def name_of(operation: str, variant: str) -> str:
    """An operation as code, with its variant."""
    return f"`{operation}`" + (f" ({variant})" if variant else "")


def section(device: Device, docs: Path) -> str:
    """The section of one device, for docs/performance.md in the folder ``docs``."""
    parts = [f"## {device.name}", environment_table(device), *(f"**{line}**" for line in incomplete(device))]
    files = device.files
    if "ops" in files:
        parts += ["### Operations", READING, *_pictures(device, docs, "bandwidth"), *operation_tables(device)]
        if files["ops"].get("host"):
            parts += ["### Host time of a call", host_table(device)]
    if "step" in files:
        parts += ["### Training steps", STEPS, *_pictures(device, docs, "step"), *step_tables(device)]
    if "growth" in files:
        parts += ["### Growth", *_pictures(device, docs, "growth"), *growth_tables(device)]
    if "quality" in files:
        parts += ["### Quality", *_pictures(device, docs, "quality"), *quality_tables(device)]
    parts += ["### Losses", *loss_tables(device), "### Not measured", missing_table(device)]
    return "\n\n".join(parts)


READING = """\
Cells are a peer's time over ours; above 1, ours is faster. They are geometric means over the sizes, with the least
and the greatest in brackets. *Best peer* is the fastest peer of each case. *Over copies* is our time over the
copies' time; 1 is the floor. GB/s are the least bytes over our time."""
STEPS = f"""\
*Over the floor* is a method's time over that of `{FLOOR}` in the same round, the median over the rounds. The floor
is the frozen model with the same fused norms and no edit. Its gradients flow through the model as those of a trained
edit do. Memory is the peak of a step beyond the base weights: activations, gradients, and the method's own tensors."""


def _pictures(device: Device, docs: Path, kind: str) -> list[str]:
    return [
        f"![{words}]({Path(os.path.relpath(device.folder / name, docs)).as_posix()})"
        for name, words in PICTURES.items()
        if name.startswith(kind) and (device.folder / name).is_file()
    ]


def environment_table(device: Device) -> str:
    """One value if all files agree, else each file's."""
    rows = []
    names = list(dict.fromkeys(name for content in device.files.values() for name in content["environment"]))
    for name in names:
        values = {job: _plain(content["environment"].get(name)) for job, content in device.files.items()}
        same = len(set(values.values())) == 1
        rows.append(
            (name, next(iter(values.values())) if same else "; ".join(f"{job}: {v}" for job, v in values.items()))
        )
    return table(("environment", ""), [(name, value) for name, value in rows if value != NONE])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items()) or NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or NONE
    return NONE if value is None else str(value)


def operation_tables(device: Device) -> list[str]:
    """A table for each operation, its worst cases, and memory."""
    content = device.files["ops"]
    groups: dict[tuple[str, str], list[OperationFigures]] = {}
    for found in operation_figures(content, device.gpu):
        groups.setdefault((found.operation, found.variant), []).append(found)
    parts = []
    for (operation, variant), rows in groups.items():
        parts += [f"#### {name_of(operation, variant)}", _operation_table(rows)]
        lines = []
        for ours in dict.fromkeys(row.ours for row in rows):
            behind, above = worst_cases(content, operation, variant, ours)
            if behind is not None:
                lines.append(
                    f"Worst of `{ours}` against a peer: {ratio(behind.value)} ({behind.peer}; {behind.where})."
                )
            if above is not None:
                lines.append(f"Furthest from copies: {ratio(above.value)} ({above.where}).")
        parts += [" ".join(lines)] if lines else []
    memory = operation_memory(content)
    if memory:
        peers = in_order({peer for row in memory.values() for peer in row}, PEERS)
        rows_of_memory = [
            (name_of(key[0], key[1]), key[2], key[3], *(ratios(row.get(peer)) for peer in peers))
            for key, row in memory.items()
        ]
        parts += [
            "#### Peak memory of forward and backward, the peer's over ours",
            table(("operation", "dtype", "ours", *peers), rows_of_memory),
        ]
    return parts


def _operation_table(rows: list[OperationFigures]) -> str:
    peers = in_order({peer for row in rows for peer in row.peers}, PEERS)
    header = ("dtype", "elements", "inputs", "pass", "ours", *peers, "best peer", "over copies", "GB/s")
    return table(
        header,
        [
            (
                *(row.dtype, row.size, row.inputs, row.which, row.ours),
                *(ratios(row.peers.get(peer)) for peer in peers),
                *(ratios(row.best_peer), ratios(row.over_floor), numbers(row.gigabytes)),
            )
            for row in rows
        ],
    )


def host_table(device: Device) -> str:
    """The host times."""
    cases = device.files["ops"]["host"]
    names = in_order(
        {name for case in cases for seconds in case["seconds"].values() for name in seconds},
        ("cpu", "cuda", "triton", *PEERS),
    )
    rows = []
    for case in sorted(cases, key=lambda case: (rank(case["operation"], OPERATIONS), rank(case["dtype"], DTYPES))):
        for which in in_order(case["seconds"], PASSES):
            seconds = case["seconds"][which]
            size = f"{case['rows']} x {case['width']}"
            cells = (timing(seconds[name]) if name in seconds else NONE for name in names)
            rows.append((f"`{case['operation']}`", case["dtype"], size, which, *cells))
    return table(("operation", "dtype", "size", "pass", *names), rows)


def step_tables(device: Device) -> list[str]:
    """A table for each model, size and dtype."""
    parts = []
    for case in device.files["step"]["cases"]:
        base = f", {case['parameters'] / 1e6:,.0f} million parameters" if case.get("parameters") else ""
        parts.append(f"#### {case['model']}, {case['dtype']}, {case['batch']} x {case['length']} tokens{base}")
        rows: list[tuple[str, ...]] = []
        for method in method_figures(case):
            rows.append(
                (
                    f"`{method.method}`",
                    timing(method.seconds),
                    NONE if method.over_floor is None else ratio(method.over_floor),
                    NONE if method.tokens is None else number(method.tokens),
                    mebibytes(method.peak),
                    NONE if method.memory_over_floor is None else ratio(method.memory_over_floor),
                    NONE if method.trainable is None else f"{method.trainable:,}",
                )
            )
        for method_name in in_order(case.get("left_out", {}), METHODS):
            reason = f"left out: {case['left_out'][method_name]}"
            rows.append((f"`{method_name}`", reason, NONE, NONE, NONE, NONE, NONE))
        header = ("method", "step", "over the floor", "tokens/s", "peak memory", "over the floor's", "trainable")
        parts.append(table(header, rows))
    return parts


def growth_tables(device: Device) -> list[str]:
    """A table of time and memory for each axis."""
    parts = []
    for title, cases in growth_series(device.files["growth"]):
        methods = in_order({method for case in cases for method in case["seconds"]}, METHODS)
        rows = []
        for case in cases:
            found = {method.method: method for method in method_figures({"tokens": None, **case})}
            cells = []
            for method in methods:
                figures = found.get(method)
                if figures is None:
                    cells.append("left out" if method in case.get("left_out", {}) else NONE)
                    continue
                over = "" if figures.over_floor is None or method == FLOOR else f" ({ratio(figures.over_floor)})"
                memory = "" if figures.peak is None else f", {mebibytes(figures.peak)}"
                cells.append(time(figures.seconds["median"]) + over + memory)
            rows.append((f"{case['value']:,}", *cells))
        parts += [
            f"Against {title}: median of a step, in brackets over `{FLOOR}`, and peak memory.",
            table((cases[0]["axis"], *(f"`{method}`" for method in methods)), rows),
        ]
    return parts


def quality_tables(device: Device) -> list[str]:
    """A table for each task."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for case in device.files["quality"]["cases"]:
        by_task.setdefault(case["task"], []).append(case)
    parts = []
    for task in sorted(by_task):
        cases = sorted(by_task[task], key=lambda case: rank(case["method"], QUALITY_METHODS))
        metric = cases[0]["metric"]
        rows = []
        for case in cases:
            rates = case.get("learning_rates") or {}
            budget = f"{case['steps']} x {case['batch']} x {case['length']}" if case.get("steps") else NONE
            rows.append(
                (
                    f"`{case['method']}`",
                    score(case),
                    str(len(case["runs"])),
                    NONE
                    if case.get("chosen") is None
                    else f"{case['chosen']:g} of {len(rates)}" + (", at the edge" if case.get("at_edge") else ""),
                    NONE if case.get("trainable") is None else f"{case['trainable']:,}",
                    budget,
                )
            )
        header = (
            "method",
            f"{metric}, mean and deviation",
            "seeds",
            "learning rate",
            "trainable",
            "steps x batch x length",
        )
        parts += [f"#### {task[0].upper()}{task[1:]}", table(header, rows)]
    return parts


def loss_tables(device: Device) -> list[str]:
    """The number of lost comparisons, each of them, and each missed goal."""
    counts = [(name, str(lost), str(of)) for name, (lost, of) in comparisons(device).items()]
    parts = [
        "A loss is a peer that is better by more than the spread: its upper quartile is below our lower one; its peak "
        "memory is less; or its mean score is ahead by more than both standard deviations together. All are listed.",
        table(("compared", "losses", "of"), counts) if counts else "Nothing was compared.",
    ]
    found = losses(device)
    if found:
        rows = [
            (
                loss.where,
                loss.what,
                loss.ours,
                loss.peer,
                loss.figures,
                NONE if loss.ratio is None else ratio(loss.ratio),
            )
            for loss in found
        ]
        parts.append(table(("where", "what", "ours", "peer", "ours against the peer", "ours over the peer"), rows))
    missed = missed_goals(device)
    of = len(goals(device))
    parts.append(f"Goals missed: {len(missed)} of {of}." if of else "No goal has a figure.")
    if missed:
        parts.append(table(("where", "goal", "found"), [(m.where, m.goal, m.found) for m in missed]))
    return parts


def missing_table(device: Device) -> str:
    """The missing figures, and the reasons."""
    rows = not_measured(device)
    if not rows:
        return "No case was left out."
    return table(("file", "what", "why"), [(f"{job}.json", name, reason) for job, name, reason in rows])
