"""Recognising a `forward` by its syntax tree.

Two functions have the same fingerprint if they do the same in the same order under the same names. Comments, docstrings
and annotations do not matter. So a new release of a library that only renames a type is recognised, and one that moves
a dropout is not.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

__all__ = ["BASE", "fingerprint", "unwrapped"]

BASE = "_red_kernels_base"  # in this package's subclasses: the library's class
_TRUSTED = ("transformers", "torch", __name__.partition(".")[0])
_ANNOTATIONS = ("annotation", "returns", "type_comment", "type_params")


def fingerprint(function: Callable[..., Any]) -> str | None:
    """The fingerprint of a Python function, 16 hexadecimal digits; None if its source is not available.

    Wrappers of transformers, torch and this package are unwrapped; any other wrapper makes a function a different one.
    """
    return _fingerprint(unwrapped(function))


def unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside the wrappers of transformers, torch and this package around a `forward`."""
    # functools.wraps copies the module's name, but not the globals.
    while hasattr(function, "__wrapped__") and function.__globals__["__name__"].partition(".")[0] in _TRUSTED:
        function = function.__wrapped__
    return function


@functools.cache
def _fingerprint(function: Callable[..., Any]) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return hashlib.sha256(_text(tree.body[0]).encode()).hexdigest()[:16]


def _text(node: object) -> str:
    # Not ast.dump: its output for empty fields differs between versions of Python.
    if isinstance(node, list):
        return "[" + ",".join(map(_text, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        node = ast.Assign([node.target], node.value)  # `x: int = y` equals `x = y`
    parts = []
    for name, value in ast.iter_fields(node):
        if name in _ANNOTATIONS or name == "kind":
            continue
        if name == "decorator_list":
            value = [decorator for decorator in value if not _renames_arguments(decorator)]
        if name == "body" and isinstance(value, list):
            value = [statement for statement in value if not _is_text(statement)]
        if value is not None and value != []:
            parts.append(f"{name}={_text(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _renames_arguments(decorator: ast.AST) -> bool:
    """Whether it is transformers' `deprecate_kwarg`, which accepts an argument's former name until some release."""
    called = decorator.func if isinstance(decorator, ast.Call) else None
    return isinstance(called, ast.Name) and called.id == "deprecate_kwarg"


def _is_text(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
