"""The vectors of a patched model for saving and loading: the effective values, and the Parameters for new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.find import edit_modules
from ..edits.module import RedEdit
from ..edits.named import active_edit, edit_names
from ..edits.selection import DEFAULT
from ..edits.vectors import EditVectors
from ..patching.module_facts import device_of
from ..support.sharded import refuse_partitioned, whole
from ..support.text import listed
from .vectors import SiteTensors

__all__ = ["Slot", "edit_tensors", "shared_sites", "slots", "values_of", "weights_device"]


def edit_tensors(model: nn.Module, name: str | None = None) -> dict[str, dict[str, Tensor]]:
    """The vectors of an edit with the values used by its forward: site to part to tensor of shape `(width,)`.

    A vector under a parametrization, weight norm or pruning is not a Parameter; it is computed here in the same way.

    Args:
        model: a patched model.
        name: of the edit; None for the active one.

    Raises:
        ValueError: the model is not patched or has no edit of that name; a vector is missing, has another shape, or has
            no values (on the meta device, partitioned).
    """
    found: dict[str, dict[str, Tensor]] = {}
    for site, own in _having(model, name).items():
        holder = own.holder(_wanted(model, name))
        found[site] = {part: _in_force(f"{site}.{part}", holder, part, own.width) for part in holder.parts}
    return found


def values_of(tensors: Mapping[str, Mapping[str, Tensor]]) -> SiteTensors:
    """Detached copies on the CPU, whole vectors. For sharded ones all processes of the mesh must call it."""
    return {
        site: {part: whole(own).to("cpu", copy=True).contiguous() for part, own in parts.items()}
        for site, parts in tensors.items()
    }


@dataclass(frozen=True)
class Slot:
    """The place of one vector: `holder._parameters[part]`."""

    holder: EditVectors
    part: str
    own: nn.Parameter
    width: int  # of the site's output

    def assign(self, value: Tensor) -> None:
        """Copy a value into the Parameter; one on the meta device has no memory and is replaced."""
        if self.own.is_meta:
            self.holder._parameters[self.part] = nn.Parameter(value.detach().clone(), self.own.requires_grad)
        else:
            with torch.no_grad():
                self.own.copy_(value)


def slots(model: nn.Module, name: str | None) -> dict[str, dict[str, Slot]]:
    """The targets for loading the vectors of an edit: site to part to place.

    Args:
        model: a patched model.
        name: of the edit; None for the active one.

    Raises:
        ValueError: the model is not patched or has no edit of that name; a vector is not a Parameter of its own.
    """
    found: dict[str, dict[str, Slot]] = {}
    bound: list[str] = []
    for site, own in _having(model, name).items():
        holder = own.holder(_wanted(model, name))
        found[site] = {}
        for part in holder.parts:
            parameter = holder._parameters.get(part)
            if parameter is None:
                bound.append(f"{site}.{part}")
            else:
                found[site][part] = Slot(holder, part, parameter, own.width)
    if bound:
        raise ValueError(
            f"model: {listed(bound)} cannot be loaded into: computed from other Parameters (a parametrization, weight "
            "norm, pruning) or held by a wrapper; remove that first (torch.nn.utils.parametrize."
            "remove_parametrizations), load, and apply it again"
        )
    return found


def shared_sites(model: nn.Module) -> dict[str, str]:
    """For each edited site the first one that has the same vectors: itself, unless the kind shares them."""
    first: dict[int, str] = {}
    return {site: first.setdefault(id(own.root), site) for site, own in edit_modules(model).items()}


def weights_device(model: nn.Module, site: str) -> torch.device:
    """The device of a site's weights, for its vectors. Raises ValueError if they are on the meta device."""
    edits = [module for module in model.modules() if isinstance(module, RedEdit)]
    vectors = {id(own) for module in edits for own in module.parameters()}
    module = model.get_submodule(site)
    for tensors in ((*module.parameters(), *module.buffers()), model.parameters()):
        others = [own for own in tensors if id(own) not in vectors]
        real = next((own.device for own in others if not own.is_meta), None)
        if real is not None:
            return real
        if others:
            break
    else:
        return torch.device("cpu")
    executed = device_of(module, model)  # accelerate's hook may know the weights' execution device
    if executed.type != "meta":
        return executed
    raise ValueError(
        f"model: the weights of {site} are on the meta device; load the base model's weights first, for example by "
        "load_state_dict(..., assign=True); rk.load_edits then allocates the vectors"
    )


def _having(model: nn.Module, name: str | None) -> dict[str, RedEdit]:
    wanted = _wanted(model, name)
    found: dict[str, RedEdit] = {}
    seen: set[int] = set()
    for site, own in edit_modules(model).items():
        if own.has(wanted) and id(own.root) not in seen:  # vectors that sites share are in the file once
            seen.add(id(own.root))
            found[site] = own
    if not found:
        names = ", ".join(map(repr, edit_names(model)))
        raise ValueError(f"name: got {name!r}, expected one of the model's edits: {names}")
    return found


def _wanted(model: nn.Module, name: str | None) -> str:
    if name is not None:
        return name
    active = active_edit(model)  # raises if parts of the model differ; inside disable_edits there is none
    return active or next(iter(edit_modules(model).values())).selection.chosen or DEFAULT


def _in_force(label: str, holder: EditVectors, part: str, width: int) -> Tensor:
    value: Any = holder._parameters.get(part)
    if value is None:
        value = _computed(holder, part)
    if not isinstance(value, Tensor):
        raise ValueError(f"model: {label} is missing; another library has removed it")
    if value.is_meta:
        raise ValueError(f"model: {label} is on the meta device and has no values to save")
    refuse_partitioned(label, value)
    assert holder.kind is not None
    expected = next(own.shape(width) for own in holder.kind.parts if own.name == part)
    if tuple(value.shape) != expected:
        raise ValueError(
            f"model: {label} has shape {tuple(value.shape)}, expected {expected}; if a wrapper shards it over several "
            "processes, gather it first (FullyShardedDataParallel.summon_full_params)"
        )
    return value.detach()


def _computed(holder: nn.Module, part: str) -> object:
    """A vector computed from other Parameters, as in the next forward."""
    hooks: list[Any] = list(holder._forward_pre_hooks.values())
    for hook in hooks:
        # Pruning, and weight norm and spectral norm of the older kind: the attribute may have a stale value.
        if part in (getattr(hook, "_tensor_name", None), getattr(hook, "name", None)):
            with torch.no_grad():
                if hasattr(hook, "apply_mask"):
                    return hook.apply_mask(holder)
                if hasattr(hook, "n_power_iterations"):
                    return hook.compute_weight(holder, do_power_iteration=False)
                if hasattr(hook, "compute_weight"):
                    return hook.compute_weight(holder)
    with torch.no_grad():
        return getattr(holder, part, None)
