"""Rows of files: CSV, TSV, JSON, JSON Lines and Parquet, plain or compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...support.parse import parse_json, shown
from ...support.require import require
from .examples import Columns

FILE_TYPES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        where: names the row in messages.
        values: of the columns, by name.
        separated: whether it is from a CSV or TSV file, whose first row may be data.
    """

    where: str
    values: dict[str, Any]
    separated: bool = False


def file_type(path: Path) -> tuple[str, str]:
    """One of `FILE_TYPES` and one of `COMPRESSIONS`, from the name of a file; either may be empty."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes and suffixes[-1] in FILE_TYPES else ""), compression


def read_rows(path: Path, columns: Columns) -> Iterable[Row]:
    """The rows of a table of any type but plain text.

    Raises:
        ModuleNotFoundError: a package for this type is missing.
        ValueError: the file is damaged or not UTF-8, or a row is invalid; the message names the row.
    """
    suffix, _ = file_type(path)
    if suffix in (".csv", ".tsv"):
        return _separated_rows(path, suffix, columns)
    if suffix == ".jsonl":
        return _json_lines(path.name, read_text(path))
    if suffix == ".json":
        return _json_rows(path)
    return _parquet_rows(path)


def read_text(path: Path, newline: str | None = None) -> str:
    """A file's text, uncompressed. Raises ValueError if it is not UTF-8."""
    try:
        return io.TextIOWrapper(io.BytesIO(_content(path)), encoding="utf-8-sig", newline=newline).read()
    except UnicodeDecodeError as error:
        raise ValueError(f"data: {str(path)!r} is not UTF-8 text: {error}") from error


def _content(path: Path) -> bytes:
    _, compression = file_type(path)
    content = path.read_bytes()
    if not compression:
        return content
    unpack: Callable[[bytes], bytes]
    if compression == ".zst":
        arrow: Any = require("pyarrow", "reading a .zst file", "pyarrow")
        unpack = lambda content: arrow.CompressedInputStream(arrow.BufferReader(content), "zstd").read()  # noqa: E731
    else:
        unpack = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}[compression]
    try:
        return unpack(content)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"data: {str(path)!r} is damaged or no {compression} file: {error}") from error


def _separated_rows(path: Path, suffix: str, columns: Columns) -> Iterable[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than some documents
    # csv's lines end only in CR and LF: str.splitlines also splits at U+2028, form feeds and others.
    lines = io.StringIO(read_text(path, newline=""), newline="")
    if suffix == ".csv":
        reader = csv.reader(lines, strict=True)
    else:
        # text/tab-separated-values has no quoting: a quotation mark at the start of a field is text.
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    names: list[str] | None = None
    try:
        for fields in reader:
            where = f"{path.name}, line {reader.line_num}"
            if not fields:
                continue  # an empty line is not a row
            if names is None:
                names = [name.strip() for name in fields] if columns.header else [str(i) for i in range(len(fields))]
                _check_names(names, where)
                if columns.header:
                    continue
            if len(fields) != len(names):
                raise ValueError(f"data: {where}: has {len(fields)} fields, expected {len(names)}")
            yield Row(where, dict(zip(names, fields, strict=True)), True)
    except csv.Error as error:
        raise ValueError(f"data: {path.name}, line {reader.line_num}: {error}") from error


def _json_lines(name: str, text: str) -> Iterable[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{name}, line {number}"
            yield _json_row(parse_json(line, f"data: {where}", object_pairs_hook=_Object), where)


def _json_rows(path: Path) -> Iterable[Row]:
    """A list of objects, an object with exactly one list of them, or JSON Lines under the name `.json`."""
    text = read_text(path)
    try:
        found = parse_json(text, f"data: {path.name}", object_pairs_hook=_Object)
    except ValueError:
        first, _, rest = text.lstrip().partition("\n")
        if not (rest.strip() and _is_object(first)):
            raise
        return _json_lines(path.name, text)
    if isinstance(found, _Object) and not {"messages", "conversations"} & found.keys():
        _check_names(found.written, path.name)
        lists = [name for name, value in found.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise ValueError(
                f"data: {path.name}: is an object with {len(lists)} lists among {', '.join(map(repr, found))}, "
                "expected a list of objects, or an object with exactly one list of them"
            )
        found = found[lists[0]]
    rows = found if isinstance(found, list) else [found]
    return (_json_row(row, f"{path.name}, row {number}") for number, row in enumerate(rows, start=1))


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line, ""), dict)
    except ValueError:
        return False


def _json_row(row: Any, where: str) -> Row:
    if not isinstance(row, _Object):
        raise ValueError(f"data: {where}: is a {type(row).__name__}, expected an object with named entries")
    _check_names(row.written, where)
    return Row(where, row)


class _Object(dict[str, Any]):
    """An object of JSON that keeps its names as written."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.written = [name for name, _ in pairs]


def _check_names(names: Sequence[str], where: str) -> None:
    """Raises ValueError for a duplicate name: only one of the columns could be used."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise ValueError(f"data: {where}: has {shown(twice[0])} twice, expected each name once")


def _parquet_rows(path: Path) -> Iterable[Row]:
    parquet = require("pyarrow.parquet", "reading a parquet file", "pyarrow")
    source = io.BytesIO(_content(path)) if file_type(path)[1] else path
    try:
        # Of the file alone: folder names such as `label=1` would become columns.
        table = parquet.ParquetFile(source).read()
        rows = table.to_pylist()
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        raise ValueError(f"data: {str(path)!r} is damaged or no parquet file: {error}") from error
    _check_names(table.column_names, path.name)
    return (Row(f"{path.name}, row {number}", row) for number, row in enumerate(rows, start=1))
