"""Pictures of results: bandwidth by hidden size, training steps, growth, scores; `write_plots` draws them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from red_kernels.support.files import write_files

from .figures import (
    COPY,
    DTYPES,
    FLOOR,
    KINDS,
    METHODS,
    OPERATIONS,
    OURS,
    PASSES,
    PEERS,
    QUALITY_METHODS,
    growth_series,
    in_order,
    lower_is_better,
    method_figures,
    rank,
)
from .results import Content, load_folder

# Okabe and Ito's colours, distinguishable for colour-blind readers; marks and hatches distinguish them in print.
BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
    "#C9B90E",
)
BLACK, GREY = "#000000", "#7F7F7F"


@dataclass(frozen=True)
class Look:
    """The style of one implementation or method in all pictures."""

    color: str
    marker: str
    hatch: str
    line: str = "-"


LOOKS = {
    "cpu": Look(BLUE, "o", ""),
    "cuda": Look(BLUE, "o", ""),
    "triton": Look(SKY, "s", "//"),
    "eager": Look(GREY, "v", ".."),
    "eager-fused": Look(GREY, "^", "oo", "--"),
    "compile": Look(ORANGE, "D", "\\\\"),
    "compile-max-autotune": Look(YELLOW, "d", "xx", "--"),
    "liger": Look(GREEN, "P", "--"),
    "quack": Look(RED, "X", "||"),
    "flash-attention": Look(PINK, "*", "++"),
    "apex": Look(BLACK, "h", "**"),
    "frozen-fused": Look("#FFFFFF", "_", ""),
    "frozen": Look("#D9D9D9", "x", ""),
    "frozen-compile": Look("#D9D9D9", "+", "\\\\"),
    "red": Look(BLUE, "o", ""),
    "red-compile": Look(SKY, "s", "//"),
    "naive": Look(GREY, "v", ".."),
    "naive-compile": Look(ORANGE, "D", "\\\\"),
    "lora-qv": Look(GREEN, "P", "--"),
    "lora-all": Look(RED, "X", "||"),
    "ia3": Look(PINK, "*", "++"),
    "bitfit": Look(YELLOW, "d", "xx"),
    "red-attn": Look("#00487A", "$a$", ""),
    "red-more": Look("#00487A", "$m$", "//"),
    "red-res": Look("#00487A", "$r$", ".."),
    "lora-all-r1": Look(RED, "x", "|"),
    "beft": Look(YELLOW, "<", "."),
    "ln-tuning": Look(GREEN, "H", "o"),
    **{name: Look(BLUE, f"${place}$", "") for place, name in enumerate(KINDS, 1)},
    "road": Look(SKY, "1", "-"),
    "vera": Look(GREEN, "2", "|"),
    "hra": Look(PINK, "3", "+"),
    "sara": Look(ORANGE, "4", "\\"),
    "spt": Look(YELLOW, "p", "x"),
    "lorta": Look(RED, "<", "o"),
    "loretta-adp": Look("#56407A", ">", "O"),
    "loretta-rep": Look("#8E7CC3", "8", "."),
    "melora": Look("#9C6B30", "H", "//"),
    "linear-probe": Look(YELLOW, "d", "xx"),
    "full": Look("#444444", "h", "oo"),
    "base": Look("#FFFFFF", "_", ""),
}
OTHER = Look("#8C564B", ".", "/", ":")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.5,
    "figure.dpi": 100,
    "savefig.dpi": 100,
}
ROOF = "copies of as many bytes"


def look(name: str) -> Look:
    """Of an implementation or method."""
    return LOOKS.get(name, OTHER)


def write_plots(folder: Path) -> list[Path]:
    """Draw the pictures of a folder's files of results, as PNG files next to them; returns the written ones.

    All pictures are written at once or none. The same files and versions give the same bytes. Pictures of a quick run
    say so.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a file is not a file of results.
        OSError: the folder cannot be written to.
    """
    device = load_folder(folder, quick=True)
    if device is None:
        return []
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError("pictures need matplotlib; remedy: pip install matplotlib") from error
    drawn: dict[str, bytes] = {}
    with matplotlib.style.context(["default", STYLE]):
        for job, draw in DRAWN.items():
            content = device.files.get(job)
            if content is None or not content["cases"]:
                continue
            for name, figure in draw(content):
                place = f"{_device_words(content)}" + (" (a quick run)" if content["quick"] else "")
                figure.suptitle(f"{figure.get_suptitle()}\n{place}", fontsize=10)
                drawn[name] = _png(figure)
    if drawn:
        write_files(folder, drawn)
    return [folder / name for name in drawn]


def _png(figure: Any) -> bytes:
    """A picture as a PNG of 64 colours, a third of the size; without the names of the program and the time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(64, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _device_words(content: Content) -> str:
    found = content["environment"]
    gpu = found.get("gpu")
    if gpu:
        return str(gpu.get("name") if isinstance(gpu, dict) else gpu)
    return f"{found.get('device')}, {found.get('threads')} threads"


def _new(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bandwidth(content: Content) -> list[tuple[str, Any]]:
    """A picture for each dtype: panels by operation and pass, with the most rows measured for each width."""
    return [
        (f"bandwidth-{dtype}.png", _bandwidth_of(content, dtype))
        for dtype in in_order({case["dtype"] for case in content["cases"]}, DTYPES)
    ]


def _bandwidth_of(content: Content, dtype: str) -> Any:
    panels: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for case in content["cases"]:
        if case["dtype"] != dtype or case["inputs"] != "fresh":
            continue
        by_width = panels.setdefault((case["operation"], case["variant"]), {})
        if case["width"] not in by_width or by_width[case["width"]]["rows"] < case["rows"]:
            by_width[case["width"]] = case
    keys = sorted(panels, key=lambda key: (rank(key[0], OPERATIONS), key[1]))
    passes = in_order(
        {which for widths in panels.values() for case in widths.values() for which in case["bytes"]}, PASSES
    )
    names = [*OURS, *PEERS, COPY]
    figure, axes = _new(max(1, len(keys)), max(1, len(passes)), 3.3 * max(1, len(passes)) + 0.4, 2.1 * len(keys) + 1.3)
    figure.suptitle(f"Bandwidth by hidden size, {dtype}, at the most rows measured (least bytes / time)")
    shown: dict[str, Any] = {}
    for row, key in enumerate(keys):
        for column, which in enumerate(passes):
            axis = axes[row][column]
            series: dict[str, list[tuple[int, float]]] = {}
            for width, case in sorted(panels[key].items()):
                for name, time in case["seconds"].get(which, {}).items():
                    if which in case["bytes"]:
                        series.setdefault(name, []).append((width, case["bytes"][which] / time["median"] / 1e9))
            for name in in_order(series, names):
                xs, ys = zip(*series[name], strict=True)
                if name == COPY:
                    (line,) = axis.plot(xs, ys, color=BLACK, linewidth=1.6, linestyle=(0, (5, 2)), zorder=1)
                    axis.fill_between(xs, ys, [2 * max(ys)] * len(ys), color="#F2F2F2", zorder=0, linewidth=0)
                    shown[ROOF] = line
                    continue
                style = look(name)
                ours = name in OURS
                (line,) = axis.plot(
                    xs, ys, color=style.color, marker=style.marker, linestyle=style.line,
                    linewidth=2.0 if ours else 1.0, markersize=5 if ours else 4, zorder=3 if ours else 2,
                )  # fmt: skip
                shown[name] = line
            axis.set_xscale("log", base=2)
            widths = sorted(panels[key])
            axis.set_xticks(_some(widths, 6), [str(width) for width in _some(widths, 6)], fontsize=8)
            axis.xaxis.minorticks_off()
            highest = max((y for points in series.values() for _, y in points), default=1.0)
            axis.set_ylim(0, 1.08 * highest)
            title = key[0] + (f" ({key[1]})" if key[1] else "")
            axis.set_title(f"{title}\n{which if which != 'both' else 'forward and backward'}")
            if row == len(keys) - 1:
                axis.set_xlabel("hidden size (elements)")
            if column == 0:
                axis.set_ylabel("bandwidth (GB/s)")
    ordered = in_order(shown, [*OURS, *PEERS, ROOF])
    figure.legend([shown[name] for name in ordered], ordered, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _some(values: Sequence[int], most: int) -> list[int]:
    """At most this many sorted values that are far enough apart on a logarithmic axis to be readable."""
    found: list[int] = []
    apart = (values[-1] / values[0]) ** (1 / (2 * most)) if values else 1
    for value in values:
        if not found or value >= found[-1] * max(1.12, apart):
            found.append(value)
    return found


def _bars(
    axis: Any, heights: Mapping[str, tuple[float, float, float]], names: Sequence[str], floor: float | None
) -> None:
    """Bars by name with whiskers from low to high, and the floor as a line."""
    for place, name in enumerate(names):
        style = look(name)
        value, low, high = heights[name]
        axis.bar(place, value, 0.75, color=style.color, hatch=style.hatch, edgecolor=BLACK, linewidth=0.7)
        if high > low:
            whisker = ([max(0.0, value - low)], [max(0.0, high - value)])
            axis.errorbar(place, value, yerr=whisker, color=BLACK, capsize=2.5, linewidth=1.0)
    if floor is not None:
        axis.axhline(floor, color=RED, linewidth=1.2, linestyle=(0, (5, 2)))
    axis.set_xticks(range(len(names)), names, rotation=55, ha="right", rotation_mode="anchor", fontsize=8)
    axis.grid(False, axis="x")


def _steps(content: Content) -> list[tuple[str, Any]]:
    return [
        ("step-time.png", _step_figure(content, "Time of a training step", memory=False)),
        *(
            [
                (
                    "step-memory.png",
                    _step_figure(content, "Peak memory of a training step beyond the base weights", memory=True),
                )
            ]
            if any(case.get("peak_bytes") for case in content["cases"])
            else []
        ),
    ]


def _step_figure(content: Content, title: str, *, memory: bool) -> Any:
    cases = [case for case in content["cases"] if case.get("peak_bytes") or not memory]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure, axes = _new(rows, columns, 3.5 * columns + 0.4, 2.9 * rows + 0.7)
    figure.suptitle(f"{title}; dashed: {FLOOR}, the floor" + ("" if memory else "; whiskers: quartiles"))
    for number, axis in enumerate(axis for line in axes for axis in line):
        if number >= len(cases):
            axis.set_visible(False)
            continue
        case = cases[number]
        found = {method.method: method for method in method_figures(case)}
        heights: dict[str, tuple[float, float, float]] = {}
        for name, method in found.items():
            if memory:
                if method.peak is not None:
                    heights[name] = (method.peak / 2**30,) * 3
            else:
                time = method.seconds
                heights[name] = (time["median"] * 1e3, time["low"] * 1e3, time["high"] * 1e3)
        floor = heights[FLOOR][0] if FLOOR in heights else None
        _bars(axis, heights, in_order(heights, METHODS), floor)
        axis.set_ylabel("peak memory (GiB)" if memory else "step (ms)")
        axis.set_title(f"{case['model']}, {case['dtype']}, {case['batch']} x {case['length']} tokens")
    return figure


def _growth(content: Content) -> list[tuple[str, Any]]:
    series = growth_series(content)
    units = {"layers": "layers", "width": "hidden size (elements)", "tokens": "tokens in the batch", "edits": "edits"}
    figure, axes = _new(2, len(series), 3.1 * len(series) + 0.6, 6.2)
    figure.suptitle("Growth of a training step")
    shown: dict[str, Any] = {}
    for column, (title, cases) in enumerate(series):
        values = [case["value"] for case in cases]
        for row, (name, label, scale) in enumerate(
            (("seconds", "step (ms)", 1e3), ("peak_bytes", "peak memory (MiB)", 2**-20))
        ):
            axis = axes[row][column]
            for method in in_order({method for case in cases for method in case.get(name, {})}, METHODS):
                points = [(case["value"], case[name][method]) for case in cases if method in case.get(name, {})]
                xs = [x for x, _ in points]
                ys = [(y["median"] if isinstance(y, dict) else y) * scale for _, y in points]
                style = look(method)
                floor = method == FLOOR
                (shown[method],) = axis.plot(
                    xs, ys, color=BLACK if floor else style.color, marker=style.marker,
                    linestyle=(0, (5, 2)) if floor else style.line, linewidth=2.0 if method == "red" else 1.2,
                    markersize=5, zorder=3 if method == "red" else 2,
                )  # fmt: skip
            axis.set_xscale("log")
            if all(y > 0 for line in axis.get_lines() for y in line.get_ydata()):
                axis.set_yscale("log")
            axis.set_xticks(_some(values, 6), [f"{value:,}" for value in _some(values, 6)], fontsize=8)
            axis.xaxis.minorticks_off()
            _plain_ticks(axis)
            if column == 0:
                axis.set_ylabel(label)
            axis.set_xlabel(units.get(cases[0]["axis"], cases[0]["axis"]))
            if row == 0:
                first, _, fixed = title.partition(" (")
                axis.set_title(f"against {first}" + (f"\n{fixed.rstrip(')')}" if fixed else ""), fontsize=8)
    ordered = in_order(shown, METHODS)
    figure.legend([shown[name] for name in ordered], ordered, loc="outside lower center", ncols=5, frameon=False)
    return [("growth.png", figure)]


def _plain_ticks(axis: Any) -> None:
    """Plain numbers on a logarithmic axis of values, also where it spans less than a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_ylim()
    if axis.get_yscale() != "log":
        return
    subs = (1.0,) if high / low > 50 else (1.0, 2.0, 5.0) if high / low > 5 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _quality(content: Content) -> list[tuple[str, Any]]:
    tasks = sorted({case["task"] for case in content["cases"]})
    figure, axes = _new(1, len(tasks), 3.6 * len(tasks) + 0.4, 3.5)
    figure.suptitle("Scores: mean and sample standard deviation over seeds")
    for axis, task in zip(axes[0], tasks, strict=True):
        cases = {case["method"]: case for case in content["cases"] if case["task"] == task}
        metric = next(iter(cases.values()))["metric"]
        heights = {
            name: (case["mean"], case["mean"] - (case["spread"] or 0), case["mean"] + (case["spread"] or 0))
            for name, case in cases.items()
            if case["mean"] is not None and name != "base"  # too far off: the others could not be distinguished
        }
        for place, name in enumerate(in_order(heights, QUALITY_METHODS)):
            value, low, high = heights[name]
            style = look(name)
            axis.errorbar(place, value, yerr=([value - low], [high - value]), color=BLACK, capsize=4, linewidth=1.2)
            axis.plot(
                [place], [value], color=style.color, marker=style.marker, markersize=7, linestyle="none", zorder=3
            )
        axis.set_xticks(
            range(len(heights)), in_order(heights, QUALITY_METHODS), rotation=55, ha="right", rotation_mode="anchor"
        )
        axis.set_xlim(-0.6, len(heights) - 0.4)
        better = "lower" if lower_is_better(metric) else "higher"
        unit = " (%)" if metric == "accuracy" else ""
        axis.set_ylabel(f"{metric}{unit}, {better} is better")
        axis.set_title(
            task + (f" (base: {cases['base']['mean']:.4g})" if cases.get("base", {}).get("mean") is not None else "")
        )
    return [("quality.png", figure)]


DRAWN: dict[str, Callable[[Content], list[tuple[str, Any]]]] = {
    "ops": _bandwidth,
    "step": _steps,
    "growth": _growth,
    "quality": _quality,
}
