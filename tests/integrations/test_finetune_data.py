"""The command on each form of data."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from finetune_helpers import causal, classify, make_folders, record, results, trained_tensors
from transformers import AutoTokenizer

from red_kernels import cli

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = make_folders(tmp_path_factory.mktemp("tiny"))
    tokenizer = AutoTokenizer.from_pretrained(found["llama"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(found["llama"])
    return found


def rows(path: Path, found: list[dict[str, object]]) -> Path:
    text = "\n".join(map(json.dumps, found)).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def chat(number: int) -> dict[str, object]:
    said = [("user", f"q{number}"), ("assistant", f"a{number % 3}!")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def run(arguments: list[str], *more: str) -> None:
    assert cli.main([*arguments, "--no-compare", *more]) == 0


def test_conversations(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files, one of them compressed; the loss is on the answers, and a sample is asked by the chat template."""
    files = [
        rows(tmp_path / "a.jsonl", list(map(chat, range(12)))),
        rows(tmp_path / "b.jsonl.gz", list(map(chat, range(12, 24)))),
    ]
    arguments = causal(folders, tmp_path / "out", "--steps", "8", "--lr", "3e-2", "--length", "64", "--sample", "q1")
    arguments[arguments.index("--data") + 1 : arguments.index("--data") + 2] = map(str, files)
    run(arguments)
    shown = capsys.readouterr().out
    assert "conversations to train on" in shown
    assert "with a loss" in shown
    found = results(tmp_path / "out")
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["after"]["targets"] < 64  # of the answers alone
    assert record(tmp_path / "out")["settings"]["data"] == list(map(str, files))


