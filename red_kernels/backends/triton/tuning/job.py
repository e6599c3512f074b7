"""`red-kernels bench --tune`: search the launch rules of this GPU and store a table."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...._version import __version__
from ....support.clocks import graph_clock
from ....support.files import json_by_line, write_files
from ....support.progress import Stage
from ...find_triton import require_gpu
from .. import tuned
from . import matmul
from .matmul import Product, products
from .search import Bench, Case, Outcome, Target, geometric_mean, search, targets
from .workloads import DTYPES, MOST_SETS, OPERATIONS, Pass, Workload, most_sums

ALL_OPERATIONS = (*OPERATIONS, matmul.OPERATION)
CACHES = 3  # inputs rotate through this many times the L2 cache
CACHE_BYTES = 64 << 20  # of a GPU that does not report it


@dataclass(frozen=True)
class Settings:
    """The scope of a search. ``sums`` are numbers of vectors with gradients: 2 for scale and bias, frozen norm."""

    output: Path | None = None
    operations: tuple[str, ...] = ("edit_add", "edit_add_rms_norm", "edit_add_layer_norm", matmul.OPERATION)
    widths: tuple[int, ...] = (768, 1024, 2048, 3072, 4096, 5120, 8192, 16384)
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    rows: tuple[int, ...] = (512, 4096)
    sums: tuple[int, ...] = (2,)
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, known in (("operations", ALL_OPERATIONS), ("dtypes", tuple(DTYPES))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name}: got {value!r}, expected some of {', '.join(known)}")
        for name in ("widths", "rows"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name}: got {value}, expected positive numbers")
        for value in self.sums:
            if not 1 <= value <= 4:
                raise ValueError(f"sums: got {value}, expected numbers from 1 to 4")
        for name in ("operations", "widths", "dtypes", "rows", "sums"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name}: got nothing, expected one value or more")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: got {', '.join(map(str, values))}, expected each value once")


def gpu_bench() -> Bench:
    """The current GPU, timed by graph replays. Raises RuntimeError, naming the missing part, if there is none."""
    require_gpu()
    device = torch.device("cuda", torch.cuda.current_device())
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or CACHE_BYTES
    return Bench(device, graph_clock, CACHES * cache, how="replays of CUDA graphs between events")


def tune(settings: Settings, console: Console, bench: Bench | None = None) -> Path:
    """Search the rules and write the table, again after each result; returns the file.

    Args:
        settings: the scope; the table goes to ``output``, by default a file in the working directory named after the
            architecture.
        console: for the progress and the results.
        bench: the device and its clock (default: the current GPU).

    Raises:
        RuntimeError: there is no GPU to measure.
        FileExistsError: the file exists, and ``overwrite`` is not set.
        OSError: the file cannot be written, which is checked first.
    """
    bench = bench or gpu_bench()
    output = settings.output or Path(f"{bench.architecture.name}.json")
    _check_output(output, settings.overwrite)
    table = _Table(output, bench)
    found = targets(_workloads(settings, bench), bench)
    kept: dict[tuple[Any, ...], Any] = {}  # tiles of matrix products
    with Stage(console, "searching", len(found), unit="rule") as stage:
        for number, target in enumerate(found, start=1):
            stage.begins(str(target))
            outcome = _guarded(target, bench, console)
            if outcome is not None:
                table.add(outcome)
                _show(outcome, console)
                if target.rule.name == "linear":
                    kept[target.arguments] = outcome.tile if outcome.won else outcome.default
            stage.reached(number)
        for target in found:
            if target.arguments in kept and target.rule.name == "linear":
                _compare(target, kept[target.arguments], bench, table, console)
    table.write()
    _summarise(table, console)
    return output


class _Table:
    """The growing table, and its file."""

    def __init__(self, path: Path, bench: Bench) -> None:
        chip = bench.architecture
        self.path = path
        self.content: dict[str, Any] = {
            "format": tuned.FORMAT,
            "architecture": chip.name,
            "warp": chip.warp,
            "device": _device_name(bench.device),
            "multiprocessors": chip.multiprocessors,
            "versions": {
                "torch": torch.__version__,
                "triton": triton.__version__,
                "red_kernels": __version__,
                "commit": _commit(),
            },
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "measuring": (
                f"{bench.how}; inputs rotate through {bench.cache_bytes / 1e6:.0f} MB or {MOST_SETS} "
                f"sets; quartiles of {bench.passes} x {bench.confirming_rounds} rounds that alternate with the "
                "default, after "
                f"{bench.rounds} rounds that chose the best tiles"
            ),
            "entries": [],
            "linear_wins": [],
        }
        self.left_out = 0

    def add(self, outcome: Outcome) -> None:
        self.left_out += len(outcome.left_out)
        if not outcome.won:
            return
        self.content["entries"].append(
            {
                "rule": outcome.target.rule.name,
                **outcome.target.key,
                "tile": _json(outcome.tile),
                "default": _json(outcome.default),
                "ratio": round(outcome.ratio, 4),
                "measured": _measured(outcome.cases),
            }
        )
        self.write()

    def add_win(self, place: tuple[str, int, int, int], cases: Sequence[Case]) -> None:
        ratio = round(geometric_mean([case.ratio for case in cases]), 4)
        win = {**dict(zip(("dtype", "m", "n", "k"), place, strict=True)), "ratio": ratio, "measured": _measured(cases)}
        self.content["linear_wins"].append(win)
        self.write()

    def write(self) -> None:
        """Write the file, after verifying that it can be read again."""
        text = json_by_line(self.content)
        tuned.parse(text, str(self.path), self.path)
        write_files(self.path.parent, {self.path.name: text.encode()})


def _workloads(settings: Settings, bench: Bench) -> list[Workload]:
    """Grouped by rule in the end, so their order is that of the progress."""
    found: list[Workload] = []
    for width in settings.widths:
        for name in settings.operations:
            if name == matmul.OPERATION:
                continue
            for dtype in settings.dtypes:
                for rows in settings.rows:
                    found.append(Pass(name, False, dtype, rows, width))
                    sums = dict.fromkeys(min(count, most_sums(name)) for count in settings.sums)
                    found.extend(Pass(name, True, dtype, rows, width, count) for count in sums)
    if matmul.OPERATION in settings.operations:
        found.extend(products(settings.widths, settings.rows, settings.dtypes, bench))
    return found


def _guarded(target: Target, bench: Bench, console: Console) -> Outcome | None:
    """A search, or None with a message if the device lacks memory."""
    try:
        return search(target, bench)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        console.print(f"[yellow]{target}: not searched, the device has too little memory for it[/]")
        return None


def _compare(target: Target, tile: Any, bench: Bench, table: _Table, console: Console) -> None:
    """Measure the fused matmul against the composed form, for each entry of a table."""
    places: dict[tuple[str, int, int, int], list[Product]] = {}
    for product in target.workloads:
        assert isinstance(product, Product)
        places.setdefault(product.place, []).append(product)
    for place, having in places.items():
        try:
            cases = matmul.compare(having, tile, bench)
        except (ValueError, torch.OutOfMemoryError) as error:
            console.print(f"[red]linear_edit is not compared: {escape(str(error))}[/]")
            continue
        won = matmul.wins(cases)
        if won:
            table.add_win(place, cases)
        dtype, m, n, k = place
        ratio = geometric_mean([case.ratio for case in cases])
        verdict = "[green]wins[/]" if won else "does not win"
        console.print(f"linear_edit {dtype}, m {m}, n {n}, k {k}: fused {verdict}, {ratio:.2f}x the composed form")


def _show(outcome: Outcome, console: Console) -> None:
    if outcome.won:
        spread = ", ".join(f"{case.ratio:.2f}x at {case.workload.rows} rows" for case in outcome.cases)
        console.print(
            f"{outcome.target}: [green]{_short(outcome.tile)}[/] replaces {_short(outcome.default)}: {spread}"
        )
    else:
        console.print(f"{outcome.target}: {_short(outcome.default)} stays, of {outcome.tried + 1} tiles")
    kinds = Counter(reason.partition(" (")[0] for reason in outcome.left_out.values())
    for tile, reason in outcome.left_out.items():
        kind = reason.partition(" (")[0]
        if kinds.pop(kind, 0):
            same = sum(other.partition(" (")[0] == kind for other in outcome.left_out.values())
            also = f", and {same - 1} more" if same > 1 else ""
            console.print(f"  [yellow]left out: {_short(tile)}{also}: {escape(reason)}[/]")


def _summarise(table: _Table, console: Console) -> None:
    if not table.content["entries"]:
        console.print("No tile beat its default by more than the noise.")
    shown = Table(title="Tiles that beat their default by more than the noise")
    for heading in ("rule", "arguments", "tile", "ratio"):
        shown.add_column(heading, justify="right" if heading == "ratio" else "left")
    for entry in table.content["entries"]:
        rule = tuned.RULES[entry["rule"]]
        arguments = ", ".join(f"{name} {entry[name]}" for name in rule.parameters)
        tile = None if entry["tile"] is None else rule.tile(**entry["tile"])
        shown.add_row(rule.name, arguments, _short(tile), f"{entry['ratio']:.2f}x")
    if table.content["entries"]:
        console.print(shown)
    if table.left_out:
        console.print(f"{table.left_out} tiles were left out for the reasons above.")
    console.print(f"The table: {table.path}")
    console.print(f"To use it: {tuned.VARIABLE}={table.path.resolve()}, or commit it to {tuned.FOLDER}")


def _short(tile: Any) -> str:
    return "wide rows" if tile is None else ", ".join(f"{name} {value}" for name, value in asdict(tile).items())


def _json(tile: Any) -> dict[str, Any] | None:
    return None if tile is None else asdict(tile)


def _measured(cases: Sequence[Case]) -> list[dict[str, Any]]:
    return [
        {
            "operation": case.workload.operation,
            "dtype": case.workload.dtype,
            "rows": case.workload.rows,
            "microseconds": case.tile.microseconds(),
            "default_microseconds": case.default.microseconds(),
            "ratio": round(case.ratio, 4),
        }
        for case in cases
    ]


def _check_output(output: Path, overwrite: bool) -> None:
    """Make the folder and write a file into it: an hour's measurements must not be lost at the end."""
    if output.is_dir():
        raise IsADirectoryError(f"--output: {output} is a folder, expected the name of a file")
    if output.exists() and not overwrite:
        raise FileExistsError(f"--output: {output} exists; remedy: --overwrite, or another name")
    output.parent.mkdir(parents=True, exist_ok=True)
    probe = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"--output: cannot write {output}: {error.strerror}") from error


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def _commit() -> str | None:
    """The commit of this file's checkout, with '-dirty' if files were changed; None elsewhere."""
    folder = str(Path(__file__).parent)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
