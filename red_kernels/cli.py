"""The command `red-kernels`: it reads the arguments, starts the job, and turns errors into one clear line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .checkpoints import push
from .finetune import evaluate, generate, sweep
from .finetune.options import add_options, settings_of
from .support.arguments import Parser
from .support.bars import bars_on_terminals_only
from .support.errors import explained, one_line
from .support.require import require

_MERGE_ADVICE = {
    "rounding": "merge into --dtype fp32, or pass --force",
    "place": "train edits of --kind scaling (red-kernels finetune), or use these unmerged (rk.load_edits)",
}
_COMMANDS = ("info", "finetune", "sweep", "evaluate", "generate", "merge", "convert", "push", "bench")
EXIT_UNEXPECTED = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # the status that a shell reports after Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0; 2 for an error caused by a setting, a file or the system, explained by one line; 1 for any
        other error, which the line calls unexpected; 130 after Ctrl-C. With `--traceback` an error is raised instead.
    """
    options = _parser().parse_args(arguments)
    command = vars(options).pop("command")
    try:
        if command != "finetune" and _processes() > 1:
            if int(os.environ["RANK"]):
                return EXIT_ERROR  # the first process says why
            raise ValueError(f"{command} runs in one process, got {_processes()}; start it without a launcher")
        with bars_on_terminals_only():
            return int(options.run(options))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has closed it; the buffered rest is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except Exception as error:
        if options.traceback:
            raise
        if getattr(error, "said", False):  # by another process
            return EXIT_ERROR
        rank = int(os.environ.get("RANK", "0"))
        where = f" in process {rank}" if rank else ""
        if explained(error):
            print(f"error{where}: {one_line(error)}", file=sys.stderr)
            return EXIT_ERROR
        what = f"{type(error).__name__}: {one_line(error)}"
        print(
            f"error{where}: unexpected {what}; this is a fault of red-kernels, or of an unknown kind of file: "
            "the same command with --traceback shows where",
            file=sys.stderr,
        )
        return EXIT_UNEXPECTED


