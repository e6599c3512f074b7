"""Every architecture patched, and held to the same edits as plain forward hooks.

`python tests/patching/architecture_runs.py` runs all of them and writes docs/architectures.md.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import architectures as zoo
import numpy
import torch
import transformers
from hooked import flat, paired
from torch import Tensor, nn

from red_kernels.patching.report import SiteReport

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
POSITIONS = ("ffn", "attn", "more", "res")
CLOSE = 1e-4  # of two computations in fp32 whose roundings differ; where they are further apart, fp64 decides


@dataclass
class Run:
    """What became of one architecture at one position.

    Attributes:
        reason: why it was not edited or could not be compared; empty where it was.
        sites: as the report says after the last forward.
        wrong: what differs from plain hooks.
    """

    reason: str = ""
    sites: tuple[SiteReport, ...] = ()
    wrong: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _without_dropout() -> Iterator[None]:
    """No element is dropped in training, so that both compute the same."""
    with mock.patch.object(nn.functional, "dropout", lambda x, *args, **kwargs: x):
        yield


def _gradients(model: nn.Module, batch: dict[str, Any], vectors: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
    numpy.random.seed(0)  # by which some mask their inputs in training
    random.seed(0)
    with _without_dropout():
        value = zoo.run(model, batch)
    if not value.requires_grad:
        return value.detach(), torch.zeros(1)
    found = torch.autograd.grad(value, vectors, allow_unused=True)
    return value.detach(), flat(found, vectors)


def run(architecture: zoo.Architecture, position: str) -> Run:
    """Patch one architecture, in training and in evaluation, and compare two forwards and backwards of each."""
    try:
        built = zoo.build(architecture)
        batch = zoo.inputs(architecture, built)
    except zoo.Unbuildable as error:
        return Run(f"cannot be built here: {error}")
    result = Run()
    for training in (True, False):
        plain = copy.deepcopy(built).train(training)
        try:
            zoo.run(copy.deepcopy(plain), batch)
        except Exception as error:
            result.reason = f"does not run {'in training' if training else ''}: {type(error).__name__}"
            continue
        model = copy.deepcopy(built).train(training)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report, own, others = paired(model, plain, position)
        except ValueError as error:
            return Run(_short(str(error)))
        wanted = _gradients(plain, batch, others)
        for call in ("first", "second"):
            found = _gradients(model, batch, own)
            # The value may be a small difference of large terms, which its gradients tell the size of.
            terms = wanted[1].norm() * torch.cat([vector.detach().flatten() for vector in own]).norm()
            far = [
                ((found[0] - wanted[0]).abs() / (wanted[0].abs() + terms).clamp_min(1e-9)).item(),
                ((found[1] - wanted[1]).norm() / wanted[1].norm().clamp_min(1e-9)).item(),
            ]
            if max(far) > CLOSE and not _as_exact(plain, batch, others, found, wanted):
                mode = "training" if training else "evaluation"
                result.wrong.append(f"{mode}, {call} call: value {far[0]:.1e}, gradients {far[1]:.1e}")
        if training or not result.sites:
            result.sites = report.sites
    return result


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


def _short(text: str) -> str:
    return text.removeprefix("model: ").partition(" For another layout")[0]


def is_fused(site: SiteReport) -> bool:
    """Whether an edit shares a pass with an addition, or with the norm in front of one."""
    return site.fused is not None and ("add" in site.fused or "Norm" in site.fused)


def _cell(result: Run) -> str:
    if result.wrong:
        return f"WRONG: {result.wrong[0]}"
    if not result.sites:
        return result.reason
    groups: Counter[tuple[str, str]] = Counter()
    for site in result.sites:
        name = re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", site.site)
        groups[name, site.fused or f"nothing ({site.reason})"] += 1
    return "; ".join(f"{count} x `{name}`: {what}" for (name, what), count in groups.items())


def main() -> None:
    lines: list[str] = []
    totals = []
    for task in zoo.TASKS:
        rows = []
        counts: Counter[str] = Counter()
        for one in zoo.architectures(task):
            result = run(one, "ffn")
            rows.append(f"| {one.model_type} | {_cell(result)} |")
            counts["all"] += 1
            counts["edited"] += bool(result.sites)
            counts["wrong"] += bool(result.wrong)
            called = [site for site in result.sites if "known after the first forward" not in site.reason]
            counts["fused"] += bool(called) and all(map(is_fused, called))
            counts["normed"] += bool(called) and all("Norm" in (site.fused or "") for site in called)
            print(rows[-1], flush=True)
        totals.append(
            f"| {task} | {counts['all']} | {counts['edited']} | {counts['fused']} | {counts['normed']} | "
            f"{counts['wrong']} |"
        )
        lines += [
            f"\n## {task}\n",
            "| architecture | sites of position `ffn`, and what they are fused with |",
            "|---|---|",
        ]
        lines += rows
    PAGE.write_text(
        "\n".join(
            [
                "# Architectures",
                "",
                f"Every architecture of transformers {transformers.__version__}, built tiny from its own configuration",
                "class and patched at position `ffn`. Values and the gradients of all vectors are held to plain",
                "forward hooks, in training and in evaluation.",
                "`python tests/patching/architecture_runs.py` writes this page.",
                "",
                "*edited* counts architectures with at least one site. *fused* counts those whose every site that was",
                "called shares a pass with its addition, *with norm* those where the norm shares it too. In the last",
                "layer of many models no norm follows.",
                "",
                "| task | architectures | edited | fused | with norm | wrong |",
                "|---|---|---|---|---|---|",
                *totals,
                *lines,
                "",
            ]
        )
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
