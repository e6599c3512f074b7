"""The sites of a model: its layers, and their modules that a position edits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..edits.config import RedConfig
from ..fusion.norms import could_be_norm
from ..fusion.paths import child_at, first_path
from ..models import NARROWER, ON_INPUT, Block, Family, blocks_in, family_of, registered, serves_alone
from ..support.text import listed
from .module_facts import experts_in, input_width, linear_patterns, output_width

__all__ = ["ChosenSite", "bias_flags", "check_names", "chosen", "known_sites", "norm_inside", "stacks_of"]

_TEXT = ("text", "encoder", "decoder")


@dataclass(frozen=True)
class ChosenSite:
    """A site that a position edits in a layer.

    Attributes:
        place: in the layer, one of `models.family.PLACES` or `NARROWER`.
        path: from the layer; `""` for the layer itself.
        width: of the edited tensor; 0 if unknown.
        of_tuple: whether the module may return a tuple, whose first entry is edited.
        inside: whether the edit is of the sum to which the output is added.
        norm: path in the module of the norm that gives its output; `"."` for itself, `""` for none.
        bias_flag: attribute of the model's config that adds a bias to this linear layer.
        remark: a remark for the report.
        behind: for a stream behind an attention in post-norm layers, the path in the layer of the norm that gives it.
        last: for a layer's output in post-norm layers, the path in the layer of the norm that gives it.
        on_input: whether the module's input is edited instead of its output.
    """

    place: str
    path: str
    width: int
    of_tuple: bool = False
    inside: bool = False
    norm: str = ""
    bias_flag: str = ""
    remark: str = ""
    behind: str = ""
    last: str = ""
    on_input: bool = False


def known_sites(model: nn.Module, config: RedConfig) -> dict[str, ChosenSite]:
    """The sites of a position, edited already or not, in the model's order.

    Returns:
        Each by its name.

    Raises:
        ValueError: as `make_plan`, for the layers.
    """
    return {
        f"{block.name}.{site.path}" if site.path else block.name: site
        for block, sites in chosen(model, config, [])
        for site in sites
    }


def bias_flags(model: nn.Module) -> dict[str, str]:
    """The linear layers whose bias an attribute of the model's config switches on, and that attribute."""
    return {f"{block.name}.{path}": flag for block in blocks_in(model) for path, flag in _flags(block).items()}


def _flags(block: Block) -> dict[str, str]:
    family = family_of(type(block.module))
    return {} if family is None else family.bias_flags


def check_names(named: Iterable[tuple[nn.Module, str]]) -> None:
    names: dict[int, str] = {}
    for module, name in named:
        first = names.setdefault(id(module), name)
        if first != name:
            raise ValueError(f"model: {first} and {name} are the same module; one edit cannot be at both")


def stacks_of(blocks: list[Block], config: RedConfig) -> tuple[list[Block], list[str]]:
    """The layers of a config's stacks, and the kinds of the stacks that it leaves out.

    Raises:
        ValueError: a named kind of stack does not exist.
    """
    kinds = list(dict.fromkeys(block.kind for block in blocks))
    if config.stacks is None:
        wanted = [kind for kind in kinds if kind in _TEXT] or kinds
    elif "all" in config.stacks:
        wanted = kinds
    else:
        missing = [kind for kind in config.stacks if kind not in kinds]
        if missing:
            raise ValueError(
                f"stacks: got {', '.join(map(repr, missing))}, this model has {', '.join(map(repr, kinds))}"
            )
        wanted = list(config.stacks)
    return [block for block in blocks if block.kind in wanted], [kind for kind in kinds if kind not in wanted]


