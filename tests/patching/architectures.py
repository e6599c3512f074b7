"""Every architecture of transformers' auto mappings, tiny and with random weights, made from its own configuration.

`python tests/patching/architectures.py [task] [model_type ...]` counts how many build, run and have gradients, and says
why the others do not. What makes them tiny is in `architecture_sizes`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from architecture_sizes import AUDIO, FULL, IMAGE, LENGTH, VOCABULARY, WIDTH, shrunk
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

TASKS = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "image-classification": "IMAGE_CLASSIFICATION",
    "audio-classification": "AUDIO_CLASSIFICATION",
    "ctc": "CTC",
    "speech-seq2seq": "SPEECH_SEQ_2_SEQ",
    "sequence-classification": "SEQUENCE_CLASSIFICATION",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
}
FIRST_ORDINARY = 80  # token ids from here on are no special tokens
MOST_PARAMETERS = 5_000_000
BATCH = 2


class Unbuildable(Exception):
    """Why an architecture cannot be had here."""


@dataclass(frozen=True)
class Architecture:
    task: str
    model_type: str
    class_name: str
    config_name: str

    @property
    def config_class(self) -> type[transformers.PreTrainedConfig]:
        return CONFIG_MAPPING[self.model_type]

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.class_name)

    def __str__(self) -> str:
        return f"{self.task}:{self.model_type}"


def architectures(task: str | None = None) -> list[Architecture]:
    """All of a task, or of all tasks, in the order of the mappings; nothing is imported for it."""
    found = []
    for name, mapping in TASKS.items():
        if task not in (None, name):
            continue
        for model_type, classes in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for class_name in [classes] if isinstance(classes, str) else classes:
                found.append(Architecture(name, model_type, class_name, CONFIG_MAPPING_NAMES[model_type]))
    return found


def tiny_config(architecture: Architecture) -> transformers.PreTrainedConfig:
    """The configuration that the model is made from: of the text model alone where the model is one."""
    config = shrunk(
        architecture.config_class(**copy.deepcopy(FULL.get(architecture.model_type, {}))), architecture.task
    )
    wanted = architecture.model_class.config_class
    parts = [config, *(each for each in vars(config).values() if isinstance(each, transformers.PreTrainedConfig))]
    if wanted is not None and not isinstance(config, wanted):
        config = next((each for each in parts[1:] if isinstance(each, wanted)), config)
    for part in parts:
        if getattr(part, "pad_token_id", 0) is None:
            part.pad_token_id = 0
    return config


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """A fixed seed, and memory that nobody has written to reads as NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def build(architecture: Architecture) -> nn.Module:
    """Tiny, in float32, in evaluation mode; its weights are random, and none of them stays at zero or one."""
    try:
        config = tiny_config(architecture)
        model_class = architecture.model_class
        importlib.import_module(model_class.__module__)
        with _reproducible():
            model = model_class(config).float().eval()
            _stir(model)
    except Exception as error:
        raise Unbuildable(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    size = sum(weight.numel() for weight in model.parameters())
    if size > MOST_PARAMETERS:
        raise Unbuildable(f"{size:,} parameters")
    return model


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Initial weights are often nought or one (norms, gates, scales), or so small that a layer hardly matters."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.masked_fill_(weight.isnan(), 0.0)
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.masked_fill_(buffer.isnan(), 0.0)


def _noise(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(1))


def _ids(length: int = LENGTH, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_ORDINARY, VOCABULARY, (BATCH, length), generator=generator)


def _first(config: Any, *names: str, otherwise: Any = None) -> Any:
    """The first of these that is set, the configuration's own or that of its vision part."""
    parts = [getattr(config, part, None) for part in ("vision_config", "vq_config", "encoder", "encoder_config")]
    found = (getattr(part, name, None) for part in (config, *parts) for name in names)
    return next((each for each in found if each is not None), otherwise)


def _images(config: Any, taken: Iterable[str]) -> Iterator[dict[str, Any]]:
    """An image per row, as one model or another takes it: whole, in crops, or cut into patches."""
    channels = _first(config, "num_channels", "in_channels", "in_chans", otherwise=3)
    patch = _first(config, "patch_size", otherwise=8)
    patch = patch if isinstance(patch, int) else patch[-1]
    sides = _first(config, "image_size", "input_size", otherwise=IMAGE)
    height, width = (sides, sides) if isinstance(sides, int) else sides[-2:]
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH), "image_grid_hw": torch.tensor([[4, 4]] * BATCH)}
    grid |= {"image_sizes": torch.tensor([[height, width]] * BATCH), "spatial_shapes": grid["image_grid_hw"]}
    grid |= {"target_sizes": grid["image_grid_hw"], "image_merge_sizes": torch.tensor([1] * BATCH)}
    grid |= {"pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.int64)} if "spatial_shapes" in taken else {}
    grid = {name: value for name, value in grid.items() if name in taken}
    flat = channels * _first(config, "temporal_patch_size", "patch_temporal", otherwise=1) * patch**2
    if "image_grid_thw" not in taken and "spatial_shapes" not in taken:
        for shape in ((), (1,), (5,)):
            pixels = {"pixel_values": _noise(*shape, channels, height, width)}
            yield from ([grid | pixels, pixels] if grid else [pixels])
    yield grid | {"pixel_values": _noise(16, flat)}
    yield grid | {"pixel_values": _noise(16, flat).flatten(0, 1)}
    yield grid | {"pixel_values": _noise(16, channels, patch, patch).flatten(0, 1)}
    yield grid | {"pixel_values": _noise(16, channels, patch, patch).flatten(0, 1)[None]}


def _sounds(config: Any, taken: Iterable[str]) -> Iterator[dict[str, Any]]:
    mask = torch.ones(BATCH, AUDIO, dtype=torch.int64)
    yield {"input_features": _noise(AUDIO, AUDIO)} | (
        {"input_features_mask": mask} if "input_features_mask" in taken else {}
    )
    yield {"input_values": _noise(1600)}
    yield {"input_values": _noise(1, 1600)}


def _placed(model: Any, batch: dict[str, Any], given: dict[str, Any], kind: str) -> dict[str, Any]:
    """The batch with images or audio, and as many tokens for them as the model makes features of them."""
    taken = inspect.signature(model.forward).parameters
    held = (getattr(model.config, f"{kind}_token_{end}", None) for end in ("id", "index"))
    token = next((each for each in held if each is not None), None)
    parts = (getattr(part, f"get_{kind}_features", None) for part in (model, getattr(model, "model", None)))
    getter = next((each for each in parts if each is not None), None)
    if getter is None or "image_embeds_position_mask" in batch:
        return batch | given
    if token is None:
        raise LookupError(f"no token stands for the {kind}")
    wanted = inspect.signature(getter).parameters
    passed = given if {"args", "kwargs"} >= wanted.keys() else {n: v for n, v in (batch | given).items() if n in wanted}
    output = getter(**passed)
    features = getattr(output, "pooler_output", None)
    features = next(tensors(output)) if features is None else features
    count = sum(each.numel() // each.shape[-1] for each in tensors(features)) // BATCH
    ids = batch["input_ids"]
    ids = torch.cat([ids[:, :2], torch.full((BATCH, count), token), ids[:, 2:]], dim=1)
    types = {name: (ids == token).long() for name in taken if name in _TYPES}
    return batch | given | {"input_ids": ids} | types


_AUDIO, _PICTURES = {"input_features", "input_values"}, {"pixel_values", "flattened_patches"}
_TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")


@torch.no_grad()
def _with(model: Any, batch: dict[str, Any], candidates: Iterable[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The first of the candidates that the model takes, in its batch; the text alone where it takes none of them."""
    for given in candidates:
        with contextlib.suppress(Exception):
            placed = _placed(model, batch, given, kind)
            model(**placed)
            return placed
    return batch


def inputs(architecture: Architecture, model: nn.Module) -> dict[str, Any]:
    """A small batch for the model's forward pass: what its main input is, and what its task adds to that."""
    config: Any = model.config
    task = architecture.task
    taken = inspect.signature(model.forward).parameters
    main: Any = model.main_input_name
    batch: dict[str, Any] = {}
    if main == "inputs" and task == "speech-seq2seq":
        main = "input_values"
    if (main == "pixel_values" or task == "image-classification") and "input_ids" not in taken:
        batch |= next(_images(config, taken))
    elif main == "input_values":
        batch["input_values"] = _noise(1600)
    elif main == "input_features":  # as many frames as bands: models differ in which of them comes first
        batch["input_features"] = _noise(AUDIO, AUDIO)
    if "input_ids" in taken or main == "inputs":
        batch["input_ids"] = _ids()
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        batch["decoder_input_ids"] = _ids(seed=2)
        if task == "sequence-classification":  # read at the end of the text
            del batch["decoder_input_ids"]
            batch["input_ids"][:, -1] = config.eos_token_id
    if "use_cache" in taken:
        batch["use_cache"] = False
    if "bbox" in taken:
        batch["bbox"] = torch.tensor([1, 2, 3, 4]).expand(BATCH, LENGTH, 4)
    if main == "inputs":
        batch = {"inputs": batch["pixel_values" if "pixel_values" in batch else "input_ids"]}
    if (added := INPUTS.get(architecture.model_type)) is not None:
        batch |= added(model)
    if task.startswith("image") and "input_ids" in batch and "pixel_values" in taken and "pixel_values" not in batch:
        batch = _with(model, batch, _images(config, taken), "image")
    if "seq2seq" in task and _AUDIO & taken.keys() and not _AUDIO & batch.keys():
        batch = _with(model, batch, _sounds(config, taken), "audio")
    return batch


def _as_assistant(model: Any) -> dict[str, Any]:
    """The keys and values of the model that it assists."""
    text = model.config.get_text_config()
    layers = {kind: text.per_layer_config[kind] for kind in dict.fromkeys(text.layer_types)}
    shapes = {kind: (each.num_key_value_heads, LENGTH, each.head_dim) for kind, each in layers.items()}
    states = {kind: (_noise(*shape), _noise(*shape)) for kind, shape in shapes.items()}
    places = torch.arange(LENGTH).expand(BATCH, -1)
    embeddings = _noise(LENGTH, 2 * model.config.backbone_hidden_size)
    # With all hidden states asked for, it does without a short cut that more than one token breaks.
    return {
        "inputs_embeds": embeddings,
        "shared_kv_states": states,
        "position_ids": places,
        "output_hidden_states": True,
    }


def _after(count: int, token: int) -> Tensor:
    return torch.cat([torch.full((BATCH, count), token), _ids()], dim=1)


# fmt: off
INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {  # by model type: what is added to the batch
    "audio-spectrogram-transformer": lambda model: {"input_values": _noise(AUDIO, AUDIO)},
    "dia": lambda model: {"decoder_input_ids": _ids(LENGTH * 9, seed=2).view(BATCH, LENGTH, 9)},
    "gemma4_assistant": _as_assistant,
    "gemma4_unified_assistant": _as_assistant,
    "idefics": lambda model: {"pixel_values": _noise(1, 3, IMAGE, IMAGE),
                              "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.int64)},
    "instructblip": lambda model: {"qformer_input_ids": _ids(seed=3)},
    "instructblipvideo": lambda model: {"qformer_input_ids": _ids(seed=3), "input_ids": _after(64, 40),
                                        "pixel_values": _noise(2, 3, IMAGE, IMAGE)},
    "kosmos-2": lambda model: {"input_ids": _after(64, FIRST_ORDINARY),
                               "image_embeds_position_mask": (_after(64, 0) == 0).long()},
    "kyutai_speech_to_text": lambda model: {"input_ids": _ids(LENGTH * 3).view(BATCH, LENGTH, 3)},
    "molmo2": lambda model: {"mm_token_type_ids": torch.zeros(BATCH, LENGTH, dtype=torch.int64)},
    "omniasr_ctc": lambda model: {"input_values": _noise(1, 1600)},
    "pi0": lambda model: {"state": _noise(32), "noise": _noise(8, 32), "timestep": torch.ones(BATCH) / 2,
                          "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool)},
    "pix2struct": lambda model: {"flattened_patches": _noise(16, 2 + WIDTH).abs().clamp(max=3)},
    "voxtral_realtime": lambda model: {"input_features": _noise(AUDIO, AUDIO)},
}
# fmt: on


def tensors(output: Any) -> Iterator[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for each in output.values():
            yield from tensors(each)
    elif isinstance(output, (list, tuple)):
        for each in output:
            yield from tensors(each)


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """One forward pass, as one number that all of the output's values have a part in."""
    total = torch.zeros((), dtype=torch.float32)
    with torch.random.fork_rng():  # a few models draw something in every pass
        torch.manual_seed(0)
        output = model(**inputs)
    for value in tensors(output):
        if value.is_floating_point() and value.requires_grad:
            pattern = torch.cos(torch.arange(value.numel(), dtype=torch.float32, device=value.device))
            finite = value.float().masked_fill(value.abs() > 1e30, 0.0)  # masked logits
            total = total.to(value.device) + (finite.flatten() * pattern).sum()
    return total


class _Late(BaseException):
    """Not to be caught as a model's own error."""


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise _Late(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _try(architecture: Architecture) -> tuple[list[str], str]:
    """What of it was done ("build", "run", "differentiate"), and why no more ("" where all was)."""
    done: list[str] = []
    try:
        with _limit(20):
            model = build(architecture)
            done.append("build")
            batch = inputs(architecture, model)
            kinds = {"image-text-to-text": _PICTURES, "seq2seq-lm": _AUDIO, "speech-seq2seq": _AUDIO}
            more = kinds.get(architecture.task, set()) & inspect.signature(model.forward).parameters.keys()
            if more and not more & batch.keys():
                done.append("take text alone")
            total = run(model, batch)
            if not total.isfinite():
                return done, f"run: the sum is {total.item()}"
            done.append("run")
            total.backward()
            done.append("differentiate")
            return done, ""
    except (Exception, _Late) as error:
        place = traceback.extract_tb((error.__cause__ or error).__traceback__)[-1]
        where = f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}"
        doing = next(what for what in ("build", "run", "differentiate") if what not in done)
        return done, f"{doing}: {type(error).__name__}: {' '.join(str(error).split())[:300]} [{where}]"


def main(arguments: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    task = arguments[0] if arguments and arguments[0] in TASKS else None
    only = arguments[1:] if task else arguments
    for name in [task] if task else TASKS:
        here = [each for each in architectures(name) if not only or each.model_type in only]
        counts: Counter[str] = Counter()
        for each in here:
            done, why = _try(each)
            counts.update(done)
            if why:
                print(f"  {each} ({each.class_name}) {why}", flush=True)
        told = ", ".join(f"{counts[what]} {what}" for what in ("build", "run", "differentiate", "take text alone"))
        print(f"{name}: {len(here)} architectures: {told}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
