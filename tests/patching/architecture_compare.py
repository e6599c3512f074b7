"""Every architecture patched, and held to the same edits as plain forward hooks."""

from __future__ import annotations

import contextlib
import copy
import importlib
import random
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import architectures as zoo
import numpy
import torch
from hooked import flat, paired
from torch import Tensor, nn

from red_kernels.edits.find import edit_modules
from red_kernels.patching.report import SiteReport, what_of

POSITIONS = ("ffn", "attn", "more", "res")
CLOSE = 1e-4  # of two computations in fp32 whose roundings differ; where they are further apart, fp64 decides
_MODES = {True: "in training", False: "in evaluation"}


@dataclass
class Run:
    """What became of one architecture at one position.

    Attributes:
        reason: why it was not edited or could not be compared; empty where it was.
        sites: as the report says after the last forward.
        places: of each site, what it is in its layer: `"ffn"`, `"attn"`, `"qkv"`, `"res"` or `"attn_res"`.
        called: the sites that have run. Some models drop layers in training, and an input may leave parts out.
        wrong: what differs from plain hooks.
    """

    reason: str = ""
    sites: tuple[SiteReport, ...] = ()
    places: dict[str, str] = field(default_factory=dict)
    called: frozenset[str] = frozenset()
    wrong: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _without_dropout() -> Iterator[None]:
    """No element is dropped in training, so that both compute the same."""
    with mock.patch.object(nn.functional, "dropout", lambda x, *args, **kwargs: x):
        yield


def _expecting_nothing() -> Any:
    """`patch` does not foresee what will be fused: that takes longest, and has no part in what is compared."""
    return mock.patch.object(importlib.import_module("red_kernels.patching.patch"), "expected", return_value={})


def _gradients(model: nn.Module, batch: dict[str, Any], vectors: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    numpy.random.seed(0)  # by which some mask their inputs in training
    random.seed(0)
    with _without_dropout():
        value = zoo.run(model, batch)
    if not value.requires_grad:
        return value.detach(), torch.zeros(1)
    found = torch.autograd.grad(value, vectors, allow_unused=True)
    return value.detach(), flat(found, vectors)


class Subject:
    """One architecture, built once for all positions.

    Attributes:
        reason: why it cannot be built; empty where it can.
        fails: why the unedited model does not run, by whether it trains; empty where it does.
    """

    def __init__(self, architecture: zoo.Architecture) -> None:
        self.reason = ""
        self.fails: dict[bool, str] = {}
        try:
            self.built = zoo.build(architecture)
            self.batch = zoo.inputs(architecture, self.built)
        except zoo.Unbuildable as error:
            self.reason = f"cannot be built here: {error}"
            return
        for training in (True, False):
            try:
                zoo.run(copy.deepcopy(self.built).train(training), self.batch)
                self.fails[training] = ""
            except Exception as error:
                self.fails[training] = f"does not run {_MODES[training]}: {_told(error)}"

    def run(self, position: str, foreseen: bool = True) -> Run:
        """Patch it, in training and in evaluation, and compare two forwards and backwards of each with plain hooks.

        Without ``foreseen`` the patch for training does not foresee either what will be fused: that takes as long as
        all the rest, and has no part in what is compared.
        """
        result = Run(self.reason)
        if self.reason:
            return result
        for training, mode in _MODES.items():
            if self.fails[training]:
                result.reason = self.fails[training]
                continue
            model, plain = (copy.deepcopy(self.built).train(training) for _ in range(2))
            try:
                foreseeing = contextlib.nullcontext() if training and foreseen else _expecting_nothing()
                with warnings.catch_warnings(), foreseeing:
                    warnings.simplefilter("ignore")
                    report, own, others = paired(model, plain, position)
            except ValueError as error:
                return Run(_short(str(error)))
            try:
                wanted = _gradients(plain, self.batch, others)
            except Exception as error:
                result.reason = f"does not run with plain hooks {mode}, {_alike(model, self.batch)}: {_told(error)}"
                continue
            if not all(each.isfinite().all() for each in wanted):
                result.reason = f"its own values are not finite {mode}"
                continue
            if not wanted[1].any():
                result.reason = "no gradient reaches its vectors, nor those of plain hooks"
            try:
                for call in ("first", "second"):
                    far, note = _difference(model, plain, self.batch, own, others, wanted)
                    result.wrong += [f"{mode}, {call} call: {far}"] if far else []
                    result.reason = f"{note} {mode}" if note else result.reason
            except Exception as error:
                result.wrong.append(f"{mode}: {_told(error)}")
            if training or not result.sites:
                edits = edit_modules(model)
                result.sites = report.sites
                result.places = {name: edit.place for name, edit in edits.items()}
                result.called = frozenset(name for name, edit in edits.items() if what_of(edit) is not None)
        return result


def _difference(
    model: nn.Module,
    plain: nn.Module,
    batch: dict[str, Any],
    own: list[nn.Parameter],
    others: list[nn.Parameter],
    wanted: tuple[Tensor, Tensor],
) -> tuple[str, str]:
    """What is wrong in one call; and if nothing is but the two are far apart because roundings grow, a note of that."""
    found = _gradients(model, batch, own)
    far = _apart(found, wanted, own)
    told = f"value {far[0]:.1e}, gradients {far[1]:.1e}"
    if all(one <= CLOSE for one in far) or _as_exact(plain, batch, others, found, wanted):
        return "", ""
    wavers = _wavering(plain, batch, others, wanted)
    if all(one <= max(CLOSE, 2 * other) for one, other in zip(far, wavers, strict=True)):
        return "", f"the last bit of the vectors changes the gradients of plain hooks by {wavers[1]:.0e}"
    return told, ""


def _apart(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], vectors: list[nn.Parameter]) -> list[float]:
    """How far values and gradients are apart, relative."""
    # The value may be a small difference of large terms, which its gradients tell the size of.
    terms = wanted[1].norm() * torch.cat([vector.detach().flatten() for vector in vectors]).norm()
    return [
        ((found[0] - wanted[0]).abs() / (wanted[0].abs() + terms).clamp_min(1e-9)).item(),
        ((found[1] - wanted[1]).norm() / wanted[1].norm().clamp_min(1e-9)).item(),
    ]


