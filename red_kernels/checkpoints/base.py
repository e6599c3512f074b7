"""The base model of edits: its source, and loading it in its class of the training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ..support.base_models import (
    OWN_CODE,
    PACKAGED,
    class_named,
    explaining,
    forget_quantization,
    gguf_options,
    in_dtype,
    load_tokenizer,
    model_class,
    named_class,
    quietly,
    without_quantization,
)
from ..support.text import listed
from .folder import Head
from .hub import only_commit

__all__ = ["DTYPES", "Source", "load_source", "source_of", "source_tokenizer"]

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """The source of a base model.

    Attributes:
        name: as it is called.
        path: the local folder or file, if there is one.
        place: the argument of transformers' `from_pretrained`.
        options: its further arguments.
        gguf: whether it is a GGUF file.
    """

    name: str
    path: Path | None
    place: str
    options: dict[str, Any] = field(default_factory=dict)
    gguf: bool = False


def source_of(name: str, revision: str | None = None) -> Source:
    """The source of a base model.

    Args:
        name: the name of a packaged model, a folder, a `.gguf` file or an id of the hub.
        revision: branch, tag or commit; for an id of the hub only.

    Raises:
        FileNotFoundError: the folder has no `config.json`, or the file does not exist.
        ModuleNotFoundError: a package is missing; the message contains the pip command.
        ValueError: a revision, but no repository.
    """
    packaged = next((model for model in PACKAGED if model.name == name), None)
    path = packaged.locate() if packaged else Path(name)
    if revision is not None and (packaged or path.exists() or path.suffix == ".gguf"):
        raise ValueError(f"revision: got {revision!r}, but the base model {name!r} is not a repository of the hub")
    if path.suffix == ".gguf":
        return Source(name, path, str(path.resolve().parent), gguf_options(path), gguf=True)
    if not path.exists():
        return Source(name, None, name, {} if revision is None else {"revision": revision})
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model: the folder {name!r} has no config.json; expected one that save_pretrained wrote"
        )
    return Source(name, path, str(path))


def load_source(source: Source, dtype: Any, head: Head | None) -> Any:
    """The model in the class of its config, or in that of the head, in evaluation mode.

    Args:
        source: its source.
        dtype: of the weights; `"auto"` for that of its files, and fp32 for a GGUF file.
        head: a trained head to load into the model. It determines the class and the number of labels.

    Raises:
        ValueError: the model is quantised, damaged or lacks weights; no class of it fits the head.
        OSError: it cannot be found.
    """
    gguf = source.gguf
    wanted: Any = torch.float32 if gguf and dtype == "auto" else dtype
    place = source.name if source.path is None else str(source.path)
    with quietly(), explaining(place):
        config = transformers.AutoConfig.from_pretrained(
            source.place, **OWN_CODE, **without_quantization(source.options)
        )
    if not gguf and getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model: {source.name!r} is quantised; expected the base model in half or full precision")
    if head is not None:
        kind, config = _class_for(config, head, source.name)
    elif gguf:  # the format has only language models, and names no class
        kind = transformers.AutoModelForCausalLM
    else:
        kind = model_class(config, source.name)
    with quietly(), explaining(place):
        model, loading = kind.from_pretrained(
            source.place,
            config=config,
            dtype=torch.float32 if gguf else wanted,
            output_loading_info=True,
            ignore_mismatched_sizes=head is not None,  # of a head to be replaced; all others are refused below
            **source.options,
        )
        if gguf:
            forget_quantization(model)
            model = in_dtype(model, wanted)
    model.config._name_or_path = source.name
    revision = source.options.get("revision")
    if isinstance(revision, str) and revision == only_commit(source.name, revision):
        model.config._commit_hash = revision
    other = {str(entry[0]) for entry in loading["mismatched_keys"]}
    new = sorted(set(loading["missing_keys"]) | other)
    lacking = [name for name in new if head is None or name not in head.values]
    if lacking:
        held = ", and the trained head does not hold them" if head is not None else ""
        weights = f"{listed(lacking)} of a {type(model).__name__}"
        raise ValueError(
            f"model: the files of {source.name!r} lack the weights {weights}, which "
            f"would be random{held}; expected the base model of the edits"
        )
    return model.eval()


def _class_for(config: Any, head: Head, name: str) -> tuple[Any, Any]:
    """The class of model with a place for each parameter of a head, and the config with its number of labels."""
    for kind in _classes(config, head):
        for labels in _possible_labels(config, head):
            changed = copy.deepcopy(config)
            changed.id2label = labels
            changed.label2id = {label: number for number, label in labels.items()}
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                try:
                    model = kind(changed) if kind is not None else _classifier(changed)
                except ValueError:  # this config has no such class
                    continue
            shapes = {name: tuple(own.shape) for name, own in model.named_parameters(remove_duplicate=False)}
            if all(shapes.get(name) == tuple(value.shape) for name, value in head.values.items()):
                return type(model), changed
    shown = [f"{name} {tuple(value.shape)}" for name, value in head.values.items()]
    raise ValueError(f"model: {name!r} has no class with a place for the trained head ({listed(shown)})")


def _classes(config: Any, head: Head) -> list[Any]:
    """Classes to try, the likeliest first; None is the class for sequence classification."""
    found = [class_named(head.architecture), named_class(config)]
    fitting = [kind for kind in found if kind is not None and isinstance(config, kind.config_class or ())]
    return [*dict.fromkeys(fitting), None]


def _classifier(config: Any) -> Any:
    return transformers.AutoModelForSequenceClassification.from_config(config)


def _possible_labels(config: Any, head: Head) -> Iterator[dict[int, str]]:
    if head.labels is not None:
        yield head.labels
        return
    # Files of other programs do not state the number.
    yield dict(config.id2label)
    for count in sorted({value.shape[0] for value in head.values.values() if value.ndim}):
        yield {number: f"LABEL_{number}" for number in range(count)}


def source_tokenizer(source: Source) -> tuple[Any, str]:
    """The model's tokenizer; None, and the reason, if it has none. Raises ValueError as `load_tokenizer`."""
    return load_tokenizer(source.place, **without_quantization(source.options))
