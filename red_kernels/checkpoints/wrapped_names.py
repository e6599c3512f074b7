"""The sites' names at the time of the patch, whatever wrappers are now around them or the model.

PEFT's `get_peft_model` turns `model.layers.0.mlp.down_proj` into
`base_model.model.model.layers.0.mlp.down_proj.base_layer`. Files of edits keep the former name, so they load with and
without the wrapper.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from ..edits.find import edit_modules, patched_holders
from ..edits.module import SITE, RedEdit
from .site_names import match_sites

__all__ = [
    "bare_name",
    "bare_sites",
    "former_name",
    "inner_model",
    "lora_around",
    "match_wrapped",
    "renamed_sites",
    "unwrapped",
]

_Value = TypeVar("_Value")

# Name parts of wrappers: PEFT's layers, torch.compile, activation checkpointing, FSDP 1. For names without a model,
# in files of earlier versions; a model has the former names of its sites.
_PARTS = frozenset({"base_layer", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def unwrapped(name: str) -> str:
    """A dotted name without the parts that wrappers of layers insert."""
    return ".".join(part for part in name.split(".") if part not in _PARTS)


def inner_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The patched model, by its name in `model`: without its wrappers, PEFT's model included.

    It is `model` itself if several parts were patched, or none by `rk.patch`.
    """
    holders = patched_holders(model)
    if len(holders) != 1:
        return "", model
    name, holder = next(iter(holders.items()))
    if callable(getattr(type(holder), "get_base_model", None)):
        wrapped: Any = holder
        base = wrapped.get_base_model()
        for path, module in holder.named_modules():
            if module is base:
                return ".".join(part for part in (name, path) if part), base
    return name, holder


def bare_name(model: nn.Module, name: str) -> str:
    """The name of a parameter or a module of a model without wrappers."""
    prefix, _ = inner_model(model)
    return unwrapped(name.removeprefix(f"{prefix}.") if prefix else name)


def bare_sites(model: nn.Module) -> dict[str, str]:
    """For each site its name without wrappers; the present names if these would not be unique."""
    sites = edit_modules(model)
    prefix, _ = inner_model(model)
    holder = next(iter(patched_holders(model)), "")
    found = {}
    for site, own in sites.items():
        name = former_name(own, site.removeprefix(f"{holder}.") if holder else site)
        inner = prefix.removeprefix(holder).removeprefix(".")
        found[site] = name.removeprefix(f"{inner}.") if inner else name
    return found if len(set(found.values())) == len(found) else {site: site for site in sites}


def lora_around(model: nn.Module, site: str) -> str:
    """The reasons against merging an edit into the base layer inside the wrappers that its site has got since.

    LoRA adds to its base layer's output, so the edit of that output goes into the base layer's weight, and LoRA's part
    stays. Other wrappers that read or change the weight (DoRA, other tuners) forbid it. Empty if there is no reason.
    """
    path = model
    for part in site.split("."):
        layer: Any = path
        path = path._modules[part]  # type: ignore[assignment]
        if part not in _PARTS:
            continue
        kind = type(layer).__name__
        if part != "base_layer" or not isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
            return f"it is inside a {kind}, which may change its output; remove that wrapper to merge"
        if getattr(layer, "merged", False):
            return "LoRA is merged into the weight already, so the edit would scale LoRA's part too; unmerge LoRA first"
        if getattr(layer, "lora_variant", None) or any((getattr(layer, "use_dora", None) or {}).values()):
            return f"it is inside a {kind} of a variant (such as DoRA) that reads the weight; remove it to merge"
    return ""


def former_name(own: RedEdit, name: str) -> str:
    """A site's name at the time of the patch, if its name has only got further parts since; else its present name."""
    former = own.__dict__.get(SITE)
    rest = iter(name.split("."))
    return former if isinstance(former, str) and all(part in rest for part in former.split(".")) else name


def renamed_sites(model: nn.Module, by_site: Mapping[str, _Value]) -> dict[str, _Value]:
    """The same with the sites' names without wrappers."""
    names = bare_sites(model)
    return {names[site]: value for site, value in by_site.items()}


def match_wrapped(model: nn.Module, checkpoint_sites: Iterable[str], model_sites: Collection[str]) -> dict[str, str]:
    """As `match_sites`, with the names of the model's sites, or of the checkpoint's, without wrappers.

    Raises:
        ValueError: as `match_sites`.
    """
    ours = list(checkpoint_sites)
    if any(site in model_sites for site in ours):
        return match_sites(ours, model_sites)
    names = bare_sites(model)
    now = {names[site]: site for site in model_sites}
    found = match_sites(ours, now)
    if not found:
        cleaned = {unwrapped(site): site for site in ours}
        if len(cleaned) == len(ours):
            found = {cleaned[site]: to for site, to in match_sites(cleaned, now).items()}
    return {site: now[to] for site, to in found.items()}
