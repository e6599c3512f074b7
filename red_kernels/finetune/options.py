"""The options of `red-kernels finetune`, and their settings, merged with a file's and a former run's."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..edits.config import POSITIONS
from ..edits.kinds import KINDS, Kind, option_of
from ..support.arguments import layers

__all__ = ["add_options", "kind_help", "settings_of"]


def kind_help(kind: Kind) -> str:
    """A kind's name, option and formula, for a list of kinds."""
    option = option_of(kind.name)
    return f"{kind.name}{':N' if option else ''}: {kind.help}" + (f", N is {option}" if option else "")


def add_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Add all options except the named ones.

    An omitted option is not in the namespace: a file of settings or a former run may set it.
    """

    def add(group: Any, *names: str, **options: Any) -> None:
        if names[0] not in without:
            group.add_argument(*names, default=argparse.SUPPRESS, **options)

    parser.set_defaults(config=None)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file of these options, named without the leading dashes; options on the command line win. A run "
        "writes its own complete file, config.yaml",
    )
    model = parser.add_argument_group("model")
    tasks = ("causal-lm", "classification", "regression")
    add(model, "--task", choices=tasks, help="the task (default: causal-lm)")
    add(
        model,
        "--model",
        help="a folder, a .gguf file, a hub id or the name of a packaged model "
        "(default: SmolLM2-135M-Instruct, for classification and regression all-MiniLM-L6-v2)",
    )
    add(
        model,
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        help="dtype of the base model; auto: bf16 if the processor or GPU multiplies it natively, else fp32; with "
        "--resume the run's own; the vectors are fp32 (default: auto)",
    )
    add(model, "--device", help="cpu or cuda (default: a GPU if available)")
    add(
        model,
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        help="under torchrun or accelerate launch: shard the model over all processes (default: a copy on each)",
    )
    add(
        model,
        "--tp",
        type=int,
        metavar="N",
        help="under torchrun or accelerate launch: split the model's weights over N processes (tensor parallelism); "
        "each N of them have a copy, or with --fsdp shards of one (default: 1)",
    )
    add(model, "--position", help=f"the position of the edits: {', '.join(POSITIONS)} (default: ffn)")
    add(model, "--kind", help="; ".join(map(kind_help, KINDS.values())) + " (default: all)")
    add(model, "--layers", type=layers, help="the layers to edit, for example 0-5,8 (default: all)")
    add(model, "--sites", nargs="+", metavar="GLOB", help="names of modules to edit, for unknown layouts")
    data = parser.add_argument_group("data")
    add(
        data,
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="texts, conversations, completions or labelled texts: .txt, .csv, .tsv, .json, .jsonl and .parquet files, "
        "compressed or not, folders of save_to_disk, hub ids (default: python-topics, the Python reference in the "
        "standard library)",
    )
    add(
        data,
        "--validation",
        nargs="+",
        metavar="SOURCE",
        help="held-out data (default: a part of --data)",
    )
    add(
        data,
        "--loss-on",
        choices=("answers", "all"),
        help="tokens with a loss in conversations and completions (default: answers)",
    )
    add(data, "--template", metavar="FILE", help="a chat template (default: the model's own)")
    add(
        data,
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="pack whole conversations or completions into rows of --length tokens, without attention between them",
    )
    add(data, "--subset", help="the configuration of a hub dataset")
    add(data, "--text-column", help="the text column of a table (default: text; 0 with --no-header)")
    add(data, "--label-column", help="the label column of a table (default: label; 1 with --no-header)")
    add(data, "--no-header", action="store_true", help="the first row of the csv or tsv file is data")
    add(data, "--held-out", type=float, help="the fraction of the documents to hold out (default: 0.1)")
    training = parser.add_argument_group("training")
    add(
        training,
        "--learning-rate",
        "--lr",
        type=float,
        help="learning rate of AdamW without weight decay (default: 0.01)",
    )
    add(
        training,
        "--schedule",
        choices=("constant", "linear", "cosine"),
        help="schedule of the learning rate (default: constant)",
    )
    add(
        training,
        "--warmup",
        type=float,
        metavar="N",
        help="warm-up steps, or a fraction below 1 of all steps (default: 0)",
    )
    add(
        training,
        "--clip",
        type=float,
        metavar="NORM",
        help="largest norm of the gradients; 0 clips nothing (default: 1)",
    )
    length = training.add_mutually_exclusive_group()
    add(length, "--steps", type=int, help="optimizer steps (default: 30)")
    add(length, "--epochs", type=float, help="passes over the data, instead of --steps")
    add(training, "--batch-size", type=int, help="blocks or texts of a forward pass (default: 4)")
    add(training, "--accumulate", type=int, metavar="N", help="forward passes of one optimizer step (default: 1)")
    add(
        training,
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass: less memory, more time",
    )
    add(training, "--length", type=int, help="tokens of a block, and the most of a text (default: 256)")
    add(training, "--seed", type=int, help="seed of the data's order, of dropout and of a new head (default: 0)")
    watched = parser.add_argument_group("while it trains")
    add(
        watched,
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between evaluations on the held-out data; the edits with the lowest loss are the result",
    )
    add(watched, "--patience", type=int, metavar="N", help="stop after N evaluations without a lower loss")
    add(
        watched,
        "--sample",
        action="append",
        metavar="PROMPT",
        help="show how the model continues this text, before, at each evaluation and after; repeat it for several",
    )
    add(watched, "--report-to", nargs="+", metavar="NAME", help="tensorboard, wandb, trackio, ... (default: none)")
    add(watched, "--no-compare", action="store_true", help="skip the comparison of training speeds")
    run = parser.add_argument_group("output")
    add(
        run,
        "--output",
        help="folder of edits, checkpoints, loss curve and results (default: red-finetune)",
    )
    add(run, "--save-every", type=int, help="steps between checkpoints (default: 10, or that of --eval-every)")
    again = run.add_mutually_exclusive_group()
    add(
        again,
        "--resume",
        action="store_true",
        help="resume the run in the output folder, with its own settings by default; a finished run continues with "
        "more --steps or --epochs",
    )
    add(again, "--overwrite", action="store_true", help="replace the run in the output folder")


def settings_of(options: argparse.Namespace) -> Any:
    """The `Settings` of parsed options: of the command line, else of `--config`, else of the resumed run.

    Raises:
        ValueError: a file of settings that cannot be read, or an unknown name in it; no run to resume.
    """
    from .run_folder import former_settings
    from .settings import Settings, from_options, read_config

    names = {own.name for own in dataclasses.fields(Settings)}
    names |= {"text_column", "label_column", "no_header", "no_compare"}
    given = {name: value for name, value in vars(options).items() if name in names}
    if options.config is not None:
        of_file = {name.replace("-", "_"): value for name, value in read_config(options.config).items()}
        if {"steps", "epochs"} & given.keys():
            of_file = {name: value for name, value in of_file.items() if name not in ("steps", "epochs")}
        given = {**of_file, **given}
    former = None
    if given.get("resume") and not given.get("overwrite"):
        former = former_settings(Path(given.get("output", Settings.output)))
    return from_options(given, former)
