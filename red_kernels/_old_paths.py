"""Modules under their old names, for imports of other code and for pickles.

Modules whose names began with `_` have no old name here, nor those of the search for launch rules.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The present module; several if its names are spread over several.
_MODULES = {
    "authors": "checkpoints.authors",
    "autograd": "ops.autograd ops.passes",
    "backends.native": "backends.cpu",
    "backends.operators": "backends.schemas",
    "blocks": "edits.blocks",
    "checkpoint": "checkpoints.checkpoint",
    "checks": "ops.checks",
    "config": "edits.config",
    "edit_module": "edits.module edits.vectors fusion.site",
    "functional": "ops.functional",
    "fusion.deferral": "fusion.site fusion.former",
    "fusion.handoff": "fusion.former",
    "heads": "patching.heads",
    "integrations.base_dtype": "finetune.base_dtype",
    "integrations.base_models": "support.base_models",
    "integrations.convert": "checkpoints.convert",
    "integrations.data": "finetune.data",
    "integrations.finetune": "finetune.job",
    "integrations.head": "finetune.head",
    "integrations.info": "info",
    "integrations.measure": "finetune.measure",
    "integrations.merged_folder": "merging.folder",
    "integrations.output_folder": "support.output_folder",
    "integrations.peft_folder": "checkpoints.peft_folder checkpoints.peft_names",
    "integrations.progress": "finetune.progress",
    "integrations.report": "finetune.report",
    "integrations.resume": "finetune.resume",
    "integrations.run_folder": "finetune.run_folder",
    "merge": "merging.merge merging.report",
    "merge_report": "merging.report",
    "models.fingerprint": "fusion.fingerprint",
    "models.handoff": "fusion.former",
    "models.linears": "merging.linears",
    "models.norms": "fusion.norms",
    "module_facts": "patching.module_facts edits.find",
    "naive": "patching.naive",
    "next_norm": "patching.sites",
    "patch": "patching.patch edits.find",
    "patched": "patching.classes",
    "plan": "patching.plan patching.sites",
    "pretrained": "patching.pretrained",
    "recompute": "edits.recompute",
    "reference": "backends.reference",
    "report": "patching.report support.text",
    "selection": "edits.selection",
    "watch": "patching.watch",
}
_FUNCTIONS = ("patch", "merge")  # of the package: importing such a module must not shadow it
_PACKAGE = __name__.rpartition(".")[0]


class _Several(ModuleType):
    """Stands for a module whose names are now in several modules."""

    def __init__(self, name: str, parts: Sequence[str]) -> None:
        super().__init__(name, f"Names of {', '.join(parts)}.")
        self._parts = [import_module(part) for part in parts]

    def __getattr__(self, name: str) -> Any:
        for part in self.__dict__.get("_parts", ()):
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(MetaPathFinder):
    """Finds the modules of the table by their old names, at the first import."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        old = name.removeprefix(f"{_PACKAGE}.")
        return ModuleSpec(name, _Loader()) if old != name and old in _MODULES else None


class _Loader(Loader):
    _own: ModuleSpec | None = None  # a reload needs it

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _module(spec.name)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has run under its own name and gets that spec back."""
        if self._own is not None:
            module.__spec__ = self._own


def _module(name: str) -> ModuleType:
    parts = [f"{_PACKAGE}.{part}" for part in _MODULES[name.removeprefix(f"{_PACKAGE}.")].split()]
    return import_module(parts[0]) if len(parts) == 1 else _Several(name, parts)


def keep() -> None:
    """Make the old names resolve to the present modules."""
    for old in _FUNCTIONS:
        sys.modules[f"{_PACKAGE}.{old}"] = _module(f"{_PACKAGE}.{old}")
    sys.meta_path.append(_Finder())
    for package in {f"{_PACKAGE}.{old}".rpartition(".")[0] for old in _MODULES}:
        import_module(package).__dict__["__getattr__"] = partial(_attribute, package)


def _attribute(package: str, name: str) -> ModuleType:
    """A module by its old name, if only the package was imported."""
    if f"{package}.{name}".removeprefix(f"{_PACKAGE}.") in _MODULES:
        return import_module(f"{package}.{name}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
