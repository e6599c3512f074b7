"""The output of a job: tables on the terminal and the loss curve as a PNG file."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..support.files import write_files
from ..support.require import require
from .measure import HeldOut, Speed

_HEADINGS = {"f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}


def plural(count: int, noun: str) -> str:
    """`1 site`, `2 sites`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size(count: float) -> str:
    """A readable number of bytes: `138 KB`, `1.2 GB`."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def parameter_table(console: Console, groups: Mapping[str, tuple[int, int]], total: int) -> None:
    """Print the trainable parameters: `groups` maps a name to its number of tensors and of parameters."""
    table = Table(title="Trainable parameters")
    for heading in ("what", "tensors", "parameters", "of the model"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, (tensors, count) in groups.items():
        table.add_row(name, f"{tensors:,}", f"{count:,}", f"{count / total:.4%}")
    trained = sum(count for _, count in groups.values())
    table.add_section()
    whole = f"{total / 1e6:.1f}M" if total >= 1e5 else f"{total:,}"
    table.add_row("together", "", f"{trained:,} of {whole}", f"{trained / total:.4%}")
    console.print(table)


def held_out_table(console: Console, rows: Mapping[str, HeldOut]) -> None:
    """Print held-out loss with perplexity, or with the scores of a classifier or a regression."""
    scores = [name for name in next(iter(rows.values())).numbers() if name != "loss"]
    table = Table(title="Held-out")
    table.add_column("")
    for heading in ("loss", *(scores or ["perplexity"])):
        table.add_column(_HEADINGS.get(heading, heading), justify="right")
    for name, row in rows.items():
        said = row.numbers()
        others = [f"{said[own]:.2%}" if own == "accuracy" else f"{said[own]:.4f}" for own in scores]
        table.add_row(name, f"{row.loss:.5f}", *(others or [f"{row.perplexity:.2f}"]))
    console.print(table)


def speed_table(console: Console, speeds: Mapping[str, Speed], first: str) -> None:
    """Print training speeds, each with its ratio to `first`."""
    rounds = len(speeds[first].samples)
    table = Table(title=f"Training speed (interleaved, {rounds} rounds; padding is not counted)")
    table.add_column("")
    for heading in ("tokens/s, median", "slowest to fastest", f"{first} is"):
        table.add_column(heading, justify="right")
    for name, speed in speeds.items():
        low, high = speed.spread
        ratio = "" if name == first else f"{speeds[first].median / speed.median:.2f}x as fast"
        table.add_row(name, f"{speed.median:,.0f}", f"{low:,.0f} to {high:,.0f}", ratio)
    console.print(table)


def loss_picture(draw: Callable[[Any], None], across: str, log: bool = False) -> bytes:
    """A plot of losses, as the content of a PNG file.

    Args:
        draw: gets matplotlib's axes.
        across: the label of the horizontal axis.
        log: whether that axis is logarithmic.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require("matplotlib", "a plot of losses")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)  # no display, and the user's own backend is unchanged
    axes = figure.add_subplot()
    draw(axes)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(across)
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def draw_loss_curve(path: Path, steps: Sequence[int], losses: Sequence[float], held_out: Mapping[int, float]) -> Path:
    """Draw the training loss, and the held-out loss at its measured steps, into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        OSError: the file cannot be written; nothing is left behind.
    """

    def draw(axes: Any) -> None:
        axes.plot(steps, losses, color="tab:blue", linewidth=1.2, label="training")
        axes.plot(list(held_out), list(held_out.values()), "o--", color="tab:red", label="held out")

    write_files(path.parent, {path.name: loss_picture(draw, "step")})
    return path
