"""A weighted combination of adapters: `RedModel.add_weighted_adapter`."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper

from ...edits.kinds import KINDS, PARTS, kind_named
from ...edits.module import NAME
from ...support.text import listed
from .layer import RedLayer

__all__ = ["check", "config_of", "fill"]

_TARGETS = ("target_modules", "feedforward_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def check(model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], name: str, combination: str) -> None:
    """Raises TypeError or ValueError for arguments that `add_weighted_adapter` refuses."""
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"adapters: got {adapters!r}, expected a list of names")
    for adapter in adapters:
        if adapter not in model.peft_config:
            known = listed([repr(own) for own in model.peft_config])
            raise ValueError(f"adapters: Adapter {adapter!r} does not exist, expected some of {known}")
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != len(adapters):
        raise ValueError(f"weights: got {weights!r}, expected a number for each of {listed(list(map(repr, adapters)))}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, Real) or not -math.inf < weight < math.inf:
            raise TypeError(f"weights: got {weight!r}, expected finite numbers")
    if combination != "linear":
        raise ValueError(f"combination_type: got {combination!r}, expected 'linear', RED's only one")
    if name in model.peft_config:
        raise ValueError(f"adapter_name: the model has an adapter {name!r} already")
    layer = next(own for own in model.modules() if isinstance(own, RedLayer))
    taken = isinstance(name, str) and (name in (NAME, *PARTS) or hasattr(layer.red_edit, name))
    if not isinstance(name, str) or not name or "." in name or taken:
        raise ValueError(f"adapter_name: got {name!r}, which cannot be the name of an adapter; choose another one")
    kinds = {adapter: kind_named(_config(model, adapter).kind) for adapter in adapters}
    for adapter, kind in kinds.items():
        if not kind.combinable or kind.formula is not kinds[adapters[0]].formula:
            raise ValueError(
                f"adapters: {adapter!r} is of kind {kind.name!r}, which cannot be combined by weights with all others"
            )
    copies = [own for own in model.modules() if isinstance(own, ModulesToSaveWrapper)]
    if any(sum(adapter in own.modules_to_save for adapter in set(adapters)) > 1 for own in copies):
        raise ValueError(
            "adapters: several have their own copies of the same modules_to_save, which cannot be combined by weights"
        )


def config_of(model: BaseTuner, adapters: Sequence[str]) -> Any:
    """The new adapter's config: all sites and all vectors of the adapters."""
    configs = [_config(model, adapter) for adapter in adapters]
    made = copy.deepcopy(configs[0])
    made.inference_mode = False
    kinds = {config.kind for config in configs}
    made.kind = _kind_of_all(kinds)
    dtype = getattr(torch, configs[0].vector_dtype)
    for config in configs[1:]:
        dtype = torch.promote_types(dtype, getattr(torch, config.vector_dtype))
    made.vector_dtype = str(dtype).removeprefix("torch.")
    made.init_weights = True
    if any(getattr(config, field) != getattr(configs[0], field) for config in configs for field in _TARGETS):
        edited = {
            site: layer.red_edit.on_input
            for site, layer in model.model.named_modules()
            if isinstance(layer, RedLayer) and any(adapter in layer.red_edit for adapter in adapters)
        }
        made.target_modules = set(edited)
        made.feedforward_modules = {site for site, on_input in edited.items() if on_input} or None
        made.exclude_modules = made.layers_to_transform = made.layers_pattern = None
    saved = [config.modules_to_save for config in configs if config.modules_to_save]
    made.modules_to_save = sorted({name for names in saved for name in names}) or None
    return made


def fill(model: BaseTuner, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Give the new adapter its values, and its copy of the modules that one of the adapters has trained whole."""
    with torch.no_grad():
        for layer in model.modules():
            if not isinstance(layer, RedLayer) or name not in layer.red_edit:
                continue
            for part, target in layer.red_edit.holder(name)._parameters.items():
                if target is None:
                    continue
                start = PARTS[part].start
                changed = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
                for adapter, weight in zip(adapters, weights, strict=True):
                    held = layer.red_edit.holder(adapter)._parameters if adapter in layer.red_edit else {}
                    vector = held.get(part)
                    if vector is not None:
                        changed += float(weight) * (vector.to(changed) - start)
                target.copy_(start + changed)
                target.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for adapter in adapters:
                if adapter in module.modules_to_save:
                    module.modules_to_save[name] = copy.deepcopy(module.modules_to_save[adapter]).requires_grad_(False)


def _kind_of_all(kinds: set[str]) -> str:
    """The kind with the parts of all of these, which share one formula."""
    parts = {part for kind in kinds for part in kind_named(kind).names}
    first = kind_named(next(iter(kinds)))
    formula = first.formula
    if first.name not in KINDS:  # with an option: all are equal
        return first.name
    fitting = (name for name, kind in KINDS.items() if kind.formula is formula and parts <= set(kind.names))
    return min(fitting, key=lambda name: len(KINDS[name].parts))


def _config(model: BaseTuner, adapter: str) -> Any:
    return model.peft_config[adapter]
