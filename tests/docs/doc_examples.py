"""Running the examples of a page of the docs as they stand.

Blocks that begin with ```` ```python ```` run in order in one namespace, in a temporary folder. What cannot run
everywhere says so behind the word: ```` ```python gpu ```` runs where torch finds a GPU and is compiled elsewhere, so
that its syntax is checked at least. Blocks of another language are left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from places import ROOT

_FENCE = re.compile(r"^```(?P<words>[^`\n]*)\n(?P<code>.*?)^```[ \t]*$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One block of Python: the code, the words behind "python", and the line of the page on which the code begins."""

    code: str
    words: tuple[str, ...]
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The Python blocks of a page, in order. Raises ValueError for a word behind "python" that nobody knows."""
    text = page.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        language, *words = found["words"].split() or [""]
        if language != "python":
            continue
        line = text.count("\n", 0, found.start("code")) + 1
        if set(words) - {"gpu"}:
            raise ValueError(f"{page}:{line}: got ```python {' '.join(words)}, expected ```python or ```python gpu")
        yield Block(found["code"], tuple(words), line)


def run_page(page: str | Path, folder: Path, names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the Python blocks of a page in order; a failure's traceback has the page's line.

    Args:
        page: relative to the project's root, `"docs/training.md"`.
        folder: the working directory of the examples, a temporary one.
        names: what the examples may use beside what they define.

    Returns:
        The namespace as the last block left it, for further checks.
    """
    path = ROOT / page
    namespace: dict[str, Any] = {**(names or {}), "__name__": "__example__"}
    found = list(blocks(path))
    assert found, f"{path} has no block of Python"
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in found:
            code = compile("\n" * (block.line - 1) + block.code, str(path), "exec", dont_inherit=True)
            if "gpu" not in block.words or torch.cuda.is_available():
                exec(code, namespace)
    finally:
        os.chdir(before)
    return namespace
