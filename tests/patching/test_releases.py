"""A release of transformers whose forwards are other ones does not unfuse a model without a test that says so.

Edits are fused where a library's `forward` has a fingerprint that is known. A release that changes one is found here,
for every layout and every position, with the class, its fingerprint and the sites that it concerns.
"""

from __future__ import annotations

from collections.abc import Iterator

import model_zoo as zoo
import position_cases as cases
import pytest
import transformers
from torch import nn

from red_kernels.edits.config import RedConfig
from red_kernels.fusion.fingerprint import BASE
from red_kernels.fusion.paths import child_at
from red_kernels.models import FAMILIES, LAYOUTS, Layout, family_of
from red_kernels.patching.patch import patch

UNKNOWN = "is not one that is known"
CROSS = "bert with cross attention"
NAMES = (*zoo.NAMES, CROSS)
# Side by side with the FFN, attention leaves no stream of its own that could be edited.
EVERY = [
    (name, position)
    for name in NAMES
    for position in cases.POSITIONS
    if not (name in zoo.PARALLEL and position == "res_with_attn")
]
REMEDY = (
    "read what changed in that forward; if the fused one still computes the same, add the fingerprint to its `known` "
    "in red_kernels/models/, else change the fused forward too; then run the tests (docs/testing.md)"
)


def tiny(name: str) -> nn.Module:
    return zoo.tiny("bert", is_decoder=True, add_cross_attention=True) if name == CROSS else zoo.tiny(name)


def unfused(model: nn.Module, position: str) -> list[str]:
    """What this release of transformers keeps from being fused, in words."""
    found: dict[str, list[str]] = {}
    for site in patch(model, RedConfig(position=position)).sites:
        if UNKNOWN in site.reason:
            found.setdefault(site.reason, []).append(site.site)
    return [
        f"transformers {transformers.__version__}, position {position}: {reason}; "
        f"not fused: {', '.join(sites)}; remedy: {REMEDY}"
        for reason, sites in found.items()
    ]


def fused_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, Layout]]:
    """The blocks whose forward was replaced."""
    for module in model.modules():
        layout = LAYOUTS.get(vars(type(module)).get("_red_kernels_key", ""))
        if layout is not None:
            yield module, layout


@pytest.mark.parametrize(("name", "position"), EVERY)
def test_all_forwards_of_this_release_are_known(name: str, position: str) -> None:
    found = unfused(tiny(name), position)
    assert not found, "\n".join(found)


def test_every_layout_and_every_class_of_a_layer_is_looked_at() -> None:
    layouts, layers = set(), set()
    for name in NAMES:
        model = tiny(name)
        layers |= {type(module).__name__ for module in model.modules() if family_of(type(module)) is not None}
        for position in ("ffn", "ffn_attn"):
            changed = tiny(name)
            patch(changed, RedConfig(position=position))
            layouts |= {layout.key for _, layout in fused_blocks(changed)}
    assert layouts == {layout.key for family in FAMILIES for layout in family.layouts}
    assert layers == {name.rpartition(".")[2] for family in FAMILIES for name in family.layers}


def _classes(name: str) -> list[type[nn.Module]]:
    """The library's classes whose forwards the fused ones of a model stand in for."""
    model = tiny(name)
    patch(model, RedConfig())
    found: dict[type[nn.Module], None] = {}
    for block, layout in fused_blocks(model):
        points = [point for point in layout.points if point.place == "ffn" and child_at(block, point.site) is not None]
        inside = [path for point in points for path in point.known if ":" not in path]
        for module in (block, *filter(None, (child_at(block, path) for path in inside))):
            found[getattr(type(module), BASE, type(module))] = None
    return list(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_forward_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new release may change it: of the block itself, and of a module between it and the site."""
    classes = _classes(name)
    assert classes
    for kind in classes:
        original = kind.forward

        def forward(self, *args, _original=original, **kwargs):
            """Another one."""
            return _original(self, *args, **kwargs)

        with monkeypatch.context() as change:
            change.setattr(kind, "forward", forward)
            said = unfused(tiny(name), "ffn")
        assert said, f"nothing was said of another {kind.__name__}.forward"
        assert any(f"{kind.__name__}.forward {UNKNOWN} (fingerprint " in text for text in said), said
        assert all(transformers.__version__ in text and ".0." in text for text in said)
        assert not unfused(tiny(name), "ffn")
