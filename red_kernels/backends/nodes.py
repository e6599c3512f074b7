"""Autograd's nodes in C++, from ``csrc/nodes``: they reduce a compiled backend's host time of a call to a third.

The library works with the Python and the torch of its build. Without it, or with RED_KERNELS_NODES=0, the
``torch.autograd.Function`` of :mod:`red_kernels.ops.autograd` give the same results.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import compiled

__all__ = [
    "added",
    "ambient",
    "carried",
    "dropped",
    "edited",
    "forget_choices",
    "in_place",
    "know",
    "load_error",
    "nodes_of",
    "normed",
    "reach",
    "run_scope",
    "seed",
    "set_lost_gradient",
    "set_python_backward",
    "take_reached",
]

_LIBRARY = Path(__file__).parent.parent / "lib" / "libred_kernels_nodes.so"
_SETTING = "RED_KERNELS_NODES"
_REMEDY = "remedy: install red-kernels again with this Python and torch, without build isolation"


def load_error() -> str | None:
    """Why the library is not used, with the remedy, or None."""
    return _error


def nodes_of(namespace: str, backend: str, lent: int = 0) -> Any:
    """The operations on bundles over the operators of a namespace: an object of csrc/nodes/module.cpp; None without.

    Its functions: ``edit(x, residual, edit) -> z``; ``edit_norm(x, residual, edit, norm, need_z) -> (y, z)``;
    ``norm_edit(x, norm, edit) -> y``; ``norm_of(z, norm) -> y`` for a result of ``edit``, and
    ``sum_norm(x, residual, edit, norm) -> (z, y)`` for both in one pass. All but the first two arguments are the tuples
    of :mod:`red_kernels.backends.arguments`, with int64 ids. ``lent`` is the result of ``red_kernels_cpu_lent()`` in
    the library of the CPU kernels. Plain tensors then reach these kernels without torch's dispatcher, which for an
    operator of the stable ABI takes several times as long as a small kernel.
    """
    return None if _module is None else _module.Nodes(namespace, backend, lent)


def _load() -> tuple[ModuleType | None, str | None]:
    setting = os.environ.get(_SETTING, "")
    if setting == "0":
        return None, f"{_SETTING}=0 leaves it out"
    library, error = compiled.load(_LIBRARY, _LIBRARY.with_name("nodes.missing"), f"it was never built; {_REMEDY}")
    if library is None:
        return None, error
    library.red_kernels_nodes_built_for.restype = ctypes.c_char_p
    built, here = library.red_kernels_nodes_built_for().decode(), _here()
    if built != here:
        return None, f"it was built for {built}, but this is {here}; {_REMEDY}"
    name = f"{__package__}.nodes_library.nodes"  # the module's name is the last part
    loader = importlib.machinery.ExtensionFileLoader(name, str(_LIBRARY))
    spec = importlib.util.spec_from_file_location(name, _LIBRARY, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module, None


def _here() -> str:
    return f"{sysconfig.get_config_var('SOABI')}, torch {torch.__version__}"


_module, _error = _load()


def _function(name: str) -> Callable[..., Any] | None:
    return getattr(_module, name, None)


# Each is None without the library.
ambient = _function("ambient")  # this thread's state: see `ops.ambient`
seed = _function("seed")  # of a dropout: see `ops.fused.drawn_dropout`
set_python_backward = _function("set_python_backward")  # for a recorded backward, or one with tangents
set_lost_gradient = _function("set_lost_gradient")  # called with a gradient of a waiting value
forget_choices = _function("forget_choices")  # of backends: see `backends.choose`
know = _function("know")  # takes the data of the functions below: see `fusion.quick`
reach = _function("reach")  # marks the edit of a site as run, in this thread
take_reached = _function("take_reached")
in_place = _function("in_place")  # whether the watched layers of a model are in their places
run_scope = _function("run_scope")  # a running block or stack: see `patching.classes`


def _nothing(*given: Any) -> Any:
    """Replaces a missing fast path."""
    return None


# Results of an earlier call under equal conditions; None if they must be found. Not for compiled code.
edited = _function("edited") or _nothing
carried = _function("carried") or _nothing
added = _function("added") or _nothing
dropped = _function("dropped") or _nothing
normed = _function("normed") or _nothing
