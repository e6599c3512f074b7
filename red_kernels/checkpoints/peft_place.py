"""The part of a patched model that fits PEFT's form, by the names of the base model's modules.

PEFT wraps the modules that it edits, so each must have one output of a known width. Its `modules_to_save` has further
trained parameters: whole modules, found by the ends of their names. PEFT loads all parameters and buffers of each, and
copies them: a Parameter shared by two modules becomes two.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ..edits.find import edit_modules
from ..edits.module import RedEdit
from ..patching.module_facts import input_width, output_width
from ..support.sharded import is_sharded, refuse_partitioned, whole
from .folder import Head
from .vectors import SiteTensors
from .wrapped_names import bare_sites, inner_model, unwrapped

__all__ = ["Place", "owners_of", "place_in_peft"]


@dataclass(frozen=True)
class Place:
    """Edits in PEFT's form.

    Attributes:
        vectors: site to part to tensor.
        sites: all sites, and whether their input is edited; more than in `vectors` if sites share vectors.
        head: further trained parameters, and the other tensors of their modules.
    """

    vectors: SiteTensors
    sites: dict[str, bool]
    head: Head | None


def place_in_peft(model: nn.Module, vectors: SiteTensors, head: Mapping[str, Tensor]) -> Place | None:
    """The written part of a model; None if PEFT has no place for a site, or for a further trained parameter.

    If parts of the model are sharded, all processes must call this.

    Args:
        model: a patched model.
        vectors: site in `model` to part to tensor, on the CPU.
        head: name in `model` to a further trained parameter, on the CPU.
    """
    edits = edit_modules(model)
    if not all(_is_wrapped_by_peft(model, site, own) for site, own in edits.items()):
        return None
    prefix, inside = _prefixes(model)
    bare = bare_sites(model)
    names = {site: ".".join(part for part in (inside, bare[site]) if part) for site in edits}
    sites = {names[site]: own.on_input for site, own in edits.items()}
    found = {names[site]: parts for site, parts in vectors.items()}
    if not head:
        return Place(found, sites, None)
    modules = {_named(name, prefix): module for name, module in model.named_modules(remove_duplicate=False)}
    values = _with_shared(model, head, prefix)
    owners = owners_of(values)
    if owners is None:
        return None
    chosen = {name: module for name, module in modules.items() if name.endswith(tuple(owners))}
    if any(_is_in(name, chosen) for name in chosen) or any(_is_in(f"{site}.", chosen) for site in sites):
        return None
    for name, module in chosen.items():
        for key, own in module.state_dict(keep_vars=True).items():
            full = f"{name}.{unwrapped(key)}"
            if full not in values:
                if not _is_at_hand(full, own):
                    return None
                values[full] = whole(own).to("cpu", copy=True).contiguous()
    return Place(found, sites, Head(values))


def owners_of(names: Iterable[str]) -> list[str] | None:
    """The outermost modules with these parameters; None if one is the model's own, of no module in it."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return None if "" in owners else [name for name in owners if not _is_in(name, owners)]


def _is_in(name: str, others: Collection[str]) -> bool:
    """Whether a module is inside one of these, itself not counted."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in others for count in range(1, len(parts)))


def _is_wrapped_by_peft(model: nn.Module, site: str, own: RedEdit) -> bool:
    module = model.get_submodule(site)
    parent = model.get_submodule(site.rpartition(".")[0])
    width = input_width(module) if own.on_input else output_width(module)
    return bool(site) and width is not None and not isinstance(parent, nn.MultiheadAttention)


def _is_at_hand(name: str, own: object) -> bool:
    """Whether a frozen tensor can be written: not on the meta device, nor in another library's form."""
    if not isinstance(own, Tensor) or own.is_meta:
        return False
    try:
        refuse_partitioned(name, own)
    except ValueError:
        return False
    return is_sharded(own) or type(own.data) is Tensor


def _prefixes(model: nn.Module) -> tuple[str, str]:
    """The name in `model` of the model that PEFT is given, and the name in that of the part that was patched.

    The former is the transformers model around the patched part, if there is one.
    """
    patched, _ = inner_model(model)
    for name, module in model.named_modules():
        if isinstance(getattr(type(module), "base_model_prefix", None), str):
            if not name or f"{patched}.".startswith(f"{name}."):
                return name, unwrapped(patched.removeprefix(name).removeprefix("."))
            break
    return patched, ""


def _named(name: str, prefix: str) -> str:
    return unwrapped(name.removeprefix(f"{prefix}.") if prefix else name)


def _with_shared(model: nn.Module, head: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The values by all names of their Parameters, for example of tied embeddings."""
    all_names: dict[int, list[str]] = {}
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, one in own.items():
        all_names.setdefault(id(one), []).append(name)
    return {_named(other, prefix): value for name, value in head.items() for other in all_names[id(own[name])]}
