"""Reading what other people wrote: odd line ends, deep JSON, long lists of layers, numbers that are none."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from pathlib import Path

import pytest
import torch

import red_kernels as rk
from benchmarks import runs
from red_kernels import cli
from red_kernels.backends.triton import tuned
from red_kernels.checkpoints import infer as _infer
from red_kernels.checkpoints import vectors as _vectors
from red_kernels.checkpoints.authors import CLASSIFIER_NAME, VECTORS_NAME
from red_kernels.finetune import data, run_folder
from red_kernels.finetune.settings import Settings
from red_kernels.patching.report import PatchReport, SiteReport
from red_kernels.support import parse as _parse

DEEP = "[" * 200_000 + "]" * 200_000
# All that str.splitlines cuts at, beside the CR and LF that end a row.
CUTS = ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
TEXTS = [f"a{cut}b" for cut in CUTS] + [f"{cut}ends with it{cut}" for cut in CUTS]


def texts(path: Path) -> list[str]:
    return [document.text for document in data.load_documents(str(path), data.Columns(), False, 0.1)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_are_cut_at_line_ends_alone(name: str, end: str, tmp_path: Path) -> None:
    content = io.StringIO(newline="")
    if name == "a.jsonl":
        content.write("".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in TEXTS))
    else:
        content.write(f"id{',' if name == 'a.csv' else chr(9)}text{end}")
        style = {} if name == "a.csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        csv.writer(content, lineterminator=end, **style).writerows(enumerate(TEXTS))
    (tmp_path / name).write_bytes(content.getvalue().encode())
    assert texts(tmp_path / name) == TEXTS


def test_line_ends_inside_of_a_quoted_field_stay(tmp_path: Path) -> None:
    wanted = ["one\r\ntwo", "one\ntwo", "one\rtwo", "\u2028\r\n\f"]
    rows = "".join(f'"{text}"\r\n' for text in wanted)
    (tmp_path / "a.csv").write_bytes(f"text\r\n{rows}".encode())
    assert texts(tmp_path / "a.csv") == wanted


def test_a_plain_text_keeps_its_characters(tmp_path: Path) -> None:
    text = "".join(TEXTS) * 20
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(texts(tmp_path / "a.txt")) == text


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: 'text' is no text that UTF-8 can encode"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("labels", [["1" * 5000, "2"], ["²", "3"], ["٣", "4"], ["+1", "1", "01"]])
def test_labels_of_odd_digits(labels: list[str]) -> None:
    """They are numbered by name, or by number and name, and always in one way."""
    found = data.label_numbers(data.Document("t", "n", "g", label) for label in reversed(labels))
    assert found == {label: number for number, label in enumerate(sorted(labels))}


# ---- JSON


def read_table(path: Path) -> object:
    return tuned.parse(path.read_bytes(), str(path), path)


def read_run(path: Path) -> object:
    return run_folder.open_run(path.parent, Settings(resume=True))


READERS = {
    "a.jsonl": texts,
    "run.json": read_run,
    "ops.json": runs.read,
    "table.json": read_table,
    "any.json": _parse.read_json,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content",
    [
        DEEP.encode(),
        DEEP.replace("[", '{"a":').replace("]", "}").encode().replace(b":}", b":1}", 1),
        b"9" * 5000,
        b'{"a": ',
        b'{"a": "\xff"}',
        b"[1]",
        b"null",
    ],
    ids=["deep list", "deep object", "5,000 digits", "cut", "no UTF-8", "a list", "null"],
)
def test_damaged_json_names_the_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        READERS[name](tmp_path / name)
    assert type(caught.value) is ValueError
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("missing", ["job", "quick", "environment", "settings", "missing", "failed", "cases"])
def test_results_out_of_form(missing: str, tmp_path: Path) -> None:
    whole = {"schema": 1, "job": "ops", "quick": False, "environment": {}, "settings": {}, "missing": {}}
    whole |= {"failed": [], "cases": []}
    (tmp_path / "ops.json").write_text(json.dumps(whole))
    assert runs.read(tmp_path / "ops.json") == whole
    for change in ({name: value for name, value in whole.items() if name != missing}, whole | {missing: 3}):
        (tmp_path / "ops.json").write_text(json.dumps(change))
        with pytest.raises(ValueError, match=rf"ops\.json is not a file of results: its {missing} is"):
            runs.read(tmp_path / "ops.json")


# ---- layers


@pytest.mark.parametrize(
    "layers",
    [range(10**12), range(0, -(10**12), -1), itertools.count(), (0 for _ in itertools.count()), range(100_001)],
    ids=["range", "downwards", "count", "one for ever", "one too many"],
)
def test_more_layers_than_a_model_can_have(layers: object) -> None:
    with pytest.raises(ValueError, match=r"layers: got .*, expected at most 100,000"):
        rk.RedConfig(layers=layers)


def test_layers_at_the_limit() -> None:
    assert len(rk.RedConfig(layers=range(100_000)).layers) == 100_000
    assert rk.RedConfig(layers=[10**12]).layers == (10**12,)
    with pytest.raises(ValueError, match=r"sites: got .*, expected at most 100,000"):
        rk.RedConfig(sites=itertools.repeat("*.down_proj"))


@pytest.mark.parametrize(
    "text",
    ["0-99999999999", "0-100000", "0-60000,60000-100001", "99999999999-999999999999", "9" * 5000, f"0-{'9' * 5000}"],
)
def test_more_layers_on_the_command_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune", f"--layers={text}"])
    error = capsys.readouterr().err
    assert "argument --layers: got" in error
    assert len(error) < 4000


@pytest.mark.parametrize("text", ["²", "1-²", "٣", "1_0", "+1", "1.0", "１"])
def test_digits_that_are_not_ascii(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["finetune", f"--layers={text}"])
    assert "expected layer indices such as 0-5,8" in capsys.readouterr().err


# ---- numbers in the names of sites

ODD = ["²", "٣", "１", "9" * 5000, "1_0", "+1", " 1", "", "1²"]


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_number_is_text(odd: str) -> None:
    assert _parse.layer_number(odd) is None
    names = ["layers.10.ffn", "layers.9.ffn", f"layers.{odd}.ffn"]
    assert sorted(names, key=_vectors.by_layer) == names[::-1]
    report = PatchReport("M", rk.RedConfig(), (SiteReport(f"layers.{odd}.ffn", 4, None),), 1, 1)
    assert f"layers.{odd}.ffn" in str(report)


@pytest.mark.parametrize("odd", ODD[:4])
def test_a_site_with_an_odd_number(odd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"model.layers.{number}.mlp.down_proj.delta_vector" for number in ("0", odd)]
    state = {f"{name}.activation_{part}": torch.ones(1, 4) for name in names for part in ("scaling", "bias")}
    torch.save(state, tmp_path / VECTORS_NAME)
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == cli.EXIT_ERROR
    error = capsys.readouterr().err
    assert f"{VECTORS_NAME}: the site 'model.layers." in error
    assert "names no layer" in error
    assert not (tmp_path / "out").exists()


def test_layers_told_from_names() -> None:
    site = _infer._layer_site("encoder.block.3.layer.1.wo")
    assert site == ("encoder.block.", 3, "layer.1.wo")
    assert _infer._layer_site("3") == ("", 3, "")
    assert _infer._layer_site("a3.b") is None


# ---- code in files


class Bomb:
    """Unpickled, it makes the file that its argument names."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", [VECTORS_NAME, CLASSIFIER_NAME])
def test_a_pickle_runs_no_code(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = "model.layers.0.mlp.down_proj.delta_vector.activation"
    good = {f"{site}_scaling": torch.ones(1, 4), f"{site}_bias": torch.ones(1, 4)}
    torch.save(good, tmp_path / VECTORS_NAME)
    torch.save({"a": Bomb(tmp_path / "ran")}, tmp_path / name)
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == cli.EXIT_ERROR
    assert f"{name}: is damaged, or torch.load cannot read it safely" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
