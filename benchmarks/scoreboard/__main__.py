"""RED, or any method of PEFT, on the scoreboard of PEFT's `method_comparison/MetaMathQA`.

    python -m benchmarks.scoreboard --output results                              # RED++ on Llama-3.2-3B, with a GPU
    python -m benchmarks.scoreboard --output results --position ffn --learning-rate 3e-2
    python -m benchmarks.scoreboard --output results --adapter lora/adapter_config.json --learning-rate 1e-4

The model is trained on MetaMathQA and evaluated by its answers to GSM8K. Forgetting is the rise of its loss on texts of
Wikipedia. Data, order, steps, schedule, prompts and the reading of answers are the scoreboard's, so a file of results
can be placed next to its own. Llama-3.2-3B needs a licence on the hub; --model takes any causal language model.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from red_kernels.support.errors import one_line
from red_kernels.support.require import require

from .data import PARTS, Data, load
from .results import file_of, plain, result, write
from .settings import DTYPES, Settings
from .training import Trained, train

MODEL = "meta-llama/Llama-3.2-3B"
_GIVEN = (
    *("dtype", "learning_rate", "weight_decay", "max_steps", "eval_steps", "batch_size", "batch_size_eval"),
    *("max_seq_length", "max_new_tokens", "seed"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one experiment and write its file; 1 if the training was stopped, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        settings = _settings(options)
        config = adapter(options.adapter, options.position, options.kind)
        name = options.name or _name(config, settings)
        path = file_of(options.output, name)
        if path.exists() and not options.overwrite:
            raise FileExistsError(f"output: {str(path)!r} exists; pass --overwrite to replace it")
        data = load({part: getattr(options, part) for part in PARTS if getattr(options, part) is not None})
        return _run(name, path, settings, config, data, torch.device(options.device))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2


def adapter(path: Path | None, position: str, kind: str) -> Any:
    """The config of the adapter: that of a file, of any method of PEFT, or RED's.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a config of PEFT; the position or the kind is invalid.
    """
    require("peft", "the scoreboard", "'peft>=0.21'")
    from peft import PeftConfig

    from red_kernels.integrations.peft import RedPeftConfig

    if path is None:
        return RedPeftConfig(position=position, kind=kind, task_type="CAUSAL_LM")
    if not path.is_file():
        raise FileNotFoundError(f"adapter: {str(path)!r} is no file; expected an adapter_config.json")
    try:
        return PeftConfig.from_peft_type(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"adapter: {str(path)!r} is no config of PEFT: {error}") from error


def _run(name: str, path: Path, settings: Settings, config: Any, data: Data, device: torch.device) -> int:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    created = datetime.datetime.now(tz=datetime.timezone.utc).isoformat(timespec="seconds")
    begun = time.perf_counter()
    set_seed(settings.seed)
    before = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    tokenizer = AutoTokenizer.from_pretrained(settings.model_id)
    tokenizer.pad_token = tokenizer.eos_token  # the first padded token teaches the model to end
    base: Any = AutoModelForCausalLM.from_pretrained(settings.model_id, dtype=DTYPES[settings.dtype])
    model: Any = get_peft_model(base.to(device), config, autocast_adapter_dtype=True)
    parameters = model.get_nb_trainable_parameters()
    print(f"{name}: trains {parameters[0]:,} of {parameters[1]:,} parameters on {device}", flush=True)
    trained, error = Trained(), ""
    try:
        train(model, tokenizer, data, settings, trained)
    except KeyboardInterrupt:
        error = "manually canceled"
    except Exception as reason:  # for example out of memory: the measurements so far are still written
        error = one_line(reason) or type(reason).__name__
    content = result(
        name,
        settings,
        plain(model.peft_config["default"]),
        trained,
        created=created,
        seconds=time.perf_counter() - begun,
        size=None if error else _size(model),
        parameters=parameters,
        before=before,
        device=device,
        error=error,
    )
    write(path, content)
    print(_summary(content, path))
    return 1 if error else 0


def _size(model: Any) -> int:
    """Bytes of the saved vectors."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return os.stat(Path(folder) / "adapter_model.safetensors").st_size


def _summary(content: dict[str, Any], path: Path) -> str:
    info = content["train_info"]
    if content["run_info"]["error_msg"]:
        return f"stopped: {content['run_info']['error_msg']}; wrote {path}"
    last, memory = info["metrics"][-1], info["accelerator_memory_max"]
    return (
        f"test accuracy {100 * last['test accuracy']:.1f}%, forgetting {last['forgetting']:+.4f}, "
        f"{info['train_time']:.0f} s of training, {info['file_size']:,} bytes"
        + (f", {memory / 2**30:.1f} GiB at most" if memory is not None else "")
        + f"; wrote {path}"
    )


def _name(config: Any, settings: Settings) -> str:
    """`method/model-variant-lr`, the scoreboard's form of names."""
    model = Path(settings.model_id).name
    variant = f"-{config.position}-{config.kind}" if config.peft_type == "RED" else ""
    return f"{str(config.peft_type.value).lower()}/{model}{variant}-lr_{settings.learning_rate:g}".replace(":", "_")


def _settings(options: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {name: getattr(options, name) for name in _GIVEN}
    return Settings(options.model, **{name: value for name, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoreboard", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER", help="folder for the file of results")
    add("--model", default=MODEL, metavar="ID", help=f"a hub id or a folder (default: {MODEL})")
    add("--position", default="more", help="position of RED's edits (default: more, RED++)")
    add("--kind", default="all", help="kind of RED's edits (default: all)")
    add("--adapter", type=Path, metavar="FILE", help="an adapter_config.json of PEFT, of any method, instead of RED")
    add("--name", metavar="METHOD/VARIANT", help="name of the experiment (default: from the other options)")
    add("--overwrite", action="store_true", help="replace the file of an earlier run")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: a GPU if available)")
    add("--dtype", choices=DTYPES, help="dtype of the base model (default: bfloat16)")
    add("--learning-rate", type=float, metavar="R", help="the highest learning rate (default: 0.01)")
    add("--weight-decay", type=float, metavar="W", help="(default: 0; the scoreboard's other methods have 0.1)")
    for name, text in (
        ("--max-steps", "optimizer steps (default: 5000)"),
        ("--eval-steps", "steps between evaluations (default: 250)"),
        ("--batch-size", "batch size of training (default: 4)"),
        ("--batch-size-eval", "batch size of answering (default: 50)"),
        ("--max-seq-length", "tokens of a question with its answer (default: 768)"),
        ("--max-new-tokens", "tokens of a generated answer (default: 300)"),
        ("--seed", "(default: 0)"),
    ):
        add(name, type=int, metavar="N", help=text)
    for part in PARTS:
        add(f"--{part}", type=Path, metavar="JSONL", help=f"a file instead of the hub's data: {part}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