def test_a_template_of_ones_own(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is used for the data and for samples, and a resumed run, `evaluate` and `generate` know it."""
    data = rows(tmp_path / "chat.jsonl", list(map(chat, range(12))))
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}[/]{% endfor %}")
    arguments = causal({**folders, "text": data}, tmp_path / "out", "--steps", "2", "--sample", "q1")
    run(arguments, "--template", str(template))
    own = results(tmp_path / "out")
    run(causal({**folders, "text": data}, tmp_path / "other", "--steps", "2"))
    assert own["after"]["targets"] != results(tmp_path / "other")["after"]["targets"]
    assert cli.main(["evaluate", str(tmp_path / "out"), "--device", "cpu", "--json", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["with edits"]["targets"] == own["after"]["targets"]
    capsys.readouterr()
    asked = ["--prompt", "q1", "--new-tokens", "48", "--device", "cpu"]
    for source in (tmp_path / "out", tmp_path / "out" / "edits"):
        assert cli.main(["generate", str(source), *asked]) == 0
        assert capsys.readouterr().out == own["samples"][-1]["text"] + "\n"
    assert cli.main(["generate", str(tmp_path / "out"), f"other={tmp_path / 'other'}", *asked]) == 0
    both = capsys.readouterr().out
    assert cli.main(["generate", str(tmp_path / "other"), *asked]) == 0
    assert both == f"out: {own['samples'][-1]['text']}\nother: {capsys.readouterr().out}"

    assert cli.main([*arguments, "--template", "nowhere", "--overwrite"]) == cli.EXIT_ERROR
    assert "template: 'nowhere' cannot be read" in capsys.readouterr().err
    template.write_text(template.read_text().replace("[/]", "[//]"))
    assert cli.main(["finetune", "--output", str(tmp_path / "out"), "--resume", "--steps", "3"]) == cli.EXIT_ERROR
    assert "template.jinja' differs from the start of the run in" in capsys.readouterr().err


def test_packed_conversations_are_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    """Packed, all of them in one step: the same gradients, and so the same edits, as padded ones."""
    data = rows(tmp_path / "chat.jsonl", list(map(chat, range(16))))
    held = rows(tmp_path / "held.jsonl", list(map(chat, range(50, 54))))
    for name, more in (("padded", ("--batch-size", "16")), ("packed", ("--packing", "--batch-size", "16"))):
        arguments = causal({**folders, "text": data}, tmp_path / name, "--steps", "2", "--length", "64", *more)
        run(arguments, "--validation", str(held))
    one, other = (trained_tensors(tmp_path / name / "edits") for name in ("padded", "packed"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)
    padded, packed = (results(tmp_path / name) for name in ("padded", "packed"))
    assert packed["after"]["targets"] == padded["after"]["targets"]
    assert packed["after"]["loss"] == pytest.approx(padded["after"]["loss"], rel=1e-4)


def test_completions_with_the_loss_on_all(folders: dict[str, Path], tmp_path: Path) -> None:
    data = rows(tmp_path / "pairs.jsonl", [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(20)])
    counts = {}
    for loss_on in ("answers", "all"):
        run(causal({**folders, "text": data}, tmp_path / loss_on, "--steps", "2", "--loss-on", loss_on))
        counts[loss_on] = results(tmp_path / loss_on)["after"]["targets"]
    assert 0 < counts["answers"] < counts["all"]


def test_regression(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(
        tmp_path / "scores.jsonl", [{"text": "ab"[n % 2] * 8 + str(n), "label": n % 2 + 0.5} for n in range(60)]
    )
    arguments = classify({**folders, "table": data}, tmp_path / "out", "--steps", "40", "--lr", "2e-2")
    arguments[arguments.index("classification")] = "regression"
    run(arguments)
    after = results(tmp_path / "out")["after"]
    assert after["pearson"] > 0.7
    assert after["accuracy"] is None
    assert "Held-out correlation" in capsys.readouterr().out


def test_preferences(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DPO by TRL. Before the training the loss is log 2 and no answer is preferred; another process resumes it."""
    pytest.importorskip("trl")
    pairs = [{"prompt": f"q{n}", "chosen": f"yes {n % 3}", "rejected": f"no {n % 3}"} for n in range(40)]
    data = rows(tmp_path / "pairs.jsonl", pairs)
    output = tmp_path / "out"
    more = ("--lr", "3e-2", "--length", "32", "--save-every", "4", "--eval-every", "4")
    run(causal({**folders, "text": data}, output, "--steps", "8", *more))
    found = results(output)
    assert found["before"]["loss"] == pytest.approx(math.log(2))
    assert found["before"]["accuracy"] == 0
    assert found["before"]["targets"] == 4
    assert found["after"]["loss"] < 0.6
    assert found["after"]["accuracy"] == 1
    assert found["reloaded"] == found["after"]
    assert "36 pairs of answers to train on, 4 held out" in capsys.readouterr().out
    assert cli.main(["finetune", "--output", str(output), "--resume", "--steps", "12"]) == 0
    assert results(output)["steps"] == 12


@pytest.mark.parametrize(("row", "more", "message"), [
    ({"text": "a"}, ("--packing",), "packing: needs conversations or completions, but the data's form is 'text'"),
    ({"messages": [{"role": "user"}]}, (), "line 1"),
])  # fmt: skip
def test_what_does_not_fit(
    row: dict[str, object], more: tuple[str, ...], message: str, folders: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    found = [
        {name: f"{value}{n}" if isinstance(value, str) else value for name, value in row.items()} for n in range(9)
    ]
    data = rows(tmp_path / "data.jsonl", found)
    assert cli.main(causal({**folders, "text": data}, tmp_path / "out", *more)) == cli.EXIT_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_labelled_text_without_a_token(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer puts nothing around a text, so that nothing is left of an empty one."""
    table = tmp_path / "reviews.csv"
    table.write_text("text,label\n" + "".join(f"word {n},{n % 2}\n" for n in range(20)) + '"",1\n')
    arguments = classify({**folders, "table": table}, tmp_path / "out", "--steps", "1")
    assert cli.main(arguments) == cli.EXIT_ERROR
    assert "data: reviews.csv, line 22: the text '' has no token" in capsys.readouterr().err
