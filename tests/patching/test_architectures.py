"""Every architecture of transformers, patched, computes what plain forward hooks compute; most sites are fused."""

from __future__ import annotations

import architectures as zoo
import pytest
from architecture_compare import POSITIONS, run
from architecture_runs import with_addition, with_norm

from red_kernels.edits.config import RedConfig
from red_kernels.models import blocks_in
from red_kernels.patching.sites import stacks_of

EVERY = zoo.architectures()
# A run of each change tries the layers of every architecture under one head, at one position, so that neighbours share
# none. Other heads of the same layers, and the other positions, are for test-nightly, and so is a patch that foresees
# what will be fused: here those of model_zoo have it.
FIRST = {one.model_type: one for one in reversed(EVERY)}
ONE = [(one, POSITIONS[at % len(POSITIONS)]) for at, one in enumerate(EVERY) if FIRST[one.model_type] is one]
REST = [(one, position) for one in EVERY for position in POSITIONS if (one, position) not in ONE]
# Their own forward raises, or they need what is not installed; and what runs backward in its own way.
REVERSIBLE = ("reformer",)


def _named(case: object) -> str:
    return str(case)


def check(architecture: zoo.Architecture, position: str, foreseen: bool) -> None:
    result = run(architecture, position, foreseen)
    assert not result.wrong
    assert "with plain hooks" not in result.reason, (
        "the site's output is not what an edit is made for; patch accepts it"
    )
    if result.reason.startswith("cannot be built"):
        pytest.skip(result.reason)
    if not result.sites and not result.reason.startswith("does not run"):
        places = {"ffn": ("ffn",), "attn": ("attn",), "more": ("qkv", "attn", "ffn"), "res": ("res",)}[position]
        blocks = stacks_of(blocks_in(zoo.build(architecture)), RedConfig(position=position))[0]
        found = {site.place for block in blocks for site in block.sites}
        assert not set(places) <= found, f"refused, with all places there: {result.reason}"


@pytest.mark.parametrize(("architecture", "position"), ONE, ids=_named)
def test_as_plain_hooks(architecture: zoo.Architecture, position: str) -> None:
    if architecture.model_type not in REVERSIBLE:
        check(architecture, position, foreseen=False)


@pytest.mark.long
@pytest.mark.parametrize(("architecture", "position"), REST, ids=_named)
def test_as_plain_hooks_elsewhere(architecture: zoo.Architecture, position: str) -> None:
    if architecture.model_type not in REVERSIBLE:
        check(architecture, position, foreseen=True)


# Some that no table names.
UNNAMED = (
    *("gemma", "smollm3", "olmo2", "granite", "cohere", "starcoder2", "deepseek_v3", "gpt_oss", "bloom", "bart"),
    *("glm4", "stablelm", "llama4_text", "qwen3_next"),
)


@pytest.mark.parametrize("name", UNNAMED)
def test_fused_with_addition_and_norm(name: str) -> None:
    one = next(one for one in zoo.architectures("causal-lm") if one.model_type == name)
    sites = run(one, "ffn").sites
    assert sites
    assert all(with_addition(site.fused) and with_norm(site.fused) for site in sites), sites
