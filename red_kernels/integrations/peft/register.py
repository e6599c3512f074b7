"""Registers the method with PEFT."""

from __future__ import annotations

from typing import Any

import peft
from peft import mapping
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from .config import RedPeftConfig, RedPeftType
from .model import RedModel

__all__ = ["register"]

_DICTIONARIES: dict[str, Any] = {
    "PEFT_TYPE_TO_CONFIG_MAPPING": RedPeftConfig,
    "PEFT_TYPE_TO_TUNER_MAPPING": RedModel,
    "PEFT_TYPE_TO_PREFIX_MAPPING": RedModel.prefix,
}
_TUNER = (  # the first is in 0.21: earlier versions list by name how each method is saved
    "_get_adapter_state_dict",
    "_remap_adapter_state_dict_for_load",
    "inject_adapter",
    "_prepare_model",
    "_prepare_adapter_config",
    "_replace_module",
    "_cast_adapter_dtype",
)
_LAYER = ("_active_adapter", "_disable_adapters", "_get_base_layer_device_and_dtype", "set_adapter", "merged_adapters")


def register() -> None:
    """Register RED with PEFT; no-op if it is registered.

    Raises:
        ImportError: PEFT lacks a required name, or has its own method of this name.
    """
    found: dict[str, Any] = {name: getattr(mapping, name, None) for name in _DICTIONARIES}
    lacking = [f"peft.mapping.{name}" for name, held in found.items() if not isinstance(held, dict)]
    lacking += [f"BaseTuner.{name}" for name in _TUNER if not hasattr(BaseTuner, name)]
    lacking += [f"BaseTunerLayer.{name}" for name in _LAYER if not hasattr(BaseTunerLayer, name)]
    if lacking:
        raise ImportError(
            f"peft {peft.__version__} has no {', '.join(lacking)}, which RED as a method of PEFT needs; install peft "
            "0.21 or later"
        )
    for name, value in _DICTIONARIES.items():
        held = found[name].get(RedPeftType.RED, value)
        if held is not value and held != value:
            raise ImportError(
                f"peft {peft.__version__} has a method 'RED' of its own, {held!r}; both cannot be registered"
            )
    for name, value in _DICTIONARIES.items():
        found[name][RedPeftType.RED] = value
