"""The description of layers whose sites their structure does not show, or only names do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["NARROWER", "ON_INPUT", "PLACES", "Family"]

PLACES = ("ffn", "attn", "qkv", "res", "attn_res")
# Places among the sites of another: the projections of keys or of values alone, the input of an FFN's last projection.
NARROWER = {"key": "qkv", "value": "qkv", "ffn_in": "ffn"}
ON_INPUT = ("ffn_in",)  # edits there are of the module's input


@dataclass(frozen=True)
class Family:
    """Layers of one type.

    Attributes:
        name: for messages.
        layers: class names of the layer (a subclass is found by its base's name); an ambiguous name is preceded by the
            end of its module's name, `modeling_x.Block`.
        sites: place (`"ffn"`, `"attn"`, `"qkv"`, `"res"`, `"attn_res"`) to the paths of the edited modules in the
            layer. `-1` is the last child of a list; `""` is the layer; `a|b` is the first existing one of the two;
            `a with b` is `a` if that has a child `b`; a path that ends in `?` may be missing.
        inside: places whose edits are of the sum to which the module's output is added.
        norms: path of a site to that of the norm in it that gives its output: an edit there can be merged into it.
        bias_flags: path of a site to the attribute of the model's config that gives that linear layer a bias.
        remarks: path of a site to its remark in the report.
        layouts, first_norm, known, final_norm: of releases in which forwards were replaced; no longer read.
    """

    name: str
    layers: tuple[str, ...]
    sites: dict[str, tuple[str, ...]]
    layouts: tuple[Any, ...] = ()
    inside: tuple[str, ...] = ()
    first_norm: tuple[str, ...] = ()
    known: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    final_norm: str | None = None
    norms: dict[str, str] = field(default_factory=dict)
    bias_flags: dict[str, str] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
