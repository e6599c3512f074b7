"""The README's figures: one table of training steps, at most eight rows, and a sentence for each device.

Devices that measured the same training step share a table, so that a row is a method. All other measurements are in
docs/performance.md.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .figures import COPY, FLOOR, OURS, Spread, best_peer, case_of_step, over_floor, size_class, size_classes, spread
from .losses import comparisons, incomplete, score
from .results import Device
from .text import NONE, mebibytes, ratio, ratios, table, time

# Method of the step to its name in the README, and to the method with its score on the task.
ROWS = {
    "frozen": ("frozen model", "linear-probe"),
    "red": ("**RED, fused**", "red"),
    "naive": ("RED, eager PyTorch", "naive"),
    "red-compile": ("RED, fused, `torch.compile`", None),
    "naive-compile": ("RED, eager, `torch.compile`", None),
    "ia3": ("IA3 (PEFT)", "ia3"),
    "lora-all": ("LoRA, r = 8, all linear layers (PEFT)", "lora-all"),
    "full": ("full fine-tuning", "full"),
}
MOST_ROWS = 8
TASK = "sentiment"
NOTHING = "No results of this form yet."
LINKS = (
    "All figures and losses: [docs/performance.md](docs/performance.md), [docs/quality.md](docs/quality.md). "
    "Protocol: [docs/benchmarks.md](docs/benchmarks.md)."
)
KERNELS = (
    "Kernels alone, forward and backward: a peer's time over ours, and how often a peer is faster beyond the spread."
)

Case = dict[str, Any]


def summary(devices: Sequence[Device], quality: Mapping[str, Mapping[str, Any]]) -> str:
    """The text between the README's marks.

    Args:
        devices: all devices with results.
        quality: task to method to its case, from `quality.merged`. Empty without scores.
    """
    if not devices:
        return NOTHING
    parts = [part for case, found in _steps(devices) for part in _step_part(case, found, quality.get(TASK, {}))]
    notes = [f"{device.name}: {' '.join(found)}" for device in devices if (found := _incomplete_steps(device))]
    return "\n\n".join([*parts, *_kernel_part(devices), filled(" ".join([LINKS, *notes]))])


def machine(device: Device) -> str:
    """The processor or GPU, its threads, its limit of instructions, and torch's version."""
    found = device.environment
    gpu = found.get("gpu")
    named = gpu.get("name") if isinstance(gpu, dict) else gpu
    threads = "" if named else f", {found.get('threads')} threads"
    return f"{named or found.get('device')}{threads}, torch {found.get('torch')}"


def filled(paragraph: str, indent: str = "") -> str:
    """A paragraph in lines of at most 120 columns."""
    return textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)


def over_ours(
    device: Device,
    *,
    peer: str | None,
    operation: tuple[str, str] | None = None,
    largest: bool = False,
    shown: Callable[[Spread | None], str] = ratios,
) -> str:
    """Over cases of forward and backward with fresh inputs: the time of a peer (None: the best) over ours.

    ``shown`` formats a spread.
    """
    cells = []
    last = size_classes(device.gpu)[-1][1]
    cases = [case for case in device.files.get("ops", {}).get("cases", []) if case["inputs"] == "fresh"]
    for ours in OURS:
        values = []
        for case in cases:
            seconds = case["seconds"].get("both", {})
            other = best_peer(seconds) if peer is None else peer
            if ours not in seconds or other not in seconds:
                continue
            if operation is not None and operation != (case["operation"], case["variant"]):
                continue
            if largest and size_class(case["rows"] * case["width"], device.gpu) != last:
                continue
            over = seconds[other]["median"] / seconds[ours]["median"]
            values.append(1 / over if peer == COPY else over)
        if values:
            cells.append((ours, shown(spread(values))))
    return "; ".join(f"{ours} {text}" for ours, text in cells) if len(cells) > 1 else cells[0][1] if cells else NONE


def ratio_of_mean(value: Spread | None) -> str:
    """The geometric mean alone."""
    return NONE if value is None else ratio(value.mean)


