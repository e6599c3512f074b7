"""Our losses: every peer better by more than the spread, every missed goal, and all missing measurements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .figures import (
    FLOOR,
    HOST_GOAL,
    HOST_SHAPE,
    KINDS,
    OUR_METHODS,
    STEP_GOAL,
    WITHOUT_TRAINING,
    Loss,
    Missed,
    case_of_growth,
    case_of_operation,
    case_of_step,
    lower_is_better,
    ours_in,
    over_floor,
    peers_in,
)
from .results import Device
from .text import mebibytes, ratio, timing


def losses(device: Device) -> list[Loss]:
    """Every comparison in which a peer is better than ours by more than the spread, the greatest of each file first.

    Times: the peer's upper quartile is below our lower one. Memory: the peer's peak is lower. Scores: mean and standard
    deviation over the seeds do not overlap.
    """
    found = [loss for loss, _ in _comparisons(device) if loss is not None]
    files = ("ops", "host", "step", "growth", "quality")
    return sorted(found, key=lambda loss: (files.index(loss.job), loss.what != "time", -(loss.ratio or 0), loss.where))


def comparisons(device: Device) -> dict[str, tuple[int, int]]:
    """By comparison (operations, host, step, growth, quality, each of time or memory): losses and their total."""
    found: dict[str, tuple[int, int]] = {}
    for loss, name in _comparisons(device):
        lost, all_of_them = found.get(name, (0, 0))
        found[name] = (lost + (loss is not None), all_of_them + 1)
    return found


def _comparisons(device: Device) -> Iterator[tuple[Loss | None, str]]:
    files = device.files
    for case in files.get("ops", {}).get("cases", []):
        for which, seconds in case["seconds"].items():
            where = case_of_operation(case, which)
            yield from _times("ops", "operations, time", where, seconds, ours_in(seconds), peers_in(seconds))
        peak = case.get("peak_bytes", {})
        where = case_of_operation(case)
        yield from _memory("ops", "operations, memory", where, peak, ours_in(peak), peers_in(peak))
    for case in files.get("ops", {}).get("host", []):
        for which, seconds in case["seconds"].items():
            where = case_of_operation({"variant": "", "inputs": "host", **case}, which)
            yield from _times("host", "host time of a call", where, seconds, ours_in(seconds), peers_in(seconds))
    for job, words, name in (("step", case_of_step, "training steps"), ("growth", case_of_growth, "growth")):
        for case in files.get(job, {}).get("cases", []):
            for what, compare, values in (
                ("time", _times, case["seconds"]),
                ("memory", _memory, case.get("peak_bytes", {})),
            ):
                ours = [method for method in OUR_METHODS if method in values]
                peers = [method for method in values if method not in (*OUR_METHODS, *KINDS, *WITHOUT_TRAINING)]
                yield from compare(job, f"{name}, {what}", words(case), values, ours, peers)
    yield from _scores(files.get("quality", {}).get("cases", []))


def _times(
    job: str, name: str, where: str, seconds: dict[str, Any], ours: list[str], peers: list[str]
) -> Iterator[tuple[Loss | None, str]]:
    for own in ours:
        for peer in peers:
            a, b = seconds[own], seconds[peer]
            figures = f"{timing(a)} against {timing(b)}"
            lost = b["high"] < a["low"]
            yield (
                Loss(job, where, "time", own, peer, figures, a["median"] / b["median"]) if lost else None,
                name,
            )


def _memory(
    job: str, name: str, where: str, peak: dict[str, int], ours: list[str], peers: list[str]
) -> Iterator[tuple[Loss | None, str]]:
    for own in ours:
        for peer in peers:
            a, b = peak[own], peak[peer]
            figures = f"{mebibytes(a)} against {mebibytes(b)}"
            # a peer that takes nothing has no ratio
            yield (Loss(job, where, "memory", own, peer, figures, a / b if b else None) if b < a else None, name)


def _scores(cases: list[dict[str, Any]]) -> Iterator[tuple[Loss | None, str]]:
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for case in cases:
        by_task.setdefault(case["task"], {})[case["method"]] = case
    for task, methods in by_task.items():
        own = methods.get("red")
        for peer, other in methods.items():
            if own is None or peer in ("red", "base"):
                continue
            figures = f"{score(own)} against {score(other)}"
            if own["mean"] is None or other["mean"] is None:
                lost = own["mean"] is None and other["mean"] is not None
            else:
                ahead = other["mean"] - own["mean"]
                spread = (own["spread"] or 0) + (other["spread"] or 0)
                lost = (-ahead if lower_is_better(own["metric"]) else ahead) > spread
            yield (Loss("quality", task, own["metric"], "red", peer, figures, None) if lost else None, "quality")


def score(case: dict[str, Any]) -> str:
    """A mean score and its sample standard deviation over the seeds."""
    if case["mean"] is None:
        return "diverged"
    return f"{case['mean']:.2f}" + ("" if case["spread"] is None else f" ± {case['spread']:.2f}")


def goals(device: Device) -> list[tuple[Missed, bool]]:
    """Every goal with a figure, and whether it was missed, however slightly: steps over the floor, and on a GPU the
    host time of a call.
    """
    found = []
    for job, words in (("step", case_of_step), ("growth", case_of_growth)):
        for case in device.files.get(job, {}).get("cases", []):
            seconds = case["seconds"]
            if "red" not in seconds or FLOOR not in seconds:
                continue
            found_over = over_floor(case, "red")
            over = found_over["median"]
            how = "the quartiles reach it" if found_over["low"] <= STEP_GOAL else "beyond the quartiles"
            goal = f"red at most {STEP_GOAL} times {FLOOR}"
            found.append((Missed(f"{job}: {words(case)}", goal, f"{ratio(over)} ({how})"), over > STEP_GOAL))
    for case in device.files.get("ops", {}).get("host", []):
        timed = case["seconds"].get("forward", {}).get("cuda")
        if timed is not None and (case["rows"], case["width"]) == HOST_SHAPE:
            where = f"host: {case['operation']}, {case['dtype']}, {case['rows']} x {case['width']}, forward, cuda"
            missed = Missed(where, f"under {HOST_GOAL * 1e6:.0f} us", timing(timed))
            found.append((missed, timed["median"] >= HOST_GOAL))
    return found


def missed_goals(device: Device) -> list[Missed]:
    """Those of :func:`goals` that were missed."""
    return [goal for goal, missed in goals(device) if missed]


def not_measured(device: Device) -> list[tuple[str, str, str]]:
    """Missing measurements: the file, the subject, and the reason; those missing in several cases are counted."""
    found: dict[tuple[str, str, str], int] = {}
    for job, content in device.files.items():
        for name, reason in sorted(content.get("missing", {}).items()):
            found[job, name, reason] = 0
        for case in content["cases"]:
            for name, reason in sorted(case.get("left_out", {}).items()):
                if (job, name, reason) in found:
                    continue  # it is missing everywhere
                where = case.get("operation") or case.get("model") or case.get("task") or case.get("axis") or "?"
                key = (job, f"{name} of {where}", reason)
                found[key] = found.get(key, 0) + 1
        for case in content.get("failed", []):
            words = ", ".join(str(value) for name, value in case.items() if name != "error")
            found[job, words, f"failed: {case['error']}"] = 0
    return [
        (job, name + (f" ({count} cases)" if count > 1 else ""), reason) for (job, name, reason), count in found.items()
    ]


def incomplete(device: Device) -> list[str]:
    """In words: the files whose runs ended before all cases were measured."""
    found = []
    for job, content in device.files.items():
        if not content.get("complete"):
            planned = content.get("planned")
            of = f"{len(content['cases'])} of {planned}" if planned is not None else f"{len(content['cases'])}"
            found.append(f"`{job}.json` is incomplete: {of} cases measured.")
    return found
