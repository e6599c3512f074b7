"""The house is as it says: rooms in order, files that can be read at once, each name in its place, old names kept."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pickle
import re
import sys
import types
from pathlib import Path

import model_zoo as zoo
import position_cases as cases
import pytest
import torch
from places import ROOT

import red_kernels as rk
from red_kernels import _old_paths
from red_kernels.fusion.norms import SPEC
from red_kernels.fusion.scopes import SCOPE, SITES
from red_kernels.fusion.site import BEHIND, CARRIER, RECORDS, carry_hook
from red_kernels.patching.watch import layer_hook

PACKAGE = ROOT / "red_kernels"
# What a room imports lies before it here. Two stand at the root: what the package shows, and its old names.
ROOMS = (
    *("_version", "_old_paths", "support", "kinds", "backends", "ops", "edits", "fusion", "models", "patching"),
    *("checkpoints", "merging", "", "integrations", "finetune", "info", "cli", "__main__"),
)
# As documents or pickles have named them, module by module.
OLD_NAMES = {
    "authors": ("export_authors",),
    "backends.native": ("trim_memory", "without_pool", "use_instruction_set"),
    "checkpoint": ("save_edits", "load_edits"),
    "config": ("RedConfig",),
    "edit_module": ("RedEdit", "EditVectors", "Gate", "edit_hook", "take_reached", "NAME"),
    "functional": ("edit", "EditAddRMSNormFunction"),
    "fusion.deferral": ("edit_hook", "take_reached", "INSIDE"),
    "fusion.handoff": ("NextNorm", "Step"),
    "integrations.convert": ("convert",),
    "integrations.head": ("train_head",),
    "merge": ("merge", "unmerge", "MergeReport"),
    "models.handoff": ("NextNorm", "Step"),
    "naive": ("naive_edit",),
    "patch": ("patch", "unpatch", "edit_modules", "edit_parameters", "_State"),
    "patched": ("_restore",),
    "reference": ("edit_forward", "dropout_factor"),
    "report": ("PatchReport", "SiteReport"),
    "selection": ("Selection",),
    "watch": ("Site", "Watch", "before_model", "after_model", "layer_hook"),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """A module's room; the kinds, which the backends know, are one of their own."""
    _, *parts = module.split(".")
    return "kinds" if parts[:2] == ["edits", "kinds"] else parts[0] if parts else ""