def chosen(model: nn.Module, config: RedConfig, warnings: list[str]) -> list[tuple[Block, list[ChosenSite]]]:
    """The layers to edit, and the sites in them."""
    every = blocks_in(model)
    blocks, left = stacks_of(every, config)
    found = [(block, _sites_of(block, config)) for block in blocks]
    places = {site.place for _, sites in found for site in sites}
    if any(place not in places for place in config.places):
        raise ValueError(_no_sites(model, config, every, [place for place in config.places if place not in places]))
    for kind in left:
        stack = [block for block in every if block.kind == kind]
        if any(_sites_of(block, config) for block in stack):
            where = f"{stack[0].stack}.{stack[0].list_key}".strip(".")
            warnings.append(f"not edited: the {len(stack)} layers of {where}; RedConfig(stacks={kind!r}) edits them")
    if config.layers is not None:
        wanted = set(config.layers)
        missing = sorted(wanted - {block.index for block in blocks})
        if missing:
            last = max(block.index for block in blocks)
            raise ValueError(f"layers: {missing} are not in this {type(model).__name__}, whose layers are 0 to {last}")
        found = [(block, sites) for block, sites in found if block.index in wanted]
        lost = [block.name for block, sites in found if not sites]
        if lost:
            raise ValueError(f"layers: {listed(lost)} have no site of position {config.position!r}; choose others")
    bare = [block.name for block, sites in found if not sites]
    if bare:
        warnings.append(f"not edited, because they have no site of position {config.position!r}: {listed(bare)}")
    partly = _partly(found, config) + _joined(found, config)
    if partly:
        warnings.append(f"edited in part: {listed(partly)}")
    return [(block, sites) for block, sites in found if sites]


def _partly(found: list[tuple[Block, list[ChosenSite]]], config: RedConfig) -> list[str]:
    """Layers without a place of the position that other layers have."""
    places = {site.place for _, sites in found for site in sites}
    return [
        f"{block.name} (no {' and no '.join(sorted(places - {site.place for site in sites}))})"
        for block, sites in found
        if sites and places - {site.place for site in sites}
    ]


def _joined(found: list[tuple[Block, list[ChosenSite]]], config: RedConfig) -> list[str]:
    """Attentions with keys or values from a joint projection, in layers where other attentions have separate ones."""
    left = []
    for place in config.places:
        for block, sites in found if NARROWER.get(place) == "qkv" else ():
            parents = {site.path.rpartition(".")[0] for site in sites if site.place == place}
            others = dict.fromkeys(site.path.rpartition(".")[0] for site in block.sites if site.place == "qkv")
            left += [f"{block.name} (no {place} in {path})" for path in others if parents and path not in parents]
    return left


def _places_of(module: nn.Module, place: str, path: str, config: RedConfig) -> list[str]:
    """The places of a position that a module at a place has."""
    found = [place] if place in config.places else []
    for narrow in config.places:
        if NARROWER.get(narrow) == place:
            if narrow in ON_INPUT and not config.edit_kind.on_input:
                found += [narrow] if input_width(module) is not None else []
            elif narrow in ON_INPUT or serves_alone(path, narrow):
                found.append(narrow)
    return found


def _sites_of(block: Block, config: RedConfig) -> list[ChosenSite]:
    family = registered(type(block.module))
    if family is not None:
        return _registered_sites(block, family, config)
    family = family_of(type(block.module))
    norms = {} if family is None else family.norms
    flags = _flags(block)
    found = []
    for site in block.sites:
        module = child_at(block.module, site.path)
        assert module is not None
        places = _places_of(module, site.place, site.path, config)
        if not places:
            continue
        if places[0] in ON_INPUT or config.edit_kind.on_input:
            found.append(_input(places[0], site.path, module, flags))
            continue
        norm = norm_inside(module, site.width) if site.place in ("res", "attn_res") else ""
        if site.path in norms:
            inner = norms[site.path]
            norm = "." if inner == site.path else inner.removeprefix(site.path).removeprefix(".")
        remark = ""
        if site.place == "ffn" and output_width(module) is None:
            remark = "the output of the whole block of experts"
        found.append(
            ChosenSite(
                places[0],
                site.path,
                site.width,
                site.of_tuple,
                site.inside and not norm,
                norm,
                flags.get(site.path, ""),
                remark,
            )
        )
    return found


