"""`red-kernels merge`: a base model and a folder of edits into a folder that plain transformers loads."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from ..checkpoints.checkpoint import Found, load_found, read
from ..checkpoints.folder import TENSORS_NAME, Head, config_of
from ..checkpoints.peft_folder import is_peft_folder, read_peft
from ..patching.patch import patch
from ..support.base_models import (
    OWN_CODE,
    PACKAGED,
    class_named,
    explaining,
    forget_quantization,
    gguf_options,
    load_tokenizer,
    model_class,
    named_class,
    quietly,
    without_quantization,
)
from ..support.output_folder import check_output, writing
from ..support.replaced import OutputFolder, refuse_overlap
from ..support.text import listed
from .merge import MergeReport, is_finite, merge, unfinite

__all__ = ["merge_folder"]

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge_folder(
    model: str,
    edits: str | Path,
    output: str | Path,
    *,
    dtype: str = "auto",
    force: bool = False,
    overwrite: bool = False,
    say: Callable[[str], object] | None = None,
) -> tuple[MergeReport, tuple[str, ...]]:
    """Merge saved edits into their base model, and save the whole as transformers does, with its tokenizer.

    A trained head beside the edits goes into a model of the class that it was trained in, with the names of its labels.
    The folder is written under a temporary name beside its place and put there in one step, with a `red_merge.json`
    that lists its files.

    Args:
        model: the base model's folder or hub id, a `.gguf` file, or the name of a packaged model.
        edits: a folder made by `rk.save_edits`, `red-kernels finetune` or `RedTrainer`, or of a RED adapter saved by
            PEFT.
        output: the folder to write.
        dtype: of the weights that are saved: `"auto"` (as the base model is stored; fp32 for a `.gguf` file), `"fp32"`,
            `"bf16"` or `"fp16"`.
        force: as for `rk.merge`.
        overwrite: replace the output folder, if it is one that this function wrote and holds nothing else.
        say: called with a line for each stage, before it begins.

    Returns:
        The `MergeReport`, and notes on what else there is to know.

    Raises:
        ValueError: an unknown dtype; edits that do not fit the model or cannot be merged; a head that fits no class of
            the model; a damaged file; an output that is, contains or is inside of the model or the edits.
        FileExistsError: the output is there without `overwrite`, is no folder that this function wrote, holds something
            else, or was made or changed by another process meanwhile.
        FileNotFoundError, OSError: model or edits cannot be found, the output cannot be written; what was there stays.
    """
    check_output(output, "output")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(map(repr, DTYPES))}")
    source = _source(model)
    inputs = {"the folder of the edits": Path(edits)}
    refuse_overlap(output, inputs if source.path is None else {"the base model": source.path, **inputs})
    target = OutputFolder(output, overwrite)
    found = read_peft(edits) if is_peft_folder(edits) else read(Path(edits))
    if found.description is None:
        raise ValueError(
            f"edits: {str(edits)!r} does not say where its edits belong; expected a folder with {TENSORS_NAME}, which "
            "red-kernels convert makes of the authors' form"
        )
    for name, value in {} if found.trained is None else found.trained.values.items():
        if not is_finite(value):
            raise ValueError(f"{found.head_source}: {name} is not finite ({unfinite(value)})")
    say = say or (lambda stage: None)
    with target.written() as folder:
        say(f"Loading the model: {model}")
        loaded, notes = _load(source, dtype, found.trained)
        patch(loaded, config_of(found.source, found.description))
        report = load_found(loaded, found, Path(edits), None, strict=True)
        notes += [*report.warnings, *_rounded(loaded, found)]
        say("Merging")
        merged = merge(loaded, force=force, keep_original=False)
        tokenizer = _tokenizer(source, notes)
        say(f"Writing {output}")
        with writing(output), quietly():
            loaded.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    return merged, (*notes, *target.notes)


@dataclass(frozen=True)
class _Source:
    """Where a base model comes from.

    Attributes:
        name: as it is called.
        path: the folder or file, if it is one here.
        place: what transformers' `from_pretrained` takes.
        options: further arguments of it.
    """

    name: str
    path: Path | None
    place: str
    options: dict[str, Any] = field(default_factory=dict)


def _source(name: str) -> _Source:
    packaged = next((model for model in PACKAGED if model.name == name), None)
    path = packaged.locate() if packaged else Path(name)
    if path.suffix == ".gguf":
        return _Source(name, path, str(path.resolve().parent), gguf_options(path))
    if not path.exists():
        return _Source(name, None, name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"model: the folder {name!r} has no config.json; expected one that save_pretrained wrote"
        )
    return _Source(name, path, str(path))


def _load(source: _Source, dtype: str, head: Head | None) -> tuple[Any, list[str]]:
    """The model in its own class, as its config names it, or in that of the head; and notes."""
    gguf = bool(source.options)
    wanted: Any = torch.float32 if gguf and dtype == "auto" else DTYPES[dtype]
    place = source.name if source.path is None else str(source.path)
    with quietly(), explaining(place):
        config = transformers.AutoConfig.from_pretrained(
            source.place, **OWN_CODE, **without_quantization(source.options)
        )
    if not gguf and getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"model: {source.name!r} is quantised; merge into the base model in half or full precision")
    if head is not None:
        kind, config = _class_for(config, head, source.name)
    elif gguf:  # the format knows language models only, and names no class
        kind = transformers.AutoModelForCausalLM
    else:
        kind = model_class(config, source.name)
    with quietly(), explaining(place):
        model, loading = kind.from_pretrained(
            source.place,
            config=config,
            dtype=torch.float32 if gguf else wanted,
            output_loading_info=True,
            ignore_mismatched_sizes=head is not None,  # of a head that is replaced; all others are refused below
            **source.options,
        )
        if gguf:
            forget_quantization(model)
            model = model.to(wanted)
    model.config._name_or_path = source.name
    other = {str(entry[0]) for entry in loading["mismatched_keys"]}
    new = sorted(set(loading["missing_keys"]) | other)
    lacking = [name for name in new if head is None or name not in head.values]
    if lacking:
        held = ", and the trained head does not hold them" if head is not None else ""
        weights = f"{listed(lacking)} of a {type(model).__name__}"
        raise ValueError(
            f"model: the files of {source.name!r} lack the weights {weights}, which "
            f"would be random{held}; expected the base model that the edits were trained on"
        )
    return model.eval(), []


def _class_for(config: Any, head: Head, name: str) -> tuple[Any, Any]:
    """The class of model that has a place for each parameter of a head, and the config with as many labels."""
    for kind in _classes(config, head):
        for labels in _possible_labels(config, head):
            changed = copy.deepcopy(config)
            changed.id2label = labels
            changed.label2id = {label: number for number, label in labels.items()}
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                try:
                    model = kind(changed) if kind is not None else _classifier(changed)
                except ValueError:  # there is no such class for this config
                    continue
            shapes = {name: tuple(own.shape) for name, own in model.named_parameters(remove_duplicate=False)}
            if all(shapes.get(name) == tuple(value.shape) for name, value in head.values.items()):
                return type(model), changed
    shown = [f"{name} {tuple(value.shape)}" for name, value in head.values.items()]
    raise ValueError(f"model: {name!r} has no class with a place for the trained head ({listed(shown)})")


def _classes(config: Any, head: Head) -> list[Any]:
    """Classes to try, the likeliest first; None stands for the one that classifies sequences."""
    found = [class_named(head.architecture), named_class(config)]
    fitting = [kind for kind in found if kind is not None and isinstance(config, kind.config_class or ())]
    return [*dict.fromkeys(fitting), None]


def _classifier(config: Any) -> Any:
    return transformers.AutoModelForSequenceClassification.from_config(config)


def _possible_labels(config: Any, head: Head) -> Iterator[dict[int, str]]:
    if head.labels is not None:
        yield head.labels
        return
    # Files of other programs do not say how many there are.
    yield dict(config.id2label)
    for count in sorted({value.shape[0] for value in head.values.values() if value.ndim}):
        yield {number: f"LABEL_{number}" for number in range(count)}


def _rounded(model: Any, found: Found) -> list[str]:
    """A note on a head that the model's dtype has rounded. Raises ValueError for one that is too large for it."""
    own = dict(model.named_parameters(remove_duplicate=False))
    values = {} if found.trained is None else found.trained.values
    over = [name for name in values if name in own and not is_finite(own[name])]
    if over:
        raise ValueError(
            f"{found.head_source}: {listed(over)} would overflow {own[over[0]].dtype}; merge into --dtype fp32 or bf16"
        )
    lost = [name for name, value in values.items() if name in own and not torch.equal(own[name].to(value.dtype), value)]
    if not lost:
        return []
    dtype = str(own[lost[0]].dtype).removeprefix("torch.")
    return [f"the head was rounded to {dtype} ({listed(lost)}); --dtype fp32 keeps what was trained"]


def _tokenizer(source: _Source, notes: list[str]) -> Any:
    """The model's tokenizer; None, with a note, where it has none."""
    tokenizer, reason = load_tokenizer(source.place, **without_quantization(source.options))
    if tokenizer is None:
        notes.append(f"no tokenizer was saved: {reason}")
    return tokenizer
