"""The content of a folder or a file of edits, in any form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .folder import HEAD_NAME, Head
from .vectors import SiteTensors

__all__ = ["Found"]


@dataclass(frozen=True)
class Found:
    """The content of a folder or a file of edits.

    Attributes:
        source: the file of the vectors.
        vectors: site to part to tensor `(width,)`.
        description: the config of the patch, if the file states it.
        head: the authors' classifier head, parameter name to value; empty where there is none.
        trained: the head of our own form.
        newer: what there is to say of an adapter in the folder that PEFT has saved since; empty where there is none.
        head_file: its file, if it is not the one that `save_edits` puts next to the vectors.
    """

    source: Path
    vectors: SiteTensors
    description: dict[str, Any] | None = None
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    trained: Head | None = None
    head_file: Path | None = None
    newer: str = ""

    @property
    def head_source(self) -> Path:
        """The file of the trained head, for messages."""
        return self.head_file or self.source.with_name(HEAD_NAME)
