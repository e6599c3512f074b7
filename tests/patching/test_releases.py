"""A release of transformers whose layers compute otherwise does not unfuse a model without a test that says so.

Edits are fused with what a layer does to a site's output. For every model, each FFN's edit is fused with the addition
behind it and, where one reads the sum, with the norm.
"""

from __future__ import annotations

import re

import model_zoo as zoo
import pytest
import torch
import transformers
from patch_helpers import learn
from torch import nn

from red_kernels.edits.config import RedConfig
from red_kernels.patching.patch import patch

CROSS = "bert with cross attention"
NAMES = (*zoo.NAMES, CROSS)
NORM = r"((next layer's|final) )?(RMSNorm|LayerNorm)"
# One pass with the addition and the norm of the sum; or the norm of the output itself, whose addition takes the next.
FUSED = rf"(its own \w+; then )?(dropout \+ )?residual add \+ {NORM}"
BARE = r"(its own \w+; then )?(dropout \+ )?residual add"
REMEDY = "see what takes the output of these sites in that release's forward, and let `fusion/takers.py` take it"


def tiny(name: str) -> nn.Module:
    return zoo.tiny("bert", is_decoder=True, add_cross_attention=True) if name == CROSS else zoo.tiny(name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_ffn_is_fused_with_the_addition_and_the_norm(name: str, training: bool) -> None:
    model = tiny(name)
    report = patch(model, RedConfig())
    learn(model, "bert" if name == CROSS else name)
    model.train(training)
    with torch.set_grad_enabled(training):
        model(**zoo.inputs("bert" if name == CROSS else name))
    unfused = [
        f"transformers {transformers.__version__}: {site.site} is fused with {site.fused or 'nothing'} ({site.reason})"
        for site in report.sites
        if not re.fullmatch(FUSED, site.fused or "")
    ]
    assert not unfused, "\n".join([*unfused, REMEDY])