def _input(place: str, path: str, module: nn.Module, flags: dict[str, str]) -> ChosenSite:
    return ChosenSite(place, path, input_width(module) or 0, bias_flag=flags.get(path, ""), on_input=True)


def norm_inside(module: nn.Module, width: int) -> str:
    """The path of the norm that gives a module's output, as its children suggest: a projection, then a norm."""
    if could_be_norm(module):
        return "."
    children = [(name, child) for name, child in module.named_children() if not isinstance(child, nn.Dropout)]
    if any(child._modules and output_width(child) is None for _, child in children):
        return ""
    linear = [name for name, child in children if output_width(child) == width and not could_be_norm(child)]
    norms = [name for name, child in children if could_be_norm(child)]
    return norms[0] if len(linear) == 1 and len(norms) == 1 and children[0][0] == linear[0] else ""


def _registered_sites(block: Block, family: Family, config: RedConfig) -> list[ChosenSite]:
    found: list[ChosenSite] = []
    stream = next((site.width for site in block.sites if site.place in ("res", "ffn", "attn")), 0)
    for place in dict.fromkeys(NARROWER.get(place, place) for place in config.places):
        for entry in family.sites.get(place, ()):
            path = first_path(block.module, entry)
            if path is None:
                if entry.endswith("?"):
                    continue
                return []
            path = resolved(block.module, path)
            module = child_at(block.module, path)
            assert module is not None
            places = _places_of(module, place, path, config)
            if not places or places[0] in ON_INPUT or config.edit_kind.on_input:
                found += [_input(narrow, path, module, family.bias_flags) for narrow in places]
                continue
            norm = family.norms.get(path, "")
            norm = "." if norm and norm == path else norm.removeprefix(path).removeprefix(".")
            found.append(
                ChosenSite(
                    places[0],
                    path,
                    output_width(module) or (stream if place != "qkv" else 0),
                    place in ("res", "attn_res"),
                    place in family.inside,
                    norm,
                    family.bias_flags.get(path, ""),
                    family.remarks.get(path, ""),
                )
            )
    order = {id(module): at for at, module in enumerate(block.module.modules())}
    found.sort(key=lambda site: (site.place == "res", order[id(child_at(block.module, site.path))]))
    return found


def resolved(layer: nn.Module, path: str) -> str:
    """A path with `-1` replaced by the name it stands for."""
    parts: list[str] = []
    module: nn.Module | None = layer
    for part in path.split(".") if path else ():
        if part == "-1" and module is not None:
            part = next(reversed(module._modules), "")
        parts.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


_CALLED = {
    "ffn": "FFN with a last projection",
    "attn": "attention with an output projection",
    "qkv": "query, key or value projection that is called",
    "res": "module that gives the residual stream behind the FFN",
    "attn_res": "residual stream behind an attention that ends before the FFN begins",
    "key": "projection that gives only keys",
    "value": "projection that gives only values",
    "ffn_in": "FFN with a last projection whose input is accessible",
}


def _no_sites(model: nn.Module, config: RedConfig, blocks: list[Block], missing: list[str]) -> str:
    kind = type(model).__name__
    if blocks:
        names = dict.fromkeys(type(block.module).__name__ for block in blocks)
        looked = f"the {len(blocks)} layers that were found ({', '.join(names)}) have"
    else:
        looked = "no repeated layers were found in lists of modules, so the model has"
    what = " and no ".join(_CALLED[place] for place in missing)
    experts = experts_in(model)
    remark = f" Its experts are in {listed(experts)}." if experts and (not blocks or "ffn_in" in missing) else ""
    joint = [f"{block.name}.{site.path}" for block in blocks for site in block.sites if site.place == "qkv"]
    if joint and {"key", "value"} & set(missing):
        remark += f" One projection gives queries, keys and values, or some of them: {listed(joint)}."
    return (
        f"model: this {kind} lacks sites of position {config.position!r}: {looked} no {what}.{remark} For another "
        f"layout name the modules to edit, for example RedConfig(sites='*.down_proj'); its linear layers are "
        f"{linear_patterns(model)}"
    )
