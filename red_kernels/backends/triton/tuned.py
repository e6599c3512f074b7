"""Tables of measured launch rules, which override the factories of :mod:`.rules`.

``red-kernels bench --tune`` measures a table on a device and writes it: a JSON file for one architecture. It is part of
the package as ``tables/sm_90.json``, or named by the variable RED_KERNELS_TRITON_TABLE, which replaces the package's.
A table is read once, at the first use of a rule on such a device, and checked completely: an invalid one raises
ValueError. ``tables/README.md`` explains the fields.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

VARIABLE = "RED_KERNELS_TRITON_TABLE"
FORMAT = 1
FOLDER = Path(__file__).parent / "tables"
MOST_THREADS = 1024  # of a program
MOST_ELEMENTS = 1 << 20  # of a tile, Triton's own limit
DTYPES = ("float32", "tf32", "bfloat16", "float16")  # of matrix products: tf32 is float32 multiplied as TF32

P = ParamSpec("P")
T = TypeVar("T")
Check = Callable[[Any, Mapping[str, Any], int], "str | None"]
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Rule:
    """A factory, and the conditions on tiles that may replace its own.

    ``parameters`` are its arguments except the architecture, int or str: with the name, the key of a table's entries.
    ``optional``: it may return None. ``check(tile, key, warp)``: the fault of a tile, or None.
    """

    name: str
    factory: Callable[..., Any]
    tile: type
    parameters: Mapping[str, type]
    optional: bool
    check: Check


RULES: dict[str, Rule] = {}  # by name; filled next to the factories


@dataclass(frozen=True)
class Table:
    """The content of a file: tiles by ``(rule, *key)``, and the wins of the fused matmul by (dtype, m, n, k)."""

    path: Path
    architecture: str
    warp: int
    device: str
    date: str
    versions: Mapping[str, str | None]
    tiles: Mapping[Key, Any]
    linear_wins: frozenset[tuple[str, int, int, int]]


def whole_rows(*, persistent: bool = False, one_row: bool = False) -> Check:
    """The check of a RowTile: it must cover the width exactly, with no piece beyond it."""

    def check(tile: Any, key: Mapping[str, Any], warp: int) -> str | None:
        width = key["width"]
        if tile.chunk * tile.chunks < width:
            return f"{tile.chunks} pieces of {tile.chunk} columns are fewer than the width {width}"
        if tile.chunk * (tile.chunks - 1) >= width:
            return f"the last of {tile.chunks} pieces of {tile.chunk} columns lies beyond the width {width}"
        if one_row and tile.rows != 1:
            return f"rows is {tile.rows}, and these kernels take one row at a time"
        return _common(tile, width, warp, persistent)

    return check


def slabs(*, persistent: bool = False) -> Check:
    """The check of a SlabTile; any number of slabs covers the width."""

    def check(tile: Any, key: Mapping[str, Any], warp: int) -> str | None:
        return _common(tile, key["width"], warp, persistent)

    return check


def blocks(tile: Any, key: Mapping[str, Any], warp: int) -> str | None:
    """The check of a LinearTile."""
    for name in ("block_m", "block_n", "block_k", "group", "warps"):
        if not _power_of_two(getattr(tile, name)):
            return f"{name} is {getattr(tile, name)}, expected a power of two"
    for name in ("block_m", "block_n", "block_k"):
        if getattr(tile, name) < 16:
            return f"{name} is {getattr(tile, name)}, expected at least 16 in a matrix product"
    if tile.splits < 0 or tile.block_n >> tile.splits < 16:
        return f"splits is {tile.splits}, and {tile.block_n} columns are split into pieces of 16 and more"
    if tile.stages < 1:
        return f"stages is {tile.stages}, expected 1 or more"
    return _size(tile.warps, tile.block_m, tile.block_n, warp)


def tuned(tile: type, check: Check, *, optional: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a factory: a table overrides it. Results are cached: a repeated call costs as before."""

    def decorate(factory: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(factory, eval_str=True)
        parameters = {name: p.annotation for name, p in signature.parameters.items() if name != "architecture"}
        rule = RULES[factory.__name__] = Rule(factory.__name__, factory, tile, parameters, optional, check)

        @lru_cache(None)
        @wraps(factory)
        def found(*arguments: P.args, **named: P.kwargs) -> T:
            values = signature.bind(*arguments, **named).arguments
            if _forced is not None:
                _asked.append((rule.name, *(values[name] for name in parameters)))
                return _forced[rule.name] if rule.name in _forced else factory(*arguments, **named)
            architecture = values["architecture"]
            table = table_for(architecture.name, architecture.warp)
            key = (rule.name, *(values[name] for name in parameters))
            return table.tiles[key] if table is not None and key in table.tiles else factory(*arguments, **named)

        _caches.append(found.cache_clear)
        return cast(Callable[P, T], found)

    return decorate


def linear_wins(dtype: str, m: int, n: int, k: int, architecture: Any) -> bool:
    """Whether the fused matmul was measured to beat the composed form for ``(m, k) @ (n, k).T``.

    ``dtype`` is one of ``DTYPES``; ``m`` is rounded to its bucket, see :func:`bucket`.
    """
    if _forced is not None:
        return False
    table = table_for(architecture.name, architecture.warp)
    return table is not None and (dtype, bucket(m), n, k) in table.linear_wins


def bucket(m: int) -> int:
    """The bucket of ``m`` in ``linear_wins``: the least power of two that is at least ``m``."""
    return 1 << max(0, m - 1).bit_length()


@lru_cache(None)
def table_for(architecture: str, warp: int) -> Table | None:
    """The table for devices of an architecture: the user's own, else the package's, else None.

    Raises ValueError if the file is not a table for this architecture, and FileNotFoundError if the user's is missing.
    """
    own = os.environ.get(VARIABLE)
    path = Path(own) if own else FOLDER / f"{architecture}.json"
    if own and not path.is_file():
        raise FileNotFoundError(f"{VARIABLE}: the file {own!r} does not exist")
    if not path.is_file():
        return None
    source = f"{VARIABLE}: {own}" if own else str(path)
    table = parse(path.read_bytes(), source, path)
    if table.architecture != architecture:
        raise ValueError(f"{source} is a table for {table.architecture!r}, and this device is {architecture!r}")
    if table.warp != warp:
        raise ValueError(f"{source} is a table for warps of {table.warp} threads, and this device has {warp}")
    return table


@contextmanager
def forcing(tiles: Mapping[str, Any]) -> Iterator[list[Key]]:
    """In a ``with`` block rules return the tiles named here, whatever their arguments, else their factories' own.

    The block's list grows by each requested ``(rule, *arguments)``, once. This is for measuring: no table is read, and
    no other thread may launch kernels at the same time.
    """
    global _forced, _asked
    unknown = sorted(set(tiles) - set(RULES))
    if unknown:
        raise ValueError(f"tiles got {', '.join(unknown)}, expected names out of {', '.join(RULES)}")
    before = _forced, _asked
    _forced, _asked = dict(tiles), []
    _clear()
    try:
        yield _asked
    finally:
        _forced, _asked = before
        _clear()


def forget() -> None:
    """Forget tables and tiles: files and the variable are read again at the next use."""
    table_for.cache_clear()
    _clear()


def parse(text: str | bytes, source: str, path: Path) -> Table:
    """Read a table from JSON. Raises ValueError naming ``source``, the entry, what came and what was expected."""
    try:
        content = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:  # the latter for deep nesting
        raise ValueError(f"{source}: cannot be read as JSON: {error}") from None
    found = _fields(content, source, _TABLE)
    if found["format"] != FORMAT:
        raise ValueError(f"{source}: format is {found['format']}, and this version reads {FORMAT}")
    versions = _fields(found["versions"], f"{source}: versions", _VERSIONS)
    tiles: dict[Key, Any] = {}
    for number, entry in enumerate(found["entries"]):
        key, tile = _entry(entry, f"{source}: entry {number}", found["warp"])
        if key in tiles:
            raise ValueError(f"{source}: entry {number}: a second one for {key}")
        tiles[key] = tile
    wins: set[tuple[str, int, int, int]] = set()
    for number, entry in enumerate(found["linear_wins"]):
        win = _win(entry, f"{source}: linear_wins {number}")
        if win in wins:
            raise ValueError(f"{source}: linear_wins {number}: a second one for {win}")
        wins.add(win)
    return Table(
        path, found["architecture"], found["warp"], found["device"], found["date"], versions, tiles, frozenset(wins)
    )


def tile_error(rule: Rule, tile: Any, key: Mapping[str, Any], warp: int) -> str | None:
    """The fault of a tile for a rule's arguments ``key`` on a device with ``warp`` threads in a warp, or None."""
    if tile is None:
        return None if rule.optional else "tile is null, expected an object"
    return rule.check(tile, key, warp)


def _common(tile: Any, width: int, warp: int, persistent: bool) -> str | None:
    for name in ("rows", "chunk", "warps"):
        if not _power_of_two(getattr(tile, name)):
            return f"{name} is {getattr(tile, name)}, expected a power of two"
    if tile.chunk < min(4, bucket(width)):
        return f"chunk is {tile.chunk}, and dropout takes columns by fours"
    if persistent and tile.programs < 1:
        return f"programs is {tile.programs}, expected 1 or more in a persistent grid"
    if not persistent and tile.programs:
        return f"programs is {tile.programs}, expected 0: each tile has a program"
    return _size(tile.warps, tile.rows, tile.chunk, warp)


def _size(warps: int, rows: int, columns: int, warp: int) -> str | None:
    if warps * warp > MOST_THREADS:
        return f"{warps} warps of {warp} threads are more than {MOST_THREADS}"
    if rows * columns > MOST_ELEMENTS:
        return f"{rows} rows of {columns} columns are more than {MOST_ELEMENTS} elements"
    return None


def _power_of_two(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def _entry(entry: Any, where: str, warp: int) -> tuple[Key, Any]:
    name = entry.get("rule") if isinstance(entry, dict) else None
    rule = RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        if isinstance(entry, dict) and name is not None:
            raise ValueError(f"{where}: rule is {name!r}, expected one of {', '.join(RULES)}")
        raise ValueError(f"{where}: the field 'rule' is missing, expected one of {', '.join(RULES)}")
    where = f"{where} ({name})"
    found = _fields(entry, where, {"rule": str, **rule.parameters, **_MEASURED})
    key = {parameter: found[parameter] for parameter in rule.parameters}
    for parameter, value in key.items():
        if isinstance(value, int) and value < (0 if parameter == "sums" else 1):
            raise ValueError(f"{where}: {parameter} is {value}, expected a positive number")
    where = f"{where}, {', '.join(f'{parameter} {value}' for parameter, value in key.items())}"
    tile = _tile(rule, found["tile"], f"{where}: tile")
    _tile(rule, found["default"], f"{where}: default")
    reason = tile_error(rule, tile, key, warp)
    if reason is not None:
        raise ValueError(f"{where}: {reason}")
    _times(found, where, _CASE)
    return (rule.name, *key.values()), tile


def _win(entry: Any, where: str) -> tuple[str, int, int, int]:
    found = _fields(entry, where, {"dtype": str, "m": int, "n": int, "k": int, "ratio": float, "measured": list})
    dtype, m, n, k = found["dtype"], found["m"], found["n"], found["k"]
    if dtype not in DTYPES:
        raise ValueError(f"{where}: dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    for name, value in (("m", m), ("n", n), ("k", k)):
        if value < 1:
            raise ValueError(f"{where}: {name} is {value}, expected a positive number")
    if m != bucket(m):
        raise ValueError(f"{where}: m is {m}, expected a power of two, which covers the numbers above its half")
    _times(found, where, _CASE)
    return dtype, m, n, k


def _tile(rule: Rule, value: Any, where: str) -> Any:
    if value is None and rule.optional:
        return None
    return rule.tile(**_fields(value, where, {field.name: int for field in fields(rule.tile)}))


def _times(found: Mapping[str, Any], where: str, case: Mapping[str, type]) -> None:
    """Check the measurements. They are for people, but a file with wrong ones is not from the search."""
    if not 0 < found["ratio"] < math.inf:
        raise ValueError(f"{where}: ratio is {found['ratio']}, expected a positive number")
    if not found["measured"]:
        raise ValueError(f"{where}: measured is empty")
    for number, value in enumerate(found["measured"]):
        place = f"{where}: measured {number}"
        measured = _fields(value, place, case)
        for name in ("microseconds", "default_microseconds"):
            for quartile, seconds in _fields(measured[name], f"{place}: {name}", _QUARTILES).items():
                if not 0 <= seconds < math.inf:
                    raise ValueError(f"{place}: {name}: {quartile} is {seconds}, expected a finite number")


def _fields(value: Any, where: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an object, which has to have exactly those expected, of their types."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {_shown(value)}, expected an object with {', '.join(expected)}")
    for name in value:
        if name not in expected:
            raise ValueError(f"{where}: unknown field {name!r}, expected {', '.join(expected)}")
    for name, kind in expected.items():
        if name not in value:
            raise ValueError(f"{where}: {name} is missing")
        if not _is(value[name], kind):
            raise ValueError(f"{where}: {name} is {_shown(value[name])}, expected {_NAMES[kind]}")
    return dict(value)


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:60]
    except RecursionError:
        return f"a {type(value).__name__}, nested too deeply to show"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a field is given twice among {', '.join(name for name, _ in pairs)}")
    return found


def _is(value: Any, kind: Any) -> bool:
    if kind is object:
        return True
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _clear() -> None:
    for clear in _caches:
        clear()


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
    object: "anything",
    str | None: "a text or null",
}
_TABLE = {
    "format": int,
    "architecture": str,
    "warp": int,
    "device": str,
    "multiprocessors": int,
    "versions": dict,
    "date": str,
    "measuring": str,
    "entries": list,
    "linear_wins": list,
}
_VERSIONS: dict[str, Any] = {"torch": str, "triton": str, "red_kernels": str, "commit": str | None}
_MEASURED: dict[str, Any] = {"tile": object, "default": object, "ratio": float, "measured": list}
_CASE = {
    "operation": str,
    "dtype": str,
    "rows": int,
    "microseconds": dict,
    "default_microseconds": dict,
    "ratio": float,
}
_QUARTILES = {"low": float, "median": float, "high": float}
_forced: dict[str, Any] | None = None
_asked: list[Key] = []
_caches: list[Callable[[], None]] = []
