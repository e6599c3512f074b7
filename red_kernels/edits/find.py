"""Finding the edits of a model, and the attributes that its patches have left."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .config import RedConfig
from .module import NAME, RedEdit
from .selection import DEFAULT

__all__ = [
    "STATE",
    "PatchState",
    "edit_modules",
    "edit_parameters",
    "merge_targets",
    "outer_modules",
    "patched_holders",
    "patches_of",
    "wrapper_of",
]

STATE = "_red_kernels_state"  # the attribute of the patched model that holds its PatchState


@dataclass
class PatchState:
    """The data of `unpatch` and `edit_config`; it stores names, so it is valid for a copy of the model too."""

    config: RedConfig
    were_trainable: set[str] = field(default_factory=set)
    merges: dict[str, tuple[str, str]] = field(default_factory=dict)  # site to `PlannedSite.norm` and `.bias_flag`


_State = PatchState  # the name in older pickles of patched models


def edit_parameters(model: nn.Module, name: str | None = None) -> dict[str, dict[str, nn.Parameter]]:
    """The vectors of a patched model: site name to the edit's parts (`"scale"`, `"bias"`, ...), in the model's order.

    Vectors that sites share are listed once, at the first of these sites.

    Args:
        model: a patched model.
        name: of the edit; None for the active one.

    Raises:
        ValueError: the model is not patched, or has no edit of that name.
    """
    found: dict[str, dict[str, nn.Parameter]] = {}
    names: dict[str, None] = {}
    seen: set[int] = set()
    for site, own in edit_modules(model).items():
        wanted = (own.selection.chosen or DEFAULT) if name is None else name
        names.update(dict.fromkeys(own.names))
        holder = own.holder(wanted) if own.has(wanted) else None
        if holder is not None and id(holder) not in seen:
            seen.add(id(holder))
            held = ((part, holder._parameters.get(part)) for part in holder.parts)
            found[site] = {part: vector for part, vector in held if vector is not None}
    if not found:
        raise ValueError(f"name: got {name!r}, expected one of the model's edits: {', '.join(map(repr, names))}")
    return found


def merge_targets(model: nn.Module) -> dict[str, tuple[str, str]]:
    """For each site the name in it of the norm that its edit can be merged into (`""` for the site itself), and the
    attribute of the model's config that gives it a bias (`""` for none). Raises ValueError if it is not patched."""
    return {
        f"{name}.{site}" if name else site: target
        for name, (_, state) in patches_of(model).items()
        for site, target in state.merges.items()
    }


def edit_modules(model: nn.Module) -> dict[str, RedEdit]:
    """The modules with the vectors, by the names of their sites.

    Raises:
        ValueError: the model is not patched.
    """
    found = {
        name.removesuffix(NAME).removesuffix("."): module
        for name, module in outer_modules(model)
        if isinstance(module, RedEdit)
    }
    if not found:
        raise ValueError(
            f"model: this {type(model).__name__} is not patched; call rk.patch(model, rk.RedConfig()) first"
        )
    return found


def patched_holders(model: nn.Module) -> dict[str, nn.Module]:
    """The patched models, `model` itself or some inside it, by name; none before `rk.patch`."""
    return {name: module for name, module in outer_modules(model) if isinstance(module.__dict__.get(STATE), PatchState)}


def outer_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """As `named_modules`, without the inside of modules with vectors: there may be thousands of edits."""
    found: dict[nn.Module, str] = {}

    def collect(module: nn.Module, name: str) -> None:
        if module in found:
            return
        found[module] = name
        for key, child in () if isinstance(module, RedEdit) else module._modules.items():
            if child is not None:
                collect(child, f"{name}.{key}" if name else key)

    collect(model, "")
    return [(name, module) for module, name in found.items()]


def patches_of(model: nn.Module) -> dict[str, tuple[nn.Module, PatchState]]:
    """The patched modules, the model itself or some inside it, by name; and the state of each."""
    found: dict[str, tuple[nn.Module, PatchState]] = {}
    edited = ""
    for name, module in model.named_modules():  # a wrapper of the patched model counts as patched
        state = module.__dict__.get(STATE)
        if isinstance(state, PatchState):
            found[name] = module, state
        if isinstance(module, RedEdit):
            edited = edited or name
    if not found:
        kind = type(model).__name__
        if edited:
            raise ValueError(
                f"model: this {kind} was patched through another model that holds {edited}; pass that model"
            )
        raise ValueError(f"model: this {kind} is not patched; call rk.patch(model, rk.RedConfig()) first")
    return found


_WRAPPERS = (
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
    "PipelineEngine",
)


def wrapper_of(module: nn.Module) -> str | None:
    """The name of the class that wraps a module for distributed training, or None."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _WRAPPERS), None)
