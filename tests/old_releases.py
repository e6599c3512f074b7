"""What supported releases of torch, Triton and transformers cannot do, this package or not: no test asks it of them."""

from __future__ import annotations

from importlib import metadata

import pytest


def _release(package: str) -> tuple[int, int]:
    try:
        major, minor = metadata.version(package).split(".")[:2]
    except metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


TRITON = _release("triton")
needs_interpreter = pytest.mark.skipif(
    TRITON < (3, 7) and _release("numpy") >= (2, 4),
    reason="the interpreter of Triton 3.6 does not run with numpy 2.4",
)


resumes_on_cpus = pytest.mark.skipif(
    _release("transformers") < (5, 18),
    reason="Trainer of transformers 5.17 asks torch for an optimizer's state on 'cpu:0', which torch does not know",
)


def skip_untraced(name: str) -> None:
    """Skip a test that compiles a model which this torch cannot trace."""
    if name.startswith("t5") and _release("torch") < (2, 12):
        pytest.skip("T5 of transformers calls copy.deepcopy in its forward, which torch 2.11 does not trace")
