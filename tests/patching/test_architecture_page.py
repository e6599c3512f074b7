"""The counts of docs/architectures.md are those of its lists, and the lists name every architecture."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import architectures as zoo
import pytest
import transformers
from architecture_page import WITHOUT_FFN
from architecture_runs import PAGE, Group, Result, read

POSITIONS = ("ffn", "attn", "more", "res")


def _tables() -> dict[str, list[list[str]]]:
    """The rows below each heading, without those of tables' heads."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            rows = found.setdefault(line.lstrip("# "), [])
        elif line.startswith("|---"):
            rows.pop()
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line[2:-2].split(" | ")])
    return found


TABLES = _tables()
COUNTS = {(row[0], row[1].strip("`")): row[2:] for row in TABLES["Counts"] if len(row) == 9}


def _sites(cell: str, position: str) -> tuple[int, int, int]:
    """How many sites of a cell were called, are fused, and are fused with the norm."""
    if position in ("more", "res"):
        told = re.match(r"(\d+) of (\d+)", cell)
        fused, called = (int(told[1]), int(told[2])) if told else (0, 0)
        return called, fused, fused if position == "res" else 0
    counts: Counter[str] = Counter()
    for part in cell.split("; "):
        named, _, outcome = part.rpartition("`: ")
        number = sum(map(int, re.findall(r"(?:^|, )(\d+) `", named)))
        if outcome != "not called":
            fused = "add" in re.split(r", | \+ ", outcome)
            counts["called"] += number
            counts["fused"] += number * fused
            counts["normed"] += number * (fused and "Norm" in outcome)
    return counts["called"], counts["fused"], counts["normed"]


def _edited(cell: str) -> bool:
    return cell[:1].isdigit()


def _counted(task: str, position: str) -> list[str]:
    rows = TABLES[task]
    cells = [row[1 + POSITIONS.index(position)] for row in rows]
    sites = [_sites(cell, position) for cell in cells]
    called, fused = sum(one[0] for one in sites), sum(one[1] for one in sites)
    return [
        str(len(rows)),
        str(sum(not row[1].startswith("not built") for row in rows)),
        str(sum(map(_edited, cells))),
        "" if position == "res" else str(sum(0 < one[0] == one[1] for one in sites)),
        "" if position == "more" else str(sum(0 < one[0] == one[2] for one in sites)),
        f"{fused} of {called} ({100 * fused / called:.1f}%)",
        str(sum("WRONG" in cell for cell in cells)),
    ]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("task", zoo.TASKS)
def test_counts_of_a_task(task: str, position: str) -> None:
    assert COUNTS[task, position] == _counted(task, position)


@pytest.mark.parametrize("position", POSITIONS)
def test_counts_of_a_position(position: str) -> None:
    (own,) = {release for release, where in COUNTS if where == position} & {_version()}
    rows = [COUNTS[task, position] for task in zoo.TASKS]
    for column, value in enumerate(COUNTS[own, position]):
        if value:
            assert int(value.split()[0]) == sum(int(row[column].split()[0]) for row in rows)


def _version() -> str:
    found = re.search(r"transformers (\S+),", PAGE.read_text())
    assert found
    return found[1]


def test_totals() -> None:
    totals = {row[0]: row[1] for row in TABLES["Architectures"]}
    rows = [row for task in zoo.TASKS for row in TABLES[task] if not row[1].startswith("not built")]
    have = [row for row in rows if _edited(row[1]) or row[0] not in WITHOUT_FFN]
    sites = [_sites(row[1], "ffn") for row in have]
    counts = [
        sum(_edited(row[1]) for row in have),
        sum(0 < one[0] == one[1] for one in sites),
        sum(0 < one[0] == one[2] for one in sites),
    ]
    shares = [f"{count} ({100 * count / len(have):.1f}%)" for count in counts]
    wrong = sum("WRONG" in " ".join(row) for row in rows)
    everything = sum(len(TABLES[task]) for task in zoo.TASKS)
    attn = COUNTS[_version(), "attn"][5]
    assert list(totals.values()) == [*map(str, (everything, len(rows), len(have))), *shares, attn, str(wrong)]
    assert [count / len(have) >= least for count, least in zip(counts, (0.97, 0.92, 0.85), strict=True)] == [True] * 3
    fused, called = map(int, re.findall(r"\d+", attn)[:2])
    assert fused >= 0.9 * called
    assert not wrong


def test_every_architecture_is_listed() -> None:
    if _version() != transformers.__version__:
        pytest.skip(f"the page is of transformers {_version()}")
    for task in zoo.TASKS:
        listed = [row[0].partition(" (")[0] for row in TABLES[task]]
        assert sorted(listed) == sorted(one.model_type for one in zoo.architectures(task))


def test_results_of_an_interrupted_run(tmp_path: Path) -> None:
    group = Group("layers.*.mlp", "ffn", "residual add", "", 3)
    result = Result("ctc", "some", "SomeForCTC", "ffn", "", ("in training, first call: far",), (group,))
    line = json.dumps(asdict(result))
    file = tmp_path / "results.jsonl"
    file.write_text(f'{{"source": "one"}}\n{line}\n{line[:40]}')
    assert read(file, of="one") == ({"source": "one"}, [result])
    assert read(file, of="other") == ({}, [])
    assert read(tmp_path / "none.jsonl") == ({}, [])
