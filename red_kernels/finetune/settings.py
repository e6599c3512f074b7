"""All settings of the finetune job: defaults, valid values, and sources."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import torch

from ..support.arguments import layers
from ..support.base_models import DEFAULT_MODEL, TASKS
from ..support.files import write_files
from ..support.parse import shown
from ..support.require import require
from ..support.text import listed
from .base_dtype import ASKED, AUTO
from .data import PYTHON_TOPICS, Columns, check_held_out
from .data.chat import ALL, ANSWERS
from .unused import check_used

__all__ = ["Settings", "as_options", "chat_template", "from_options", "read_config", "write_config"]

STEPS, SAVE_EVERY = 30, 10
HELD_OUT = 0.1
SCHEDULES = ("constant", "linear", "cosine")
# Settings that may change when a run is resumed: devices and folders, output, and length.
_FREE = {
    *("output", "resume", "overwrite", "device", "compare", "save_every", "eval_every", "patience", "sample"),
    *("report_to", "steps", "epochs", "fsdp", "tp"),
}
_OF_COLUMNS = {"text_column": "text", "label_column": "label"}
_NEGATED = {"no_header": "header", "no_compare": "compare"}  # as the command line has them
_OPTIONS = {field: option for option, field in {**_OF_COLUMNS, **_NEGATED}.items()}


@dataclass(frozen=True)
class Settings:
    """All settings of a job; None selects the task's default.

    Attributes:
        model: a packaged model's name, a folder, a `.gguf` file or a hub id.
        data: `python-topics`, files, folders of `save_to_disk` or hub ids, one or several, as in `load_data`.
        validation: the same, of held-out data instead of a part of `data`.
        loss_on: for conversations and completions, `"answers"` or `"all"`.
        template: a file with a chat template, instead of the model's own.
        packing: put whole conversations or completions into rows of `length` tokens, without attention between them.
        subset: the configuration of a hub dataset.
        columns: the columns of texts and labels in a table.
        task: `"causal-lm"`, `"classification"` or `"regression"`.
        learning_rate: of AdamW, without weight decay.
        schedule: `"constant"`, `"linear"` or `"cosine"`.
        warmup: steps in which the rate rises from 0; below 1 a fraction of all steps.
        clip: the largest norm of all gradients together; 0 clips nothing.
        steps: optimizer steps; without it and `epochs` 30.
        epochs: passes over the data, instead of `steps`.
        batch_size: texts or blocks in a forward pass, of all processes together.
        accumulate: forward passes whose gradients make one optimizer step.
        fsdp: shard the base model over all processes (FSDP2); otherwise each has a copy.
        tp: split the base model's weights over this many processes (tensor parallelism). With more processes there are
            several copies, or with `fsdp` shards of one.
        checkpointing: recompute activations in the backward pass, which saves memory and costs time.
        length: tokens of a block, and the most of a text.
        dtype: of the base model: `"fp32"`, `"bf16"`, or `"auto"`, which is bf16 if the device multiplies it natively,
            else fp32; a resumed run keeps its own. The vectors are always fp32.
        position, kind, layers, sites: as in `RedConfig`.
        seed: of the data's order, of dropout and of a new head.
        held_out: the fraction of the data to hold out, without `validation`; by default 0.1.
        eval_every: steps between evaluations on the held-out data. The edits with the lowest loss are the result. None:
            only before and after the training.
        patience: stop after this many consecutive evaluations without a lower loss; needs `eval_every`.
        sample: prompts whose continuation is shown before, at each evaluation and after.
        report_to: further loggers, by the names of transformers' Trainer: `"tensorboard"`, `"wandb"`, ...
        save_every: steps between checkpoints; by default 10. With `eval_every` each evaluation writes one.
        device: `"cpu"`, `"cuda"`, or None for a GPU if available.
        output: the folder for all files of the job.
        compare: measure the speed next to the eager edit and the frozen model.
        resume, overwrite: the treatment of an existing run in the output folder.
    """

    task: str = "causal-lm"
    model: str | None = None
    data: str | tuple[str, ...] | None = None
    validation: tuple[str, ...] | None = None
    loss_on: str = ANSWERS
    template: str | None = None
    packing: bool = False
    subset: str | None = None
    columns: Columns = field(default_factory=Columns)
    learning_rate: float = 1e-2
    schedule: str = "constant"
    warmup: float = 0
    clip: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    checkpointing: bool = False
    fsdp: bool = False
    tp: int = 1
    length: int = 256
    dtype: str = AUTO
    position: str = "ffn"
    kind: str = "all"
    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] | None = None
    seed: int = 0
    held_out: float | None = None
    eval_every: int | None = None
    patience: int | None = None
    sample: tuple[str, ...] = ()
    report_to: tuple[str, ...] = ()
    save_every: int | None = None
    device: str | None = None
    output: str = "red-finetune"
    compare: bool = True
    resume: bool = False
    overwrite: bool = False

    def filled(self) -> Settings:
        """The same with defaults instead of None, as far as they do not depend on the data.

        Raises:
            ValueError: a value out of range, two that exclude each other, one without effect because of another, or
                missing data for a task without default data.
        """
        _check_types(self)
        if self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}, expected one of {', '.join(map(repr, TASKS))}")
        whole = {"batch_size": 1, "accumulate": 1, "length": 2, "steps": 1, "save_every": 1, "eval_every": 1, "tp": 1}
        for name, least in {**whole, "patience": 1}.items():
            value = getattr(self, name)
            may_lack = getattr(Settings, name) is None
            if not (value is None and may_lack) and not (type(value) is int and value >= least):
                raise ValueError(f"{name}: got {shown(value)}, expected an integer of at least {least}")
        for name, expected in (
            ("learning_rate", "above 0"),
            ("epochs", "above 0"),
            ("warmup", "0 or more"),
            ("clip", "0 or more"),
        ):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
            if value is not None and not (number and (value > 0 or expected != "above 0")):
                raise ValueError(f"{name}: got {shown(value)}, expected a number, {expected}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: got {self.schedule!r}, expected one of {', '.join(map(repr, SCHEDULES))}")
        _check_reporting(self.report_to)
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps and epochs: got {self.steps} and {self.epochs}, expected one of them at most")
        if self.patience is not None and self.eval_every is None:
            raise ValueError(f"patience: got {self.patience} without eval_every, the steps between evaluations")
        if self.held_out is not None:
            check_held_out(self.held_out)
        data = self.data if self.data is not None else PYTHON_TOPICS if self.task == "causal-lm" else None
        if data is None:
            raise ValueError(f"data: {self.task} needs a table of texts and labels (--data FILE)")
        if self.loss_on not in (ANSWERS, ALL):
            raise ValueError(f"loss_on: got {self.loss_on!r}, expected {ANSWERS!r} or {ALL!r}")
        chat_template(self.template)
        if self.device is not None and self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device: got {self.device!r}, expected 'cpu' or 'cuda'")
        if self.device is not None and self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device: got {self.device!r}, but torch sees no CUDA device")
        if self.dtype not in ASKED:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {', '.join(map(repr, ASKED))}")
        if self.eval_every is not None and self.save_every not in (None, self.eval_every):
            raise ValueError(
                f"save_every: got {self.save_every}, expected {self.eval_every}, the value of eval_every: each "
                "evaluation writes a checkpoint, to keep the edits with the lowest loss"
            )
        check_used(self)
        return dataclasses.replace(
            self,
            held_out=self.held_out if self.held_out or self.validation else HELD_OUT,
            data=(data,) if isinstance(data, str) else data,
            model=self.model or DEFAULT_MODEL[self.task],
            steps=self.steps if self.steps or self.epochs else STEPS,
        )

    @property
    def place(self) -> torch.device:
        """The device: a GPU if available, if none is named. The recorded setting stays unnamed."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def checkpoints_every(self) -> int:
        """The steps between checkpoints."""
        return self.save_every or self.eval_every or SAVE_EVERY

    def total_steps(self, items: int) -> int:
        """The optimizer steps of the whole run, given the number of training items."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # `filled` ensures it
        batches = items // self.batch_size or 1 if self.drops_last(items) else math.ceil(items / self.batch_size)
        return max(1, math.ceil(self.epochs * math.ceil(batches / self.accumulate)))

    def drops_last(self, items: int) -> bool:
        """Whether an incomplete last batch is dropped: always, unless there is no complete one."""
        return items >= self.batch_size

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the course of the training, which must be equal in a resumed run."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}

    def recorded(self) -> dict[str, Any]:
        """The record of a run, for `run.json`."""
        return {name: value for name, value in asdict(self).items() if name not in {"output", "resume", "overwrite"}}


def _check_types(settings: Settings) -> None:
    """Raises ValueError for wrong types, which only a file or Python can give.

    Ranges of numbers are checked elsewhere.
    """
    for own in (settings, settings.columns):
        for name, hint in get_type_hints(type(own)).items():
            value = getattr(own, name)
            kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
            texts = isinstance(value, tuple) and all(isinstance(one, str) for one in value)
            fitting = {
                bool: ("true or false", isinstance(value, bool)),
                str: ("a text", isinstance(value, str)),
                tuple[str, ...]: ("texts", texts),
                type(None): ("", value is None),
            }
            known = [fitting[kind] for kind in kinds if kind in fitting]
            if len(known) == len(kinds) and not any(right for _, right in known):
                said = _OPTIONS[name] if own is settings.columns else name
                expected = " or ".join(expected for expected, _ in known if expected)
                raise ValueError(f"{said}: got {shown(value)}, expected {expected}")
    if type(settings.seed) is not int or not 0 <= settings.seed < 2**32:
        raise ValueError(f"seed: got {shown(settings.seed)}, expected an integer from 0 to 2**32 - 1")


def _check_reporting(names: tuple[str, ...]) -> None:
    """Raises ValueError for a name unknown to Trainer, ModuleNotFoundError if its package is missing."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to: got {shown(name)}, expected some of {known}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise ModuleNotFoundError(f"report_to: {name} cannot be used: {' '.join(str(error).split())}") from error


