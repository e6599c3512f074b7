"""The options of `red-kernels finetune`, and the settings that they make with a file's and a former run's."""

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
    """Add all options but those that are named.

    What is left out of a command line is not in the namespace: a file of settings or a former run may have it.
    """

    def add(group: Any, *names: str, **options: Any) -> None:
        if names[0] not in without:
            group.add_argument(*names, default=argparse.SUPPRESS, **options)

    parser.set_defaults(config=None)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file of these options by their names without the dashes in front; options given beside it win. A "
        "run writes its own, complete, as config.yaml",
    )
    model = parser.add_argument_group("model")
    tasks = ("causal-lm", "classification", "regression")
    add(model, "--task", choices=tasks, help="what is trained (default: causal-lm)")
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
        help="of the base model; auto: bf16 where the processor or GPU multiplies it natively, else fp32, and with "
        "--resume the run's own; the vectors are fp32 (default: auto)",
    )
    add(model, "--device", help="cpu or cuda (default: a GPU if there is one)")
    add(
        model,
        "--fsdp",
        action=argparse.BooleanOptionalAction,
        help="under torchrun or accelerate launch: lay the model in parts on all processes (default: a copy on each)",
    )
    add(
        model,
        "--tp",
        type=int,
        metavar="N",
        help="under torchrun or accelerate launch: split the model's weights over N processes (tensor parallelism), "
        "with a copy on each N of them, or with --fsdp parts of one (default: 1)",
    )
    add(model, "--position", help=f"where the edits lie: {', '.join(POSITIONS)} (default: ffn)")
    add(model, "--kind", help="; ".join(map(kind_help, KINDS.values())) + " (default: all)")
    add(model, "--layers", type=layers, help="such as 0-5,8 (default: all layers)")
    add(model, "--sites", nargs="+", metavar="GLOB", help="names of modules to edit, for layouts that are unknown")
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
        help="what is held out, in place of a part of the data",
    )
    add(data, "--loss-on", choices=("answers", "all"), help="of conversations and completions (default: answers)")
    add(data, "--template", metavar="FILE", help="a chat template in place of the model's own")
    add(
        data,
        "--packing",
        action=argparse.BooleanOptionalAction,
        help="whole conversations or completions in rows of --length tokens, without attention between them",
    )
    add(data, "--subset", help="the configuration of a hub dataset")
    add(data, "--text-column", help="of a table (default: text; 0 with --no-header)")
    add(data, "--label-column", help="of a table (default: label; 1 with --no-header)")
    add(data, "--no-header", action="store_true", help="the first row of the csv or tsv file is data")
    add(data, "--held-out", type=float, help="the fraction of the data to hold out, whole documents (default: 0.1)")
    training = parser.add_argument_group("training")
    add(training, "--learning-rate", "--lr", type=float, help="of AdamW without weight decay (default: 0.01)")
    add(training, "--schedule", choices=("constant", "linear", "cosine"), help="of the rate (default: constant)")
    add(training, "--warmup", type=float, metavar="N", help="steps, or a fraction below 1 of all (default: 0)")
    add(training, "--clip", type=float, metavar="NORM", help="of the gradients; 0 clips nothing (default: 1)")
    length = training.add_mutually_exclusive_group()
    add(length, "--steps", type=int, help="optimizer steps (default: 30)")
    add(length, "--epochs", type=float, help="passes over the data, in place of --steps")
    add(training, "--batch-size", type=int, help="blocks or texts in a forward pass (default: 4)")
    add(training, "--accumulate", type=int, metavar="N", help="forward passes for one optimizer step (default: 1)")
    add(
        training,
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute activations again in the backward pass: less memory, more time",
    )
    add(training, "--length", type=int, help="tokens in a block, and at most in a text (default: 256)")
    add(training, "--seed", type=int, help="of the order of the data, of dropout, of a new head (default: 0)")
    watched = parser.add_argument_group("while it trains")
    add(
        watched,
        "--eval-every",
        type=int,
        metavar="N",
        help="steps between evaluations on what is held out; the edits with the least loss are the result",
    )
    add(watched, "--patience", type=int, metavar="N", help="stop after so many evaluations without a lower loss")
    add(
        watched,
        "--sample",
        action="append",
        metavar="PROMPT",
        help="show how the model continues this, before, at each evaluation and after; more than one by --sample again",
    )
    add(watched, "--report-to", nargs="+", metavar="NAME", help="tensorboard, wandb, trackio, ... (default: none)")
    add(watched, "--no-compare", action="store_true", help="leave out the comparison of training speeds")
    run = parser.add_argument_group("output")
    add(
        run,
        "--output",
        help="the folder for edits, checkpoints, loss curve and results (default: red-finetune)",
    )
    add(run, "--save-every", type=int, help="steps between checkpoints (default: 10, with --eval-every that)")
    again = run.add_mutually_exclusive_group()
    add(
        again,
        "--resume",
        action="store_true",
        help="go on with the run in the output folder, by its own settings where none are given; a finished run goes "
        "on for more --steps or --epochs",
    )
    add(again, "--overwrite", action="store_true", help="replace the run in the output folder")


def settings_of(options: argparse.Namespace) -> Any:
    """The `Settings` of parsed options: of the command line, else of `--config`, else of the run to resume.

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
