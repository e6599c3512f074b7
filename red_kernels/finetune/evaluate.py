"""`red-kernels evaluate`: the scores of saved edits on data, next to those of their base model."""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

__all__ = ["add_options", "evaluate", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command. An omitted one is that of the run, if the source is a run."""

    def add(*names: str, **options: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS, **options)

    parser.add_argument("source", metavar="SOURCE", help="a run's folder, a folder of saved edits, or a hub id")
    add(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="whole files, or the split validation or test of a dataset (default: the run's held-out data)",
    )
    add("--task", choices=("causal-lm", "classification", "regression"), help="(default: the run's, or causal-lm)")
    add("--model", help="the base model (default: the one that the edits name)")
    add("--subset", help="the configuration of a hub dataset")
    add("--text-column", help="of a table")
    add("--label-column", help="of a table")
    add("--no-header", action="store_true", help="the first row of the csv or tsv file is data")
    add("--template", metavar="FILE", help="a chat template (default: the run's, or the model's own)")
    add("--loss-on", choices=("answers", "all"), help="the tokens with a loss in conversations and completions")
    add("--length", type=int, help="tokens of a block, and the most of a text")
    add("--batch-size", type=int, help="blocks or texts of a forward pass")
    add("--device", help="cpu or cuda (default: a GPU if available)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")


def run(options: argparse.Namespace) -> int:
    """The command."""
    from rich.console import Console

    from ..support.files import write_files
    from . import report

    given = {name: value for name, value in vars(options).items() if name not in ("source", "json", "run", "traceback")}
    console = Console()
    found = evaluate(options.source, given, console)
    report.held_out_table(console, found)
    if options.json is not None:
        path = Path(options.json)
        content = {name: asdict(scores) for name, scores in found.items()}
        write_files(path.parent, {path.name: (json.dumps(content, indent=2) + "\n").encode()})
    return 0


def evaluate(source: str, given: dict[str, Any], console: Any) -> dict[str, Any]:
    """Evaluate saved edits on data.

    Args:
        source: a run's folder, a folder of saved edits, or a hub id.
        given: settings as in `red_kernels.finetune.settings.from_options`; the others are the run's.
        console: for the output.

    Returns:
        `"with edits"`, and for language models `"base model"`, to a `HeldOut`.

    Raises:
        ValueError: no data although the source is no run, a model of another task, a label unknown to the model, or an
            error of `load_data` and `rk.from_pretrained`.
    """
    from ..checkpoints.whole import from_pretrained, load_tokenizer
    from ..edits.named import disable_edits
    from ..support.base_models import BaseModel
    from .base_dtype import DTYPES
    from .data import load_data, load_judged
    from .job_data import judged
    from .run_folder import RUN_NAME, former_run
    from .settings import HELD_OUT, chat_template, from_options
    from .unused import check_template, without_unused

    folder = Path(source)
    own_run = former_run(folder, "source") if (folder / RUN_NAME).is_file() else None
    former = None
    if own_run is not None:  # its device and its loggers do not matter here
        former = {name: value for name, value in own_run["settings"].items() if name not in ("device", "report_to")}
    if former is None and "data" not in given:
        raise ValueError(f"data: {source!r} is not a run's folder, which would name its data; pass --data")
    base = given.pop("model", None)
    if former is not None and "data" in given:
        former["validation"] = None
    settings = from_options({**given, "dtype": "auto"}, former)
    settings = replace(settings, output=source, sample=(), steps=None, epochs=None)
    settings = without_unused(settings, given).filled()
    names = settings.data or ()
    if "data" in given:
        loaded = load_judged(names, settings.columns, settings.task, subset=settings.subset)
    else:
        loaded = load_data(
            names,
            settings.columns,
            settings.task,
            subset=settings.subset,
            validation=settings.validation,
            held_out=settings.held_out or HELD_OUT,
        )
        assert own_run is not None
        if own_run["results"].get("data_digest", loaded.digest) != loaded.digest:
            raise ValueError(
                f"data: {', '.join(names)!r} differs from the data of the run in {source!r}, so its held-out part is "
                "unknown; pass the data to evaluate by --data"
            )
    if "template" in given:
        check_template(settings.template, loaded.held_out)
    dtype = DTYPES.get(str((former or {}).get("dtype")), "auto")  # the run's dtype
    model = from_pretrained(source, base=base, dtype=dtype, device=settings.place)
    _check_task(settings.task, model, source)
    tokenizer = load_tokenizer(source, base=base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if settings.template is not None:
        tokenizer.chat_template = chat_template(settings.template)
    labels = None
    if settings.task == "classification":
        labels = {str(name): int(number) for name, number in model.config.label2id.items()}
        strange = sorted({str(own.label) for own in loaded.held_out} - labels.keys())
        if strange:
            raise ValueError(
                f"data: has the label {strange[0]!r}, expected a label of the model: {', '.join(sorted(labels))}"
            )
    console.print(f"Data: {', '.join(names)}", markup=False, highlight=False, soft_wrap=True)
    data = judged(settings, BaseModel(model, tokenizer, source, frozenset()), loaded, labels, console)
    blocks: dict[str, AbstractContextManager[Any]] = {"with edits": nullcontext()}
    if not data.labelled:  # a head without the edits of its training is meaningless
        blocks = {"base model": disable_edits(model), **blocks}
    found = {}
    for name, block in blocks.items():
        with block:
            found[name] = data.held_out_loss(model, console)
    return found


def _check_task(task: str, model: Any, source: str) -> None:
    """Raises ValueError if the model's head is for another task than the data's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as LABELLING

    own = "causal-lm"
    if type(model).__name__ in LABELLING.values():
        own = "regression" if model.config.num_labels == 1 else "classification"
    if task != own:
        raise ValueError(
            f"task: got {task!r}, but {source!r} is of a {type(model).__name__} for {own!r}; pass --task {own}"
        )