def imported(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that one imports, inside of functions and for types only as well."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            found |= {f"{base}.{one.name}" if f"{base}.{one.name}" in known else base for one in node.names}
    return found


def test_rooms_import_in_one_direction() -> None:
    known = modules()
    assert {room(module) for module in known} - {"lib"} == set(ROOMS)
    for module, path in known.items():
        for other in imported(module, path, known):
            assert other in known, f"{module} imports {other}"
            if room(module) != "lib":
                assert ROOMS.index(room(other)) <= ROOMS.index(room(module)), f"{module} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """But a package, which a module in it may ask for what the package has already."""
    known = modules()
    left = {module: imported(module, path, known) - {module} for module, path in known.items()}
    while left:
        free = {module for module, others in left.items() if not others & left.keys()}
        assert free, f"a circle is among {sorted(left)}"
        left = {module: others for module, others in left.items() if module not in free}


def test_files_can_be_read_at_once() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in (*PACKAGE.rglob("*.py"), *ROOT.glob("csrc/**/*.*"))}
    assert {str(path): count for path, count in lines.items() if count > 500} == {}


def test_only_models_knows_architectures() -> None:
    names = re.compile(r"llama|gpt-?2|bert|\bt5\b|neox|falcon|gemma|mistral|mixtral|qwen|\bopt\b.*layer", re.IGNORECASE)
    for path in PACKAGE.rglob("*.py"):
        if "models" not in path.parts:
            assert not names.search(path.read_text()), path


def test_no_function_of_the_package_hides_a_module() -> None:
    for name in rk.__all__:
        if inspect.isfunction(getattr(rk, name)):
            assert not (PACKAGE / name).exists(), name
            assert not (PACKAGE / f"{name}.py").exists(), name


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_imports(old: str) -> None:
    module = importlib.import_module(f"red_kernels.{old}")
    assert isinstance(module, types.ModuleType)
    for name in OLD_NAMES[old]:
        own = getattr(module, name)
        if inspect.isclass(own) or inspect.isfunction(own):
            assert getattr(sys.modules[own.__module__], own.__name__) is own


def test_every_old_name_is_there_and_stands_for_the_module_of_now() -> None:
    for old, new in _old_paths._MODULES.items():
        module = importlib.import_module(f"red_kernels.{old}")
        for part in new.split():
            now = sys.modules[f"red_kernels.{part}"]
            assert now.__spec__ is not None
            assert now.__spec__.name == f"red_kernels.{part}"
            assert all(hasattr(module, name) for name in getattr(now, "__all__", ()))
    assert inspect.isfunction(rk.patch)
    assert inspect.isfunction(rk.merge)
    assert rk.edit_module is importlib.import_module("red_kernels.edit_module")  # type: ignore[attr-defined]
    assert rk.models.handoff is sys.modules["red_kernels.fusion.former"]  # type: ignore[attr-defined]
    assert rk.backends.native is rk.backends.cpu  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="module 'red_kernels' has no attribute 'nothing'"):
        _ = rk.nothing  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"module 'red_kernels\.edit_module' has no attribute 'nothing'"):
        _ = importlib.import_module("red_kernels.edit_module").nothing
    with pytest.raises(AttributeError):
        _ = importlib.reload(importlib.import_module("red_kernels.edit_module")).nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("red_kernels.never_was")


def without_what_is_new(model: torch.nn.Module) -> None:
    """As in pickles from before: values do not wait, edits run by themselves, and a hook asks whether they have."""
    for module in model.modules():
        if SITES in module.__dict__:
            module.register_forward_hook(layer_hook)
        for name in (SCOPE, SPEC, BEHIND, CARRIER, RECORDS):
            module.__dict__.pop(name, None)
        for key in [key for key, hook in module._forward_hooks.items() if hook is carry_hook]:
            del module._forward_hooks[key]


def as_before(pickled: bytes) -> bytes:
    """A pickle of protocol 0, whose modules are lines of text, with the names that modules and forwards had."""
    pickled = pickled.replace(b"\nVscope\n", b"\nVpre_norm\n")
    renamed = {new: old for old, news in reversed(_old_paths._MODULES.items()) for new in news.split()}
    for new, old in renamed.items():
        pickled = pickled.replace(f"cred_kernels.{new}\n".encode(), f"cred_kernels.{old}\n".encode())
    return pickled.replace(b"\nPatchState\n", b"\n_State\n")


@pytest.mark.parametrize(("name", "position"), [("llama", "res"), ("bert", "res_with_attn"), ("t5", "ffn")])
def test_pickles_of_patched_models_from_before(name: str, position: str) -> None:
    """A pickle that such a release wrote itself is among `tests/checkpoints`."""
    model = zoo.tiny(name)
    rk.patch(model, rk.RedConfig(position=position))
    rk.add_edit(model, "other")
    zoo.fill(rk.edit_parameters(model), cases.values(rk.edit_parameters(model)))
    batch = zoo.inputs(name)
    with torch.no_grad():
        fused = model(**batch).logits
    without_what_is_new(model)
    given = as_before(pickle.dumps(model, protocol=0))
    assert b"cred_kernels.edit_module\n" in given
    assert b"cred_kernels.patched\n_restore\n" in given
    assert b"\nVpre_norm\n" in given
    assert not re.search(rb"cred_kernels\.(edits\.(?!kinds)|fusion|patching)", given)
    loaded = pickle.load(io.BytesIO(given))
    assert rk.edit_names(loaded) == ("default", "other")
    with torch.no_grad():
        found = loaded(**batch).logits
        assert torch.equal(found, model(**batch).logits)
    torch.testing.assert_close(found, fused)
    rk.unpatch(loaded)
