"""Tables of measured launch rules: what is read, what is refused, and the look-up before the factories."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch_tables import SLAB, STEADY, TABLE, WHOLE

pytest.importorskip("triton")

from red_kernels.backends.arguments import Norm, Statistics, affine_edit
from red_kernels.backends.triton import launch, operations, rules, tuned
from red_kernels.backends.triton.rules import Architecture, RowTile, SlabTile

CHIP, OTHER = Architecture("sm_90", 32, 132), Architecture("sm_80", 32, 108)


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table that the variable names."""
    return _use(TABLE, tmp_path / "own.json", monkeypatch)


def _use(content: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    tuned.forget()
    return path


def _factory(name: str, *arguments: Any) -> Any:
    return tuned.RULES[name].factory(*arguments)


def test_a_table_goes_before_the_factories(table: Path) -> None:
    assert rules.norm_forward(768, 2, CHIP) == RowTile(**WHOLE) != _factory("norm_forward", 768, 2, CHIP)
    assert rules.norm_forward(4096, 2, CHIP) is None is not _factory("norm_forward", 4096, 2, CHIP)
    assert rules.norm_backward(768, 2, CHIP, 2) == RowTile(**STEADY)
    assert rules.norm_backward(width=768, itemsize=2, architecture=CHIP, sums=2).programs == 5  # type: ignore[union-attr]
    assert rules.edit_backward(768, 4, CHIP) == SlabTile(**SLAB)
    assert rules.wide_norm(768, 2, CHIP) == RowTile(**{**WHOLE, "rows": 1})
    for name, arguments in (
        ("norm_forward", (768, 4, CHIP)), ("norm_forward", (769, 2, CHIP)), ("norm_backward", (768, 2, CHIP, 3)),
        ("edit_backward", (768, 2, CHIP)), ("edit_forward", (768, 4, CHIP)), ("finish", (768, CHIP)),
    ):  # fmt: skip
        assert getattr(rules, name)(*arguments) == _factory(name, *arguments)


def test_kernels_are_launched_with_the_tiles_of_the_table(table: Path) -> None:
    launched: list[tuple[Any, ...]] = []
    with (
        launch.pretending(CHIP),
        launch.recording(lambda kernel, grid, *rest: launched.append((kernel.name, grid, *rest[2:]))),
    ):
        for width in (768, 4096):
            x = torch.ones(5, width, dtype=torch.bfloat16)
            operations.norm_edit_forward(x, Norm(x[0], None, 1e-6), affine_edit(x[0], x[0]))
        x = torch.ones(4096, 768, dtype=torch.bfloat16)
        statistics = Statistics(None, x[:, 0].float())
        operations.norm_edit_backward(
            x, x, Norm(None, None, 1e-6), affine_edit(x[0]), statistics, 1, (True, False, False, True, True)
        )
    narrow, wide, backward, _ = launched
    assert narrow[:3] == ("norm_forward", (3, 1, 1), (768, 2, 256, 3, True))
    assert narrow[3] == 2
    assert wide[:2] == ("wide_forward", (5, 1, 1))
    assert backward[:2] == ("norm_backward", (5 * 132, 1, 1))


def test_the_package_has_tables_and_the_users_own_replaces_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tables")
    (tmp_path / "tables" / "sm_90.json").write_text(json.dumps(TABLE))
    assert rules.norm_forward(768, 2, CHIP) == RowTile(**WHOLE)
    assert rules.norm_forward(768, 2, OTHER) == _factory("norm_forward", 768, 2, OTHER)
    _use({**TABLE, "entries": []}, tmp_path / "own.json", monkeypatch)
    assert rules.norm_forward(768, 2, CHIP) == _factory("norm_forward", 768, 2, CHIP)


def test_tables_in_the_package_are_right() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        read = tuned.parse(path.read_bytes(), str(path), path)
        assert read.architecture == path.stem


def test_a_table_is_read_once_and_a_warmed_rule_looks_nowhere(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules.norm_forward(768, 2, CHIP)
    table.write_text("no table")
    rules.norm_forward(4096, 2, CHIP)  # another rule of the table that was read
    with monkeypatch.context() as patched:
        patched.setattr(tuned, "table_for", None)
        assert rules.norm_forward(768, 2, CHIP) == RowTile(**WHOLE)


def _changed(where: tuple[Any, ...], value: Any) -> Any:
    """The table with the value at some place replaced, or taken away where it is `...`."""
    content: Any = json.loads(json.dumps(TABLE))  # nothing of it in two places
    inner = content
    for step in where[:-1]:
        inner = inner[step]
    if value is ...:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return content


E0, E2, E3, E4 = (("entries", number) for number in (0, 2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "cannot be read as JSON"),
        ('{"format": 1, "format": 1}', "a field is given twice"),
        ([], r"got \[\], expected an object with format, architecture"),
        (_changed(("surplus",), 1), "unknown field 'surplus', expected format"),
        (_changed(("device",), ...), "device is missing"),
        (_changed(("format",), 2), "format is 2, and this version reads 1"),
        (_changed(("format",), True), "format is true, expected a whole number"),
        (_changed(("versions", "torch"), 2), "versions: torch is 2, expected a text"),
        (_changed(("warp",), 64), "is a table for warps of 64 threads, and this device has 32"),
        (_changed(("architecture",), "sm_80"), "is a table for 'sm_80', and this device is 'sm_90'"),
        (_changed(E0, 5), "entry 0: the field 'rule' is missing, expected one of norm_forward"),
        (_changed((*E0, "rule"), "norm"), "entry 0: rule is 'norm', expected one of norm_forward"),
        (_changed((*E0, "sums"), 2), r"entry 0 \(norm_forward\): unknown field 'sums'"),
        (_changed((*E2, "sums"), ...), r"entry 2 \(norm_backward\): sums is missing"),
        (_changed((*E2, "sums"), -1), r"entry 2 \(norm_backward\): sums is -1, expected a positive number"),
        (_changed((*E0, "width"), 0), r"entry 0 \(norm_forward\): width is 0, expected a positive number"),
        (_changed((*E0, "width"), 7.5), "width is 7.5, expected a whole number"),
        (_changed((*E0, "tile"), "wide"), 'width 768, itemsize 2: tile: got "wide", expected an object with rows'),
        (_changed((*E0, "tile", "stages"), 2), "tile: unknown field 'stages', expected rows, chunk, chunks, warps"),
        (_changed((*E0, "tile", "warps"), ...), "tile: warps is missing"),
        (_changed((*E0, "tile", "warps"), 4.0), "tile: warps is 4.0, expected a whole number"),
        (_changed((*E0, "tile", "warps"), 3), r"entry 0 \(norm_forward\), width 768, itemsize 2: warps is 3, expected"),
        (_changed((*E0, "tile", "warps"), 64), "64 warps of 32 threads are more than 1024"),
        (_changed((*E0, "tile", "rows"), 0), "rows is 0, expected a power of two"),
        (_changed((*E0, "tile", "rows"), 8192), "8192 rows of 256 columns are more than 1048576 elements"),
        (_changed((*E0, "tile", "chunk"), 128), "3 pieces of 128 columns are fewer than the width 768"),
        (_changed((*E0, "tile", "chunk"), 512), "the last of 3 pieces of 512 columns lies beyond the width 768"),
        (_changed((*E0, "tile"), {**WHOLE, "chunk": 2, "chunks": 384}), "chunk is 2, and dropout takes columns"),
        (_changed((*E0, "tile", "programs"), 1), "programs is 1, expected 0"),
        (_changed((*E2, "tile", "programs"), 0), "programs is 0, expected 1 or more in a persistent grid"),
        (_changed((*E3, "tile"), None), "edit_backward.*tile: got null, expected an object"),
        (_changed((*E3, "tile", "programs"), 0), "edit_backward.*programs is 0, expected 1 or more"),
        (_changed((*E3, "tile", "chunk"), 96), "edit_backward.*chunk is 96, expected a power of two"),
        (_changed((*E4, "tile", "rows"), 2), "wide_norm.*rows is 2, and these kernels take one row at a time"),
        (_changed((*E0, "default", "rows"), "2"), 'default: rows is "2", expected a whole number'),
        (_changed((*E0, "ratio"), 0), "ratio is 0, expected a positive number"),
        (_changed((*E0, "ratio"), float("nan")), "ratio is nan, expected a positive number"),
        (_changed((*E0, "measured"), []), "measured is empty"),
        (_changed((*E0, "measured", 0), {}), "measured 0: operation is missing"),
        (_changed((*E0, "measured", 0, "microseconds"), {"low": 1}), "microseconds: median is missing"),
        (_changed(("entries",), [TABLE["entries"][0]] * 2), r"entry 1: a second one for \('norm_forward', 768, 2\)"),
        (_changed(("linear_wins", 0, "dtype"), "bf16"), "linear_wins 0: dtype is 'bf16', expected one of float32"),
        (_changed(("linear_wins", 0, "m"), 1000), "linear_wins 0: m is 1000, expected a power of two"),
        (_changed(("linear_wins", 0, "k"), 0), "linear_wins 0: k is 0, expected a positive number"),
        (_changed(("linear_wins",), TABLE["linear_wins"] * 2), "linear_wins 1: a second one for"),
    ],
)  # fmt: skip
def test_wrong_tables_are_refused(content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _use(content, tmp_path / "own.json", monkeypatch)
    for _ in range(2):  # the second use says it again
        with pytest.raises(ValueError, match=message) as raised:
            rules.finish(768, CHIP)
        assert f"{tuned.VARIABLE}: {path}" in str(raised.value)


def test_a_table_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(FileNotFoundError, match=rf"{tuned.VARIABLE}: the file '.*absent\.json' does not exist"):
        rules.edit_forward(8, 4, CHIP)


def test_where_the_fused_matmul_wins(table: Path) -> None:
    for m, expected in ((512, False), (513, True), (1000, True), (1024, True), (1025, False)):
        assert tuned.linear_wins("bfloat16", m, 4096, 11008, CHIP) is expected
    for dtype, n, k in (("float16", 4096, 11008), ("bfloat16", 4097, 11008), ("bfloat16", 4096, 4096)):
        assert not tuned.linear_wins(dtype, 1024, n, k, CHIP)
    with tuned.forcing({}):
        assert not tuned.linear_wins("bfloat16", 1024, 4096, 11008, CHIP)
    assert [tuned.bucket(m) for m in (1, 2, 3, 4, 5, 1023)] == [1, 2, 4, 4, 8, 1024]


def test_forcing(table: Path) -> None:
    """It holds for the block only, also after an exception, and no table counts meanwhile."""
    tile = RowTile(1, 8, 1, 1)
    with tuned.forcing({"norm_forward": tile}) as asked:
        assert rules.norm_forward(8, 4, CHIP) is tile
        assert rules.norm_forward(8, 4, CHIP) is tile
        assert rules.edit_backward(768, 4, CHIP) == _factory("edit_backward", 768, 4, CHIP)
        assert asked == [("norm_forward", 8, 4), ("edit_backward", 768, 4)]
    assert rules.norm_forward(8, 4, CHIP) == _factory("norm_forward", 8, 4, CHIP)
    assert rules.edit_backward(768, 4, CHIP) == SlabTile(**SLAB)
    with pytest.raises(KeyError), tuned.forcing({"norm_forward": tile}):
        raise KeyError
    assert rules.norm_forward(8, 4, CHIP) == _factory("norm_forward", 8, 4, CHIP)
    assert rules.edit_backward(768, 4, CHIP) == SlabTile(**SLAB)
    with (
        pytest.raises(ValueError, match="tiles got norm, expected names out of norm_forward"),
        tuned.forcing({"norm": tile}),
    ):
        pass
