"""The results of the calls at a glance: correctness, bandwidth, peers, host time, steps, stages."""

from __future__ import annotations

import json
import re
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .state import CUT, DONE, FAILED, LEFT_OUT, WAITING, State

FILES = ("bandwidth", "peers", "host", "step", "variants")
PASSES = ("forward", "backward")
RIGHT = {  # each claim of correctness, to the stages that show it
    "cuda": ("tests-cuda", "again-cuda"),
    "triton": ("tests-triton", "again-triton"),
    "on a GPU only": ("tests-gpu", "large", "again-gpu"),
    "memory": ("sanitizers",),
}
NOTABLE = 0.02  # of a variant's time
LONGEST = 118
Results = Mapping[str, Any]


def results(folder: Path) -> dict[str, Any]:
    """Every readable file of results, by its name."""
    found = {}
    for name in FILES:
        try:
            found[name] = json.loads((folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            continue
    return found


def text(known: State, found: Results) -> str:
    """The whole summary."""
    parts = [
        ("" if not known.rehearsal else "REHEARSAL on a CPU, with tiny sizes: it allows no conclusions.", []),
        ("Right or wrong", list(_right(known))),
        ("Percent of a copy's bandwidth, by width (forward/backward)", list(_bandwidth(found.get("bandwidth")))),
        (
            "Times as long as ours, a peer's forward and backward (of our faster backend)",
            list(_peers(found.get("peers"))),
        ),
        ("Host: a forward with gradient over torch's own rms_norm", list(_host(found.get("host")))),
        ("Training step over frozen-fused", list(_step(found.get("step")))),
        ("Variants: time over that of the package here", list(_variants(found.get("variants")))),
        ("Stages", list(_stages(known))),
        ("Noted", [f"  {line}" for line in known.said]),
    ]
    lines: list[str] = []
    for title, body in parts:
        if title and (body or title.startswith("REHEARSAL")):
            lines += [title, *(part for line in body for part in _folded(line)), ""]
    return "\n".join(lines)


def _folded(line: str) -> list[str]:
    """A line, wrapped with an indent if it is long."""
    begin = line[: len(line) - len(line.lstrip())]
    return textwrap.wrap(
        line, LONGEST, initial_indent="", subsequent_indent=begin + "    ", drop_whitespace=True,
        replace_whitespace=False, break_on_hyphens=False,
    ) or [""]  # fmt: skip


def _right(known: State) -> Iterator[str]:
    for what, stages in RIGHT.items():
        ran = [(name, known.stages[name]) for name in stages if name in known.stages and known.stages[name].call]
        if not ran:
            why = next((known.stages[name].note for name in stages if name in known.stages), "")
            yield f"  {what:14} not checked{': ' + why if why else ''}"
            continue
        # A test that failed first and passed in the continued stage is right.
        again = [name.partition("-")[2] for name, _ in ran if name.startswith("again-")]
        valid = [entry for name, entry in ran if name not in [f"tests-{one}" for one in again]]
        passed = any(re.search(r"\b[1-9]\d* (?:tests )?passed", entry.note) for _, entry in ran)
        said = "right" if passed else "not checked: no test passed"
        if any(entry.status == FAILED or re.search(r"\b\d+ (?:failed|error)", entry.note) for entry in valid):
            said = "WRONG"
        elif passed and any(entry.status == CUT for entry in valid):
            said = "right so far, not all ran"
        yield f"  {what:14} {said}"
        for name, entry in ran:
            yield from (f"      {name}: {part}" for part in entry.note.split("; ") if part)


def _cases(content: Any) -> list[Mapping[str, Any]]:
    return [] if content is None else content["cases"]


def _label(case: Mapping[str, Any]) -> str:
    short = case["operation"].replace("edit_add_", "").replace("_norm", "")
    return f"{short} {case['variant']}".strip()


def _bandwidth(content: Any) -> Iterator[str]:
    cases = _cases(content)
    widths = sorted({case["width"] for case in cases})
    if not widths:
        return
    yield f"  {'':32}" + "".join(f"{width:>9}" for width in widths)
    # Sizes of one number of elements differ a little, by incomplete rows.
    kinds = sorted({(_label(case), -_millions(case)) for case in cases})
    for label, millions in kinds:
        of = {case["width"]: case for case in cases if (_label(case), -_millions(case)) == (label, millions)}
        for backend in sorted({name for case in of.values() for name in case["result"]["forward"]}):
            cells = []
            for width in widths:
                shares = [_share(of.get(width), one, backend) for one in PASSES]
                cells.append("/".join(shares) if width in of else "-")
            yield f"  {f'{label}, {-millions}M, {backend}':32}" + "".join(f"{cell:>9}" for cell in cells)
    for case in content["failed"]:
        yield f"  failed: {case['operation']} {case['width']}: {case['error']}"


def _millions(case: Mapping[str, Any]) -> int:
    return round(case["width"] * case["rows"] / 2**20)


def _share(case: Mapping[str, Any] | None, one: str, backend: str) -> str:
    of = None if case is None else case["result"][one].get(backend)
    return "-" if of is None else f"{100 / of['over_floor']:.0f}"


def _peers(content: Any) -> Iterator[str]:
    cases = _cases(content)
    ratios: dict[tuple[str, str], list[float]] = {}
    kernels: dict[str, dict[str, None]] = {}
    for case in cases:
        times = case["seconds"]["both"]
        ours = [times[name]["median"] for name in case["result"]["both"] if name in times]
        for name, time in times.items():
            if ours and name != "copy" and name not in case["result"]["both"]:
                ratios.setdefault((_label(case), name), []).append(time["median"] / min(ours))
        for name, started in case.get("kernels", {}).items():
            if name not in case["result"]["both"]:
                kernels.setdefault(name, {}).update(dict.fromkeys(started))
    for (label, name), values in sorted(ratios.items()):
        middle = statistics.median(values)
        yield f"  {label:20} {name:16} {middle:.2f} (widths: {min(values):.2f} to {max(values):.2f})"
    for name, started in kernels.items():
        yield f"  {name} ran: {', '.join(one[:48] for one in started)}"
    left: dict[str, str] = {}
    for case in cases:
        left |= {f"{name} ({_label(case)})": why for name, why in case["left_out"].items()}
    asked = [] if content is None else content["settings"].get("implementations") or ()
    left |= {name: why for name, why in ({} if content is None else content["missing"]).items() if name in asked}
    for name, why in left.items():
        yield f"  {name} was not measured: {why}"


def _host(content: Any) -> Iterator[str]:
    for implementation, of in ({} if content is None else content["times_torch_rms_norm"]).items():
        yield f"  {implementation:40} " + ", ".join(f"{name} {ratio:.1f}" for name, ratio in of.items())


def _step(content: Any) -> Iterator[str]:
    for case in _cases(content):
        over = case.get("over_floor", {})
        shown = ", ".join(f"{name} {over[name]['median']:.3f}" for name in case["seconds"] if name in over)
        yield f"  {case['model']}, {case['batch']} x {case['length']}: {shown}"
        for name, why in case["left_out"].items():
            yield f"      {name} was not measured: {why}"


def _variants(content: Any) -> Iterator[str]:
    found = {} if content is None else content["over_copy"]
    names = list(dict.fromkeys(name for of in found.values() for name in of if name != "here"))
    for name in names:
        ratios = {what: of[name] / of["here"] for what, of in found.items()}
        yield f"  {name:16} median {statistics.median(ratios.values()):.3f} of {len(ratios)}"
        for what, ratio in sorted(ratios.items(), key=lambda one: one[1]):
            if abs(ratio - 1) >= NOTABLE:
                yield f"      {ratio:.3f} {what}"
    for name, why in ({} if content is None else content["failed"]).items():
        yield f"  {name} could not be measured: {why}"


def _stages(known: State) -> Iterator[str]:
    order: Sequence[str] = (FAILED, CUT, WAITING, LEFT_OUT, DONE)
    newest = max((entry.call for entry in known.stages.values()), default=0)
    latest = {entry.sources for entry in known.stages.values() if entry.call == newest}
    for status in order:
        names = []
        for name, entry in known.stages.items():
            if entry.status == status:
                old = ", of other sources than the last call" if entry.call and entry.sources not in latest else ""
                names.append(f"{name} ({entry.seconds:.0f} s{old})" if entry.call else name)
        if names:
            yield f"  {status:9} {', '.join(names[:5])}"
            yield from (f"  {'':9} {', '.join(names[first : first + 5])}" for first in range(5, len(names), 5))
