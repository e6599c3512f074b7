"""Layers with the norm behind the addition: in them that norm gives the stream behind an attention.

Layers of both forms may have the same modules under the same names. A switch of the layer decides, or a trial.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..fusion.norms import could_be_norm
from ..models import Block, family_of
from ..support.text import listed
from .sites import ChosenSite

__all__ = ["with_norms"]

_SWITCHES = ("do_layer_norm_before", "normalize_before", "norm_first", "pre_norm", "prenorm")


def with_norms(found: list[tuple[Block, list[ChosenSite]]]) -> list[tuple[Block, list[ChosenSite]]]:
    """The same sites; streams behind the attentions of post-norm layers with the norms that produce them.

    Raises:
        ValueError: the form of a layer is unknown.
    """
    return [(block, [_with_norm(block, site) for site in sites]) for block, sites in found]


def _with_norm(block: Block, site: ChosenSite) -> ChosenSite:
    if site.inside:
        norm = _norm_beside(block.module, site.path)
        return replace(site, behind=norm, inside=False) if norm and _is_post_norm(block) else site
    if site.place == "res" and not site.path and not site.norm and _switch(block.module) is False:
        norms = [name for name, child in block.module.named_children() if could_be_norm(child)]
        return replace(site, last=norms[-1]) if norms else site
    return site


def _norm_beside(layer: nn.Module, path: str) -> str:
    """The norm called after an attention: `self_attn` and `self_attn_layer_norm`."""
    name = path.rpartition(".")[2]
    return next((key for key in layer._modules if key != name and key.startswith(name) and "norm" in key), "")


def _switch(layer: nn.Module) -> bool | None:
    """Whether a layer's own switch puts its norms first; None if it has no switch."""
    for switch in _SWITCHES:
        for owner in (layer, getattr(layer, "config", None)):
            found = getattr(owner, switch, None)
            if isinstance(found, bool):
                return found
    return None


def _is_post_norm(block: Block) -> bool:
    layer = block.module
    before = _switch(layer)
    if before is not None:
        return not before
    if family_of(type(layer)) is not None:
        return False
    raise ValueError(
        f"model: {listed([block.name])} may have its norms in front of its sublayers or behind them: its structure "
        "does not show which, so the residual stream behind its attention is unknown; choose another position, or name "
        "modules by sites="
    )