def _parser() -> Parser:
    parser = Parser(prog="red-kernels", description="Fused kernels for RED, representation editing.")
    parser.add_argument("--version", action="version", version=f"red-kernels {__version__}")
    commands = parser.add_subparsers(required=True, metavar=" | ".join(_COMMANDS))
    info = commands.add_parser("info", help="show the backends, the machine and the installed versions")
    info.set_defaults(run=_info)
    info.add_argument(
        "--model",
        help="show instead the sites that would be edited in this model, and the fusion of each edit: a folder, a "
        ".gguf file, a hub id or the name of a packaged model; no weights are loaded",
    )
    info.add_argument("--position", default="ffn", help="position of the edits, with --model")
    info.add_argument("--kind", default="all", help="kind of the edits, with --model")
    finetune = commands.add_parser(
        "finetune",
        help="train edits on a model and evaluate them",
    )
    finetune.set_defaults(run=_finetune)
    add_options(finetune)
    sweeping = commands.add_parser("sweep", help="find the learning rate: train with several, continue the better half")
    sweeping.set_defaults(run=_with_transformers("sweep", sweep.run))
    sweep.add_options(sweeping)
    evaluating = commands.add_parser("evaluate", help="evaluate saved edits on data, against their base model")
    evaluating.set_defaults(run=_with_transformers("evaluate", evaluate.run))
    evaluate.add_options(evaluating)
    generating = commands.add_parser("generate", help="continue prompts with saved edits, chosen by name")
    generating.set_defaults(run=_with_transformers("generate", generate.run))
    generate.add_options(generating)
    merge = commands.add_parser(
        "merge",
        help="merge saved edits into their base model, into a folder that transformers loads",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    merge.set_defaults(run=_merge)
    _add_merge_options(merge)
    convert = commands.add_parser(
        "convert",
        help="convert saved edits into another form: a folder of save_edits, the RED authors' files, a folder of PEFT",
        description="Convert edits in the form of RED's authors (delta_vector.pth, and classifier.pth next to it), or "
        "a RED adapter that PEFT has saved, into a folder of rk.save_edits; or convert such a folder into the authors' "
        "form, or with --to peft into an adapter that PEFT loads. The files in SOURCE determine its form.",
    )
    convert.set_defaults(run=_convert)
    _add_convert_options(convert)
    pushing = commands.add_parser("push", help="upload saved edits to the hub, with a model card")
    pushing.set_defaults(run=push.run)
    push.add_options(pushing)
    bench = commands.add_parser(
        "bench",
        help="measure operations, training steps and quality; or search launch rules for this GPU (--tune)",
        description="Measure this package against its peers. The results are JSON files and pictures in a folder. "
        "With --tune, search the launch rules of the Triton kernels on this GPU, and store those that beat this "
        "version's rules by more than the noise.",
    )
    bench.set_defaults(run=_bench)
    _add_bench_options(bench)
    for name, command in commands.choices.items():
        command.add_argument("--traceback", action="store_true", help="show the traceback of an error")
        command.set_defaults(command=name)
    return parser


def _processes() -> int:
    """How many processes torchrun or `accelerate launch` has started; 1 without either."""
    return int(os.environ.get("WORLD_SIZE", "1")) if {"RANK", "LOCAL_RANK"} <= os.environ.keys() else 1


def _add_merge_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="the base model: a folder, a .gguf file, a hub id or the name of a packaged model",
    )
    parser.add_argument(
        "--edits",
        required=True,
        metavar="FOLDER",
        help="a folder of saved edits, of a finetune run, or of a RED adapter that PEFT saved; or a hub id",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the merged model")
    parser.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="dtype of the weights (auto: the base model's)",
    )
    parser.add_argument("--force", action="store_true", help="merge edits that rounding would swallow, too")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, a hub id, or a single file of edits")
    parser.add_argument("output", metavar="OUTPUT", help="the folder for the files of the other form")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the base model: a folder, a config.json, a .gguf file, a hub id or the name of a packaged model "
        "(default: inferred from the site names)",
    )
    parser.add_argument("--position", help="position of the edits, if it cannot be inferred")
    parser.add_argument("--to", choices=("own", "authors", "peft"), help="the form of OUTPUT (default: own or authors)")
    parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier conversion")


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    unset = argparse.SUPPRESS  # an omitted option takes the default of the job's Settings
    parser.add_argument(
        "job",
        nargs="?",
        choices=("ops", "step", "growth", "quality", "all"),
        help="operations; training steps and their growth; growth only; quality; or all of them (default: ops)",
    )
    parser.add_argument("--tune", action="store_true", help="search launch rules, and write them to a table")
    parser.add_argument(
        "--output",
        type=Path,
        default=unset,
        metavar="FOLDER",
        help="for results (default: bench-results); with --tune the file of the table (default: ARCHITECTURE.json)",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace earlier results")
    again.add_argument("--resume", action="store_true", help="continue the results in the folder")
    run = parser.add_argument_group("measuring")
    run.add_argument("--quick", action="store_true", help="few and small cases, which allow no conclusions")
    run.add_argument("--minutes", type=float, help="start no case after this time; --resume measures the rest")
    run.add_argument("--device", choices=("cpu", "cuda"), help="device to measure (default: a GPU if available)")
    run.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16"),
        default=unset,
        help="dtype of the base models of step, growth and quality; auto: bf16 if the processor or GPU multiplies it "
        "natively, else fp32; the sentence model is always fp32 on a CPU (default: auto)",
    )
    run.add_argument(
        "--instruction-sets",
        nargs="+",
        default=unset,
        metavar="SET",
        help="instruction sets of the processor: a run for each, into FOLDER/SET, with torch limited to the same "
        "set; all: every set of this processor (default: one run with the newest)",
    )
    run.add_argument(
        "--methods",
        nargs="+",
        default=unset,
        metavar="NAME",
        help="methods of step or quality, for example red lora-all vera (default: the job's)",
    )
    run.add_argument(
        "--case",
        nargs=3,
        action="append",
        default=unset,
        metavar=("MODEL", "BATCH", "LENGTH"),
        help="a case of step, instead of its default cases; repeat it for several",
    )
    run.add_argument(
        "--tasks",
        nargs="+",
        default=unset,
        metavar="NAME",
        help="tasks of quality: sentiment, next-sentence, language-modelling",
    )
    ops = parser.add_argument_group("operations, and --tune")
    ops.add_argument(
        "--operations",
        nargs="+",
        default=unset,
        metavar="NAME",
        help="operations (default: all; with --tune edit_add edit_add_rms_norm edit_add_layer_norm linear_edit)",
    )
    ops.add_argument(
        "--inputs",
        nargs="+",
        default=unset,
        metavar="KIND",
        help="fresh (beyond the cache) or warm, not with --tune (default: both)",
    )
    ops.add_argument(
        "--seconds",
        type=float,
        default=unset,
        help="seconds for each case: of ops on a CPU (default: 1); of step and growth (default: 50 and 12); not with "
        "--tune",
    )
    ops.add_argument(
        "--widths",
        nargs="+",
        type=int,
        default=unset,
        metavar="N",
        help="hidden sizes (default: those of real models)",
    )
    ops.add_argument(
        "--dtypes",
        nargs="+",
        default=unset,
        metavar="NAME",
        help="dtypes of the activations: fp32, bf16, fp16 (default: bf16 fp32)",
    )
    ops.add_argument(
        "--rows",
        nargs="+",
        type=int,
        default=unset,
        metavar="N",
        help="numbers of rows (default: 512 4096; on a GPU 16384 too, but with --tune)",
    )
    ops.add_argument(
        "--elements",
        nargs="+",
        type=int,
        default=unset,
        metavar="N",
        help="instead of --rows, not with --tune: elements of an activation, rounded down to whole rows",
    )
    ops.add_argument(
        "--implementations",
        nargs="+",
        default=unset,
        metavar="NAME",
        help="not with --tune: implementations to time, for example cuda triton compile liger (default: all available)",
    )
    ops.add_argument("--no-memory", action="store_true", default=unset, help="not with --tune: skip the peak memory")
    ops.add_argument(
        "--kernels",
        action="store_true",
        default=unset,
        help="not with --tune: record the names of the kernels that each implementation launches on a GPU",
    )
    ops.add_argument(
        "--sums",
        nargs="+",
        type=int,
        default=unset,
        metavar="N",
        help="with --tune: number of vectors with gradients, out of scale, bias and a norm's two (default: 2)",
    )


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """Import without the warnings that other packages log in the meantime (torchao and bitsandbytes, of missing
    libraries).

    The command does not use the packages of these warnings. Errors are still shown. The silence ends with the import.
    """
    former = logging.root.manager.disable
    logging.disable(max(former, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(former)


def _info(options: argparse.Namespace) -> int:
    require("rich", "red-kernels info")
    from rich.console import Console

    from .info import show_info, show_model

    with _quiet_imports():  # it searches for all peers
        if options.model is None:
            show_info(Console())
        else:
            show_model(Console(), options.model, options.position, options.kind)
    return 0


def _merge(options: argparse.Namespace) -> int:
    with _quiet_imports():
        from .merging.folder import merge_folder
    from .merging.merge import MergeRefused

    try:
        report, notes = merge_folder(
            options.model,
            options.edits,
            options.output,
            dtype=options.dtype,
            force=options.force,
            overwrite=options.overwrite,
            say=lambda stage: print(stage, flush=True),
        )
    except MergeRefused as error:  # its remedy is for Python
        raise ValueError(f"{error.reason}; {_MERGE_ADVICE[error.cause]}") from error
    print(report)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {options.output}: transformers.AutoModel...from_pretrained({options.output!r}) loads it")
    return 0


def _convert(options: argparse.Namespace) -> int:
    with _quiet_imports():
        from .checkpoints.convert import convert

        if options.model is not None and importlib.util.find_spec("transformers") is not None:
            from .support import base_models  # noqa: F401
    print(convert(options.source, options.output, options.model, options.position, options.overwrite, options.to))
    return 0


def _bench(options: argparse.Namespace) -> int:
    require("rich", "red-kernels bench")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(options).items()}
    return _tune(given) if options.tune else _measure(given)


def _tune(given: dict[str, Any]) -> int:
    if given["job"] is not None:
        raise ValueError(f"--tune is a separate job, got the job {given['job']} too")
    for name in (
        *("resume", "quick", "minutes", "device", "dtype", "instruction_sets", "inputs", "seconds", "methods"),
        *("elements", "implementations", "no_memory", "kernels"),
    ):
        if given.get(name):
            raise ValueError(f"--{name.replace('_', '-')}: not an option of the search for launch rules")
    from rich.console import Console

    from .backends.find_triton import require_gpu

    require_gpu()
    from .backends.triton.tuning.job import Settings, tune

    known = {field.name for field in dataclasses.fields(Settings)}
    tune(Settings(**{name: value for name, value in given.items() if name in known}), Console())
    return 0


def _measure(given: dict[str, Any]) -> int:
    if "sums" in given:
        raise ValueError("--sums is for --tune, the search for launch rules")
    from rich.console import Console

    with _quiet_imports():
        suite = _benchmarks("suite")
    if "instruction_sets" in given:
        if given.get("device") == "cuda":
            raise ValueError("--instruction-sets: needs --device cpu, got --device cuda")
        result: int = _benchmarks("sets").run_sets(
            given["instruction_sets"], {**given, "device": "cpu"}, given.get("output", Path("bench-results"))
        )
        return result
    operations = (
        *("operations", "inputs", "seconds", "widths", "dtypes"),
        *("rows", "elements", "implementations", "kernels"),
    )
    own = ("device", "dtype", "resume", "overwrite", "minutes", "quick", "methods", "tasks")
    request = suite.Request(
        job=given["job"] or "ops",
        output=given.get("output", Path("bench-results")),
        options={name: given[name] for name in operations if name in given}
        | ({"peak_memory": False} if "no_memory" in given else {}),
        cases=tuple(_case(*case) for case in given.get("case", ())),
        **{name: given[name] for name in own if name in given},
    )
    suite.run_suite(request, Console())
    return 0


def _case(model: str, batch: str, length: str) -> tuple[str, int, int]:
    if not (batch.isdecimal() and length.isdecimal()):
        raise ValueError(f"--case: got {model} {batch} {length}, expected a model and two numbers, batch and length")
    return model, int(batch), int(length)


def _benchmarks(part: str) -> Any:
    """A module of the benchmark suite: `red_kernels.benchmarks`, or in a checkout the folder next to the package."""
    name = f"{__package__}.benchmarks"
    folder = Path(__file__).parents[1] / "benchmarks"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not (folder / "suite.py").is_file():
            raise ModuleNotFoundError(
                f"the benchmark suite is not installed, and {folder} does not exist: reinstall red-kernels, or use a "
                "checkout of its sources"
            )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return importlib.import_module(f"{name}.{part}")


def _with_transformers(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, once its packages are installed and imported."""

    def checked(options: argparse.Namespace) -> int:
        with _quiet_imports():
            for package in ("rich", "transformers", "accelerate"):
                require(package, f"red-kernels {name}")
            from .finetune import job  # noqa: F401
        return run(options)

    return checked


def _finetune(options: argparse.Namespace) -> int:
    with _quiet_imports():
        for package in ("rich", "transformers", "accelerate"):
            require(package, "red-kernels finetune")
        from rich.console import Console

        from .finetune.job import finetune

    settings = settings_of(options)
    return EXIT_INTERRUPTED if finetune(settings, Console()) is None else 0
