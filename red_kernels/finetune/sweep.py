"""`red-kernels sweep`: the learning rate, by successive halving.

All rates train for some steps. The better half continues for twice as many, until one rate is left and has trained for
all steps (Jamieson and Talwalkar, arXiv 1502.07943). No step is trained twice: a run continues from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings import Settings

__all__ = ["add_options", "run", "rungs", "sweep"]

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RECORD, PICTURE = "sweep.json", "sweep.png"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command, beside those of finetune."""
    from .options import add_options as add_finetune_options

    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=list(RATES),
        metavar="RATE",
        help=f"learning rates to try (default: {' '.join(f'{rate:g}' for rate in RATES)})",
    )
    add_finetune_options(parser, without=("--learning-rate", "--sample", "--no-compare", "--fsdp", "--tp"))


def run(options: argparse.Namespace) -> int:
    """The command."""
    from rich.console import Console

    from .options import settings_of

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sweep: got several processes, expected one: start it without a launcher")
    resume = getattr(options, "resume", False)
    options.resume = False  # the sweep is resumed, not a run
    options.output = getattr(options, "output", "red-sweep")
    settings, console = settings_of(options), Console()
    idle = [name for name in ("learning_rate", "sample") if getattr(settings, name) != getattr(type(settings), name)]
    if idle:  # only a file can have them
        console.print(f"Ignored by a sweep, from {options.config}: {', '.join(idle)}", markup=False, highlight=False)
    sweep(replace(settings, resume=resume), options.rates, console)
    return 0


def rungs(count: int, steps: int) -> list[tuple[int, int]]:
    """The number of rates and their total steps, rung by rung; the last rung is one rate, for all steps."""
    sizes = [count]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return [(size, max(1, steps >> (len(sizes) - 1 - place))) for place, size in enumerate(sizes)]


def sweep(settings: Settings, rates: list[float], console: Any) -> float:
    """Find the learning rate with the lowest held-out loss.

    Args:
        settings: of each run except its rate; `output` is the folder for all of them, `steps` those of the last rung.
            With `resume` an interrupted sweep continues.
        rates: two or more.
        console: shows a line for each run, and a table.

    Returns:
        The best rate. Its run, with the edits, is in `output` / `lr-RATE`.

    Raises:
        ValueError: fewer than two rates, or a duplicate; a schedule that depends on the number of steps; an output
            folder with a sweep; all rates diverge; or an error of `finetune`.
    """
    from rich.console import Console

    from ..support.files import write_files
    from .job import finetune
    from .settings import STEPS
    from .watching import Diverged

    rates = sorted(rates)
    if len(rates) < 2 or len(set(rates)) < len(rates) or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates: got {rates}, expected two or more different numbers above 0")
    if settings.schedule != "constant" or settings.epochs is not None:
        what = "schedule" if settings.epochs is None else "epochs"
        raise ValueError(f"{what}: a run that continues for more steps needs a constant schedule and --steps")
    replace(settings, sample=()).filled()  # their faults are errors now
    folder = Path(settings.output)
    record = _former(folder, settings)
    settings = replace(settings, compare=False, sample=(), resume=False)
    alive, former = rates, 0
    for size, steps in rungs(len(rates), settings.steps or STEPS):
        before = {rate: _last(record, rate, former) for rate in alive}
        alive = sorted((rate for rate in alive if before[rate] < math.inf), key=before.__getitem__)[:size]
        for number, rate in enumerate(sorted(alive), start=1):
            losses = record.setdefault(f"{rate:g}", {})
            if str(steps) in losses:
                continue
            own = folder / f"lr-{rate:g}"
            goes_on = (own / "run.json").is_file() and not settings.overwrite
            try:
                found = finetune(
                    replace(settings, learning_rate=rate, steps=steps, output=str(own), resume=goes_on),
                    Console(quiet=True),
                )
            except Diverged:
                losses[str(steps)] = None
            else:
                if found is None:
                    raise KeyboardInterrupt
                losses[str(steps)] = found["after"]["loss"]
            loss = losses[str(steps)]
            said = "diverged" if loss is None else f"held-out loss {loss:.5f}"
            console.print(f"{number} of {len(alive)}: learning rate {rate:g}, {steps} steps: {said}", highlight=False)
            content = {"settings": settings.deciding(), "losses": record}
            write_files(folder, {RECORD: (json.dumps(content, indent=2, default=str) + "\n").encode()})
        former = steps
        if all(_last(record, rate, steps) == math.inf for rate in alive):
            raise ValueError(f"rates: the training diverged with each of {', '.join(f'{rate:g}' for rate in rates)}")
        settings = replace(settings, overwrite=False)
    _show(console, record)
    write_files(folder, {PICTURE: _picture(record)})
    best = min(alive, key=lambda rate: _last(record, rate, former))
    console.print(
        f"Best: --learning-rate {best:g}; its edits are in {folder / f'lr-{best:g}' / 'edits'}", soft_wrap=True
    )
    return best


def _former(folder: Path, settings: Settings) -> dict[str, dict[str, float | None]]:
    from ..support.parse import read_json

    path = folder / RECORD
    if settings.overwrite or not path.exists():
        return {}
    if not settings.resume:
        raise ValueError(
            f"--output: {str(folder)!r} holds a sweep; continue it by --resume, or start over by --overwrite"
        )
    content = read_json(path)
    same = json.loads(json.dumps(replace(settings, compare=False, sample=()).deciding(), default=str))
    if content.get("settings") != same or not isinstance(content.get("losses"), dict):
        raise ValueError(f"--resume: the sweep in {str(folder)!r} is damaged, or was started with other settings")
    losses: dict[str, dict[str, float | None]] = content["losses"]
    return losses


def _last(record: dict[str, dict[str, float | None]], rate: float, most: int) -> float:
    """The loss of a rate at its most trained steps up to `most`; infinite if it diverged."""
    losses = {step: loss for step, loss in record.get(f"{rate:g}", {}).items() if int(step) <= most}
    if not losses:
        return 0.0
    loss = losses[max(losses, key=int)]
    return math.inf if loss is None or math.isnan(loss) else loss


def _show(console: Any, record: dict[str, dict[str, float | None]]) -> None:
    from rich.table import Table

    steps = sorted({int(step) for losses in record.values() for step in losses})
    table = Table("learning rate", *(f"{step} steps" for step in steps), title="Held-out loss")
    for rate, losses in sorted(record.items(), key=lambda item: float(item[0])):
        cells = [losses.get(str(step), "") for step in steps]
        table.add_row(rate, *("diverged" if one is None else one if one == "" else f"{one:.5f}" for one in cells))
    console.print(table)


def _picture(record: dict[str, dict[str, float | None]]) -> bytes:
    from .report import loss_picture

    def draw(axes: Any) -> None:
        for step in sorted({int(step) for losses in record.values() for step in losses}):
            known = {float(rate): losses.get(str(step)) for rate, losses in record.items()}
            points = sorted((rate, loss) for rate, loss in known.items() if loss is not None)
            axes.plot(*zip(*points, strict=True), "o-", label=f"held out, {step} steps")

    return loss_picture(draw, "learning rate", log=True)
