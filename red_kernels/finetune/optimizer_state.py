"""The state of an optimizer with sharded parameters, in the form of a single process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..support.sharded import placed_as, whole

__all__ = ["for_groups", "gathered", "spread_over"]


def gathered(optimizer: Any, groups: list[list[Tensor]]) -> dict[str, Any]:
    """The state of an optimizer with whole tensors on the CPU; all processes must call it.

    Args:
        optimizer: one of torch, or accelerate's wrapper of it.
        groups: its parameters in the groups and the order of the state. Its own groups may differ: Trainer makes one
            for each mesh.
    """
    options = {id(own): group for group in optimizer.param_groups for own in group["params"]}
    state: dict[int, dict[str, Any]] = {}
    described = []
    number = 0
    for group in groups:
        numbers = list(range(number, number + len(group)))
        number += len(group)
        of_group = options[id(group[0])] if group else optimizer.param_groups[0]
        described.append({**of_group, "params": numbers})
        for own, place in zip(group, numbers, strict=True):
            if own in optimizer.state:
                state[place] = {
                    name: whole(value).cpu() if isinstance(value, Tensor) else value
                    for name, value in optimizer.state[own].items()
                }
    return {"state": state, "param_groups": described}


def spread_over(found: Mapping[str, Any], groups: list[list[Tensor]], optimizer: Any) -> dict[str, Any]:
    """The result of `gathered` for `optimizer.load_state_dict`: each process keeps its part of the tensors."""
    place: dict[int, tuple[int, Any]] = {}
    for saved, group in zip(found["param_groups"], groups, strict=True):
        place |= {id(own): (number, saved) for number, own in zip(saved["params"], group, strict=True)}
    state: dict[int, dict[str, Any]] = {}
    described = []
    for group in optimizer.param_groups:
        numbers = list(range(len(state), len(state) + len(group["params"])))
        options = place[id(group["params"][0])][1] if group["params"] else group
        described.append({**options, "params": numbers})
        for own, number in zip(group["params"], numbers, strict=True):
            state[number] = {
                name: placed_as(value, own) if isinstance(value, Tensor) and value.dim() else value
                for name, value in found["state"].get(place[id(own)][0], {}).items()
            }
    return {"state": {number: own for number, own in state.items() if own}, "param_groups": described}


def for_groups(scheduler: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The state of a scheduler with any number of groups of one rate, for `count` groups."""
    each = ("base_lrs", "_last_lr", "lr_lambdas")
    return {name: [value[0]] * count if name in each and value else value for name, value in scheduler.items()}
