"""Numbers and tables as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .figures import Spread

NONE = "–"


def number(value: float, digits: int = 3) -> str:
    """A number with its significant digits, and always all digits before the point."""
    if value == 0:
        return "0"
    size = abs(value)
    places = digits - 1
    while size >= 10 and places > 0:
        size /= 10
        places -= 1
    while size < 1 and places < digits + 3:
        size *= 10
        places += 1
    return f"{value:,.{places}f}"


def ratio(value: float) -> str:
    """A ratio: two decimals, and near 1 (for percents) three."""
    return f"{value:.3f}" if 0.95 < value < 1.05 else f"{value:.2f}"


def ratios(value: Spread | None) -> str:
    """A geometric mean with the least and the greatest of several."""
    if value is None:
        return NONE
    if value.count == 1:
        return ratio(value.mean)
    return f"{ratio(value.mean)} ({ratio(value.least)} to {ratio(value.greatest)})"


def numbers(value: Spread | None) -> str:
    """As :func:`ratios`, for quantities."""
    if value is None:
        return NONE
    if value.count == 1:
        return number(value.mean)
    return f"{number(value.mean)} ({number(value.least)} to {number(value.greatest)})"


def time(seconds: float) -> str:
    """A time with its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds * 1e6)} us"


def timing(value: dict[str, float]) -> str:
    """A median with its quartiles."""
    return f"{time(value['median'])} ({time(value['low'])} to {time(value['high'])})"


def mebibytes(value: float | None) -> str:
    """Bytes in MiB."""
    return NONE if value is None else f"{number(value / 2**20)} MiB"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; characters that would end a cell are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
