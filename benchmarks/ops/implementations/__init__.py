"""The implementations of operations: one file for each kind of peer, in the order of the tables.

A new one is a file with a function ``implementations(device)`` that returns `Implementation` objects, and its place in
``FILES``.
"""

from __future__ import annotations

import torch

from . import apex, compiled, eager, flash_attention, liger, ours, quack
from .base import Implementation

FILES = (ours, eager, compiled, liger, quack, flash_attention, apex)

__all__ = ["FILES", "Implementation", "implementations"]


def implementations(device: torch.device) -> list[Implementation]:
    """All of them, including missing ones with their reasons."""
    return [implementation for file in FILES for implementation in file.implementations(device)]