@torch.no_grad()
def _nudge(vectors: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for vector in vectors:
        vector.mul_(1 + 6e-8 * torch.randn(vector.shape, generator=generator))


def _wavering(
    plain: nn.Module, batch: dict[str, Any], vectors: list[nn.Parameter], wanted: tuple[Tensor, Tensor]
) -> list[float]:
    """How far apart the plain model's own results are, at most, if the vectors change in the last bit.

    Batch norms of two rows and of one pixel turn a rounding into a large difference.
    """
    former = [vector.detach().clone() for vector in vectors]
    found = []
    for seed in range(6):
        _nudge(vectors, seed)
        found.append(_apart(_gradients(plain, batch, vectors), wanted, vectors))
        with torch.no_grad():
            for vector, value in zip(vectors, former, strict=True):
                vector.copy_(value)
    return [max(each) for each in zip(*found, strict=True)]


def run(architecture: zoo.Architecture, position: str, foreseen: bool = True) -> Run:
    """Patch one architecture at one position, and compare it with plain hooks; see :meth:`Subject.run`."""
    return Subject(architecture).run(position, foreseen)


def _as_exact(plain: nn.Module, batch: dict[str, Any], vectors: list[nn.Parameter], found: Any, wanted: Any) -> bool:
    """Whether the patched model is as near to float64 as the plain one: some gradients are nothing but roundings."""
    wide = copy.deepcopy(plain).double()
    names = {id(vector): at for at, vector in enumerate(vectors)}
    twin = [vector.detach().double().requires_grad_() for vector in vectors]
    swapped: list[Any] = []
    # The hooks of `naive_edit` hold the vectors in their closures.
    for module in wide.modules():
        for hook in module._forward_hooks.values():
            for cell in getattr(hook, "__closure__", None) or ():
                held = cell.cell_contents
                if isinstance(held, dict) and all(isinstance(one, nn.Parameter) for one in held.values()):
                    swapped.append((held, dict(held)))
                    held.update({part: twin[names[id(one)]] for part, one in held.items()})
    try:
        inputs = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}
        exact = _gradients(wide, inputs, twin)  # type: ignore[arg-type]
    except Exception:
        return False
    finally:
        for held, former in swapped:
            held.update(former)
    return all(
        (one.double() - truth).norm() <= 2 * (other.double() - truth).norm() + 1e-6 * truth.norm() + 1e-9
        for one, other, truth in zip(found, wanted, exact, strict=True)
    )


def _alike(model: nn.Module, batch: dict[str, Any]) -> str:
    try:
        zoo.run(model, batch)
    except Exception:
        return "nor patched"
    return "but patched"


def _short(text: str) -> str:
    return text.removeprefix("model: ").partition(" For another layout")[0]


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} [{last.filename.rpartition('/')[2]}:{last.lineno}]"