def _steps(devices: Iterable[Device]) -> list[tuple[Case, list[tuple[Device, Case]]]]:
    """Each device's first training step (the most informative one comes first), devices of one step together."""
    found: dict[str, list[tuple[Device, Case]]] = {}
    for device in devices:
        for case in device.files.get("step", {}).get("cases", [])[:1]:
            found.setdefault(case_of_step(case), []).append((device, case))
    return [(group[0][1], group) for group in found.values()]


def _step_part(case: Case, group: Sequence[tuple[Device, Case]], scores: Mapping[str, Any]) -> list[str]:
    methods = [name for name in ROWS if any(name in own["seconds"] for _, own in group)][:MOST_ROWS]
    header = ["training step", "trained"]
    columns = [[ROWS[name][0] for name in methods], [_trained(group, name) for name in methods]]
    for device, own in group:
        header += [f"time, {device.name}", "over frozen"]
        columns += [[_time(own, name) for name in methods], [_over(own, name) for name in methods]]
        if own.get("peak_bytes"):
            header.append("memory")
            columns.append([mebibytes(own["peak_bytes"].get(name)) for name in methods])
    header.append(f"accuracy, {TASK}")
    columns.append([_score(scores, ROWS[name][1]) for name in methods])
    machines = "; ".join(f"*{device.name}*: {machine(device)}" for device, _ in group)
    head = (
        f"One training step of {case_of_step(case)} tokens. *Over frozen*: its time over that of the frozen model "
        "with the same fused norms, in the same round; median and quartiles. Memory is a step's peak beyond the "
        f"base weights. {_budget(scores)}A dash: not measured yet. {machines}."
    )
    return [filled(head), table(header, zip(*columns, strict=True))]


def _incomplete_steps(device: Device) -> list[str]:
    return [said for said in incomplete(device) if "`step.json`" in said]


def _budget(scores: Mapping[str, Any]) -> str:
    cases = [case for name, case in scores.items() if name != "base"]
    if not cases:
        return ""
    return f"Accuracy: all-MiniLM-L6-v2 on {TASK}, {cases[0]['steps']} steps of {cases[0]['batch']}. "


def _trained(group: Sequence[tuple[Device, Case]], name: str) -> str:
    counts = [own["trainable"][name] for _, own in group if name in own.get("trainable", {})]
    return f"{counts[0]:,}" if counts else NONE


def _time(case: Case, name: str) -> str:
    return time(case["seconds"][name]["median"]) if name in case["seconds"] else NONE


def _over(case: Case, name: str) -> str:
    if name not in case["seconds"] or FLOOR not in case["seconds"]:
        return NONE
    found = over_floor(case, name)
    return f"{ratio(found['median'])} ({ratio(found['low'])} to {ratio(found['high'])})"


def _score(scores: Mapping[str, Any], name: str | None) -> str:
    return score(scores[name]) if name is not None and name in scores else NONE


def _kernels(device: Device) -> str:
    """The operations alone, and the number of lost comparisons; empty without a file of operations."""
    if not device.files.get("ops", {}).get("cases"):
        return ""
    peers = {"eager": "eager", "`torch.compile`": "compile", "best peer": None}
    cells = {words: over_ours(device, peer=peer, shown=ratio_of_mean) for words, peer in peers.items()}
    said = ", ".join(f"{words} {cell}" for words, cell in cells.items() if cell != NONE)
    lost, of = comparisons(device).get("operations, time", (0, 0))
    return f"*{device.name}*: {said}" + (f"; slower in {lost:,} of {of:,}." if of else ".")


def _kernel_part(devices: Sequence[Device]) -> list[str]:
    """Of the devices in the table, where there are any."""
    stepped = [device for device in devices if "step" in device.files] or devices
    found = [filled(f"- {sentence}", "  ") for sentence in map(_kernels, stepped) if sentence]
    return [f"{KERNELS}\n\n" + "\n".join(found)] if found else []