def chat_template(path: str | None) -> str | None:
    """The text of a file with a chat template. Raises ValueError if it cannot be read."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"template: {path!r} cannot be read: {error}") from error


def from_options(given: Mapping[str, Any], former: Mapping[str, Any] | None = None) -> Settings:
    """Settings from options by their names, with dashes or underscores; the rest is `former`'s, or the default.

    Args:
        given: from the command line or a file: the fields of `Settings`, with `text_column`, `label_column` and
            `no_header` instead of `columns` and `no_compare` instead of `compare`.
        former: the settings of `run.json`, the defaults of a resumed run.

    Raises:
        ValueError: an unknown name, which the message contains.
    """
    values = {name: value for name, value in (former or {}).items() if name in _FIELDS and name != "columns"}
    if isinstance(values.get("data"), str):  # the form of older versions
        values["data"] = (values["data"],)
    values.pop("dtype", None)  # the run's own is kept and reported
    if values.get("validation") is not None:  # the form of older versions
        values.pop("held_out", None)
    columns = dict((former or {}).get("columns", {}))
    names = {name.replace("-", "_"): value for name, value in given.items()}
    for name, value in names.items():
        if name in _OF_COLUMNS:
            columns[_OF_COLUMNS[name]] = str(value) if type(value) is int else value
        elif name in _NEGATED:
            if not isinstance(value, bool):
                raise ValueError(f"{name}: got {shown(value)}, expected true or false")
            {"no_header": columns, "no_compare": values}[name][_NEGATED[name]] = not value
        elif name in _FIELDS - {"columns", "compare"}:
            values[name] = _as_meant(name, value)
        else:
            known = sorted({*_FIELDS, *_OF_COLUMNS, *_NEGATED} - {"columns", "compare"})
            raise ValueError(f"{name}: is no setting of finetune, expected one of {', '.join(known)}")
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in names and other not in names:  # it replaces the former one
            values[other] = None
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Settings(**{**values, **tuples}, columns=Columns(**columns))


def _as_meant(name: str, value: Any) -> Any:
    """A file's value as the command line would give it: in YAML `1e-2` is text, and one item is no list."""
    if name == "layers" and type(value) is int:
        value = str(value)
    if isinstance(value, str):
        if name in ("learning_rate", "warmup", "clip", "epochs", "held_out"):
            with contextlib.suppress(ValueError):
                return float(value)
        if name in ("sites", "sample", "report_to", "data", "validation"):
            return (value,)
        if name == "layers":
            try:
                return layers(value)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"layers: {error}") from None
    return value


