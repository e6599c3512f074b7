"""Trainers of TRL for a patched model and tokenised data: SFT on answers, and DPO on pairs of answers.

TRL is optional, and imported when a trainer is requested: `pip install red-kernels[train]` installs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..edits.named import disable_edits
from ..integrations.trainer import RedTrainer
from ..support.bars import bars_on_terminals_only
from ..support.require import require
from .data.packing import LENGTHS, PackedCollator, check_packing

__all__ = ["CHECKPOINTING", "BaseWithoutEdits", "dpo_class", "dpo_trainer", "sft_class", "sft_trainer"]

_PACKAGES = "red-kernels[train]"
# transformers 5.24 warns of the former name; 5.17 has only that one.
_FORMER = "gradient_checkpointing"
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else _FORMER
)
# As in transformers' own arguments; TRL's defaults differ. Autocast and checkpointing are the caller's choice.
_DEFAULTS = {"bf16": False, CHECKPOINTING: False, "report_to": "none"}
# The examples are cut, packed and masked already.
_SFT = {
    "max_length": None,
    "packing": False,
    "padding_free": False,
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
}
_DPO = {"max_length": None, "sync_ref_model": False, "remove_unused_columns": False}


class BaseWithoutEdits(nn.Module):
    """The base model of a patched model, as a separate model: the same weights with all edits off.

    It has no parameters: they stay in the patched model, and nothing is in memory twice. A call returns the base
    model's output, bit for bit; the training mode is that of the patched model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._patched = (model,)  # a tuple, so that it is not a submodule

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self._patched[0].config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Not forward: TRL replaces each model's forward, and the replacement would run the layers outside the block.
        with disable_edits(self._patched[0]):
            return self._patched[0](*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as a call."""
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # TRL names its cache of reference values by it
        """The state dict of the patched model."""
        return self._patched[0].state_dict(*args, **kwargs)


def sft_class(base: type[RedTrainer] = RedTrainer) -> type[Any]:
    """`RedSFTTrainer`: TRL's SFTTrainer with the checkpoints of `base`. Raises ModuleNotFoundError without TRL."""
    trl: Any = require("trl", "fine-tuning on answers by TRL", _PACKAGES)
    return type("RedSFTTrainer", (base, trl.SFTTrainer), {"__doc__": "SFTTrainer whose checkpoints hold the edits."})


def dpo_class(base: type[RedTrainer] = RedTrainer) -> type[Any]:
    """`RedDPOTrainer`: TRL's DPOTrainer with the checkpoints of `base`, for pairs that are tokenised already.

    Raises:
        ModuleNotFoundError: TRL is not installed.
    """
    trl: Any = require("trl", "fine-tuning on preferences by TRL", _PACKAGES)

    def prepare(self: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if "prompt_ids" in dataset.column_names:
            return dataset
        return trl.DPOTrainer._prepare_dataset(self, dataset, *args, **kwargs)

    names = {"__doc__": "DPOTrainer whose checkpoints hold the edits.", "_prepare_dataset": prepare}
    return type("RedDPOTrainer", (base, trl.DPOTrainer), names)


def sft_trainer(
    model: nn.Module,
    tokenizer: Any,
    train: Any,
    arguments: Mapping[str, Any],
    *,
    held_out: Any = None,
    base: type[RedTrainer] = RedTrainer,
    **options: Any,
) -> Any:
    """TRL's SFTTrainer for a patched model.

    Args:
        model: patched by `rk.patch`.
        tokenizer: the model's.
        train: a result of `chat_dataset` or `packed`, or any dataset of `input_ids` and `labels`.
        arguments: for `trl.SFTConfig`. Those about preparing data are fixed; bf16 and checkpointing are off by default.
        held_out: for evaluation, tokenised alike; packed if `train` is.
        base: RedTrainer or a subclass.
        options: of the trainer, such as `callbacks` and `optimizers`.

    Raises:
        ModuleNotFoundError: TRL is not installed; the message has the command.
        ValueError: the model is not patched, an argument prepares data, or packing does not fit the model.
    """
    kind = sft_class(base)
    given = _arguments("sft_trainer", arguments, _SFT)
    parts = [part for part in (train, held_out) if part is not None]
    packs = {LENGTHS in part[0] for part in parts}
    if len(packs) > 1:
        raise ValueError("held_out: and train: one is packed; expected both packed, or none")
    if packs == {True}:
        check_packing(model)
        options["data_collator"] = PackedCollator()
    trl: Any = require("trl", "fine-tuning on answers by TRL", _PACKAGES)
    return _made(kind, model, tokenizer, trl.SFTConfig(**given), train, held_out, options)


def dpo_trainer(
    model: nn.Module,
    tokenizer: Any,
    train: Any,
    arguments: Mapping[str, Any],
    *,
    held_out: Any = None,
    base: type[RedTrainer] = RedTrainer,
    **options: Any,
) -> Any:
    """TRL's DPOTrainer for a patched model, whose reference is the same model with its edits off.

    Args:
        model: patched by `rk.patch`.
        tokenizer: the model's.
        train: a result of `preference_dataset`.
        arguments: for `trl.DPOConfig`, for example `beta`; else as in `sft_trainer`.
        held_out: for evaluation, tokenised alike.
        base: RedTrainer or a subclass.
        options: of the trainer, such as `callbacks` and `optimizers`.

    Raises:
        ModuleNotFoundError: TRL is not installed; the message has the command.
        ValueError: the model is not patched, an argument prepares data, or the parameters are sharded (DeepSpeed,
            FSDP), for which there is no reference without its own parameters.
    """
    kind = dpo_class(base)
    given = _arguments("dpo_trainer", arguments, _DPO)
    sharded = [name for name in ("deepspeed", "fsdp") if given.get(name)]
    if sharded:
        raise ValueError(f"arguments: {sharded[0]} is set, expected parameters that are not sharded for DPO")
    trl: Any = require("trl", "fine-tuning on preferences by TRL", _PACKAGES)
    options["ref_model"] = BaseWithoutEdits(model)
    return _made(kind, model, tokenizer, trl.DPOConfig(**given), train, held_out, options)


def _arguments(function: str, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration. Raises ValueError for another value of a fixed one."""
    for name, value in fixed.items():
        if name in given and given[name] != value:
            raise ValueError(
                f"arguments: {name} is {given[name]!r}, expected {value!r}: {function} takes tokenised data"
            )
    defaults = {name: value for name, value in _DEFAULTS.items() if name != CHECKPOINTING or _FORMER not in given}
    return {**defaults, **given, **fixed}


def _made(
    kind: type[Any],
    model: nn.Module,
    tokenizer: Any,
    arguments: Any,
    train: Any,
    held_out: Any,
    options: Mapping[str, Any],
) -> Any:
    tables = [None if part is None else _table(part) for part in (train, held_out)]
    with bars_on_terminals_only():
        return kind(
            model=model,
            args=arguments,
            train_dataset=tables[0],
            eval_dataset=tables[1],
            processing_class=tokenizer,
            **options,
        )


def _table(dataset: Any) -> Any:
    """A dataset of any type as one of datasets, which TRL needs."""
    datasets: Any = require("datasets", "training by TRL", _PACKAGES)
    if isinstance(dataset, datasets.Dataset):
        return dataset
    rows: Sequence[Mapping[str, Any]] = [dataset[place] for place in range(len(dataset))]
    lists = [
        {name: value.tolist() if hasattr(value, "tolist") else value for name, value in row.items()} for row in rows
    ]
    return datasets.Dataset.from_list(lists)
