"""PEFT's scoreboard: its reading of answers, its order of data, and a run of a tiny model that ends in its form."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_folders
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from benchmarks.scoreboard import __main__ as program
from benchmarks.scoreboard import training
from benchmarks.scoreboard.answers import accuracy, final_answer, same_answer
from benchmarks.scoreboard.data import BUCKET, Data, batches, load
from benchmarks.scoreboard.results import file_of
from benchmarks.scoreboard.settings import Settings


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is 16.\nThe answer is: 16", "16"),
        ("The answer is: 3. No. The answer is: 4", "4"),
        ("6*7 = <<6*7=42>>42\n#### 42", "42"),
        ("The answer is: $1.50.", "1.50"),
        ("The answer is 50%", "50"),
        ("The final answer is: 7\nQuestion: and then?", "7"),
        ("The answer is: \\frac{1}{2}", "\\frac{1}{2}"),
        ("no answer at all", None),
        ("", None),
    ],
)
def test_final_answers(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("16", "16.0", True),
        ("20/35", "0.5714285714285714", True),
        ("1/0", "1/0", True),  # no number, and the same text
        ("x + 1", "x + 1", True),
        ("16", "sixteen", False),
        ("1/2/3", "1", False),
        (None, None, False),
        ("3", None, False),
    ],
)
def test_equal_answers(one: str | None, other: str | None, same: bool) -> None:
    assert same_answer(one, other) is same


def test_accuracy() -> None:
    assert accuracy(["The answer is: 3", "The answer is: 5", "hm"], ["#### 3", "#### 4", "#### 1"]) == 1 / 3
    with pytest.raises(ValueError, match="has no final answer"):
        accuracy(["The answer is: 3"], ["three"])
    with pytest.raises(ValueError, match="expected one for each of 2"):
        accuracy(["a"], ["#### 1", "#### 2"])


def test_batches_are_in_order_and_alike_in_length() -> None:
    items = [{"input_ids": [0] * (1 + (7 * number) % 50), "number": number} for number in range(2 * BUCKET + 3)]
    whole = list(itertools.islice(batches(items, 2), BUCKET + 2))
    lengths = [len(item["input_ids"]) for batch in whole[:BUCKET] for item in batch]
    assert lengths == sorted(lengths, reverse=True)  # so that too little memory is met at once
    assert {item["number"] for batch in whole[:BUCKET] for item in batch} == set(range(2 * BUCKET))
    assert {item["number"] for batch in whole for item in batch} == set(range(len(items)))
    again = list(itertools.islice(batches(items, 2), BUCKET + 3))
    assert again[-1] == whole[0]  # the next pass


# ---- data


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    sums = [{"query": f"{a}+{b}?", "response": f" The answer is: {a + b}"} for a in range(4) for b in range(3)]
    judged = [{"query": row["query"], "response": f"#### {row['response'][16:]}"} for row in sums]
    texts = [{"text": "A text of another kind."}, {"text": "And one more."}]
    return {
        "train": write(tmp_path / "train.jsonl", [*sums, {"query": "long", "response": "x" * 1300}]),
        "valid": write(tmp_path / "valid.jsonl", judged[:3]),
        "test": write(tmp_path / "test.jsonl", judged[:5]),
        "wiki": write(tmp_path / "wiki.jsonl", texts),
    }


def test_files_in_the_place_of_the_hub(files: dict[str, Path]) -> None:
    data = load(files)
    assert [len(part) for part in (data.train, data.valid, data.test, data.wiki)] == [12, 3, 5, 2]  # without the long
    with pytest.raises(ValueError, match="files: got the part 'other'"):
        load({"other": files["train"]})
    with pytest.raises(ValueError, match="wiki: has no item"):
        Data([("a", "b")], [("a", "b")], [("a", "b")], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "has no row"), ("[]\n", "line 1: expected an object"), ('{"query": 1}\n', "query and response"),
     ('\n{"query"', "line 2: is not JSON")],
)  # fmt: skip
def test_damaged_files(content: str, message: str, files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int3"}, "dtype: got 'int3'"),
        ({"max_steps": 0}, "max_steps: got 0"),
        ({"eval_steps": 9, "max_steps": 8}, "eval_steps: got 9"),
        ({"learning_rate": math.nan}, "learning_rate: got nan"),
        ({"weight_decay": -1.0}, "weight_decay: got -1"),
        ({"query_template": "no place"}, "query_template"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings("a/model", **changes)


# ---- a run

# The entries that the tables of PEFT's scoreboard read.
READ = {
    "run_info": {"experiment_name", "total_time", "peft_branch", "created_at", "train_config", "peft_config"},
    "train_info": {
        *("status", "metrics", "train_time", "file_size", "num_trainable_params", "num_total_params"),
        *("accelerator_memory_max", "accelerator_memory_reserved_avg", "accelerator_memory_reserved_99th"),
    },
    "meta_info": {"package_info", "system_info", "model_info", "dataset_info"},
}


@pytest.fixture
def arguments(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_folders.tiny_llama(tmp_path / "llama", max_position_embeddings=256)
    given = {"--model": model, "--output": tmp_path / "results", **{f"--{name}": path for name, path in files.items()}}
    sizes = {"--max-steps": 4, "--eval-steps": 2, "--batch-size-eval": 3, "--max-new-tokens": 4, "--dtype": "float32"}
    return [str(part) for pair in {**given, **sizes}.items() for part in pair]


def run(arguments: list[str]) -> dict[str, Any]:
    assert program.main(arguments) == 0
    found = list(Path(arguments[arguments.index("--output") + 1]).iterdir())
    assert len(found) == 1
    content: dict[str, Any] = json.loads(found[0].read_text())
    return content


def test_a_run_of_red(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    content = run([*arguments, "--position", "ffn"])
    for part, names in READ.items():
        assert names <= content[part].keys()
    assert content["run_info"]["experiment_name"] == "red/llama-ffn-all-lr_0.01"
    assert content["run_info"]["peft_config"]["peft_type"] == "RED"
    assert content["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": 0.01, "weight_decay": 0.0}
    info = content["train_info"]
    assert (info["status"], info["num_trainable_params"]) == ("success", 2 * 2 * 16)
    assert info["file_size"] > 4 * 64
    assert info["accelerator_memory_max"] is None  # a CPU has no such count
    steps = [entry["step"] for entry in info["metrics"]]
    assert steps == [2, 4, 4]
    assert {"valid accuracy", "train loss", "tokens / sec", "train time", "eval time"} <= info["metrics"][0].keys()
    last = info["metrics"][-1]
    assert {"test accuracy", "train loss", "train samples", "train total tokens", "forgetting"} <= last.keys()
    assert last["train samples"] == 16
    assert last["forgetting"] != 0
    assert "test accuracy" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_figures(arguments: list[str]) -> None:
    first = run(arguments)["train_info"]["metrics"][-1]
    again = run([*arguments, "--overwrite"])["train_info"]["metrics"][-1]
    assert first == again


def test_another_method_of_peft(arguments: list[str], tmp_path: Path) -> None:
    LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "lora")
    content = run([*arguments, "--adapter", str(tmp_path / "lora" / "adapter_config.json"), "--name", "lora/r2"])
    assert content["run_info"]["peft_config"]["peft_type"] == "LORA"
    assert content["run_info"]["peft_config"]["target_modules"] == ["q_proj"]
    assert file_of(tmp_path / "results", "lora/r2").is_file()


def test_what_is_wrong_is_said_before_anything_is_loaded(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text('{"peft_type": "NONE"}')
    for more, message in (
        (["--adapter", str(tmp_path / "none.json")], "is no file; expected an adapter_config.json"),
        (["--adapter", str(tmp_path / "bad.json")], "is no config of PEFT"),
        (["--position", "nowhere"], "position: got 'nowhere'"),
        (["--max-steps", "0"], "max_steps: got 0"),
    ):
        assert program.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
    run(arguments)
    assert program.main(arguments) == 2
    assert "pass --overwrite" in capsys.readouterr().err


def test_a_training_that_fails_leaves_what_it_measured(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = training._answered, []

    def fails(*given: Any) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    monkeypatch.setattr(training, "_answered", fails)
    assert program.main(arguments) == 1
    content = json.loads(next((tmp_path / "results").iterdir()).read_text())
    assert content["train_info"]["status"] == "canceled"
    assert content["run_info"]["error_msg"] == "CUDA out of memory"
    assert len(content["train_info"]["metrics"]) == 1


def test_the_loss_is_that_of_the_texts_and_their_end(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folders.tiny_llama(tmp_path / "llama"))
    tokenizer = tiny_folders.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    items = [dict(tokenizer(text)) for text in ("abcd", "ab")]
    batch = training._padded(tokenizer, items, "right", torch.device("cpu"))
    loss = training._loss(model, batch, [4, 2])
    logits = model(**batch).logits.log_softmax(-1)
    ids = batch["input_ids"]
    predicted = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]  # of the second text its end too
    wanted = -sum(logits[row, place - 1, ids[row, place]] for row, place in predicted) / 6  # by all tokens
    torch.testing.assert_close(loss, wanted)