def as_options(settings: Settings) -> dict[str, Any]:
    """The settings for `from_options`, complete except for the output folder and its treatment."""
    options = {name.replace("_", "-"): value for name, value in settings.recorded().items() if name != "columns"}
    options["no-compare"] = not options.pop("compare")
    options["text-column"], options["label-column"] = settings.columns.text, settings.columns.label
    options["no-header"] = not settings.columns.header
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(options.items())}


def read_config(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file, by the names of the command line.

    Raises:
        ValueError: the file does not exist, is not YAML, or is not a mapping of names to values.
    """
    yaml = require("yaml", "a file of settings", "pyyaml")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config: {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"config: {str(path)!r} holds {shown(content)}, expected names of settings with their values")
    twice = [name for name in content if name.replace("-", "_") != name and name.replace("-", "_") in content]
    if twice:
        raise ValueError(f"config: {str(path)!r} has {listed(twice)} twice, with dashes and with underscores")
    return {name: value for name, value in content.items() if value is not None}


def write_config(settings: Settings, path: Path) -> None:
    """Write the settings, complete, as a file for `read_config`."""
    yaml = require("yaml", "a file of settings", "pyyaml")
    options = {name: value for name, value in as_options(settings).items() if value is not None}
    write_files(path.parent, {path.name: yaml.safe_dump(options, sort_keys=True, allow_unicode=True).encode()})


_FIELDS = {own.name for own in dataclasses.fields(Settings)}
