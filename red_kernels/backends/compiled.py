"""Common code of the backends with a compiled library: loading it, and its operators as a backend's functions.

Operators are called as registered in torch, without Python code in between; a backward only adds the flags of needed
gradients. They are looked up once, here, not at each call.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from .arguments import FromFlat
from .schemas import NAMES, SCHEMAS, bits, register_fakes

_defined: list[torch.library.Library] = []  # kept: their operators disappear with them


def load(library: Path, note: Path | None, never_built: str) -> tuple[ctypes.CDLL | None, str | None]:
    """A shared library, or the reason for its absence, with the remedy: the build's text in the file ``note``, else
    ``never_built``."""
    if not library.is_file():
        return None, note.read_text() if note is not None and note.is_file() else never_built
    try:
        return ctypes.CDLL(str(library)), None
    except OSError as error:
        return None, f"{library.name} does not load ({error}); remedy: install red-kernels again with this torch"


def ask(function: Any, *arguments: Any) -> str:
    """Call a C function of a library that writes a text; raises RuntimeError with the text if it returns 0."""
    text = ctypes.create_string_buffer(512)
    good = function(*arguments, text, ctypes.c_size_t(len(text)))
    if not good:
        raise RuntimeError(text.value.decode())
    return text.value.decode()


def register(namespace: str) -> None:
    """Complete the operators of a namespace, once, after loading the library that defines them.

    If no library did, they are defined here: a library for another device only implements them.
    """
    if not hasattr(getattr(torch.ops, namespace), NAMES[0]):
        library = torch.library.Library(namespace, "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        _defined.append(library)
    register_fakes(namespace)


def operations(namespace: str) -> FromFlat:
    """The functions of a backend, on the operators of a namespace; several results are a plain tuple."""
    operators = getattr(torch.ops, namespace)
    return FromFlat({name: getattr(operators, name).default for name in NAMES}, bits)
