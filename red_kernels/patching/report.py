"""The result of a patch, site by site, and its short table."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..edits.config import RedConfig
from ..edits.module import EDITED, RedEdit
from ..fusion.site import last_record
from ..support.text import listed

__all__ = ["IN_FRONT", "PatchReport", "SiteReport", "count_parameters", "what_of"]

IN_FRONT = "one pass of its own in front of the module"


@dataclass(frozen=True)
class SiteReport:
    """One edited site.

    Attributes:
        site: the module's dotted name.
        width: of the edited tensor.
        fused: the operations in one pass with the edit (`"residual add + next layer's RMSNorm"`), or None.
        reason: why it is not fused; empty if unknown or fused.
        remark: a further remark on the site.
        of_input: whether the module's input is edited instead of its output.
    """

    site: str
    width: int
    fused: str | None
    reason: str = ""
    remark: str = ""
    of_input: bool = False


def what_of(own: RedEdit) -> tuple[str | None, str] | None:
    """The fusion of an edit in the last forward, or the reason for none; None before it ran."""
    if own.on_input:
        return _what_of_input(own)
    record = last_record(own)
    if record is None or (record.what is None and own.kind is not None and not own.kind.kernel):
        return None
    if record.apart:
        name = "its kind" if own.kind is None else f"kind {own.kind.name!r}"
        alone = own.kind is not None and own.kind.kernel
        how = f"edits of {name} " + ("run by themselves" if alone else "have no fused kernel")
        return None, how + (f"; behind it {record.what}" if record.what else "")
    if record.what is None:
        return None, f"its output is taken by {record.by}" if record.by else "it is applied by itself"
    behind = record.behind
    if behind is not None and behind.what:
        return f"{record.what}; then {behind.what}", ""
    return record.what or None, ""


def _what_of_input(own: RedEdit) -> tuple[str | None, str] | None:
    """The same for an edit of an input, with the fusion of the module's output."""
    edited = own.__dict__.get(EDITED)
    module = None if edited is None else edited()
    record = None if module is None else last_record(module)
    if record is None or record.what is None:
        return None
    alone = own.kind is not None and not own.kind.kernel
    said = f"edits of kind {own.kind.name!r} have no fused kernel" if alone and own.kind is not None else IN_FRONT
    return None, f"{said}; behind it {record.what}"


@dataclass(frozen=True)
class PatchReport:
    """The result of `rk.patch`; `print` shows a table, with equal layers in one row.

    It is up to date at any time. For a site that has run it shows the fusion of its last forward, for another site the
    expected one.

    Attributes:
        model: the class of the model.
        config: the config of the patch.
        planned: one `SiteReport` for each edited site, in the model's order, as expected when it was patched.
        trainable: the number of trainable parameters, those of the edits and of a trained head.
        total: the number of all parameters, the edits' included.
        warnings: further remarks, for example on blocks that could not be edited.
        trained_head: the modules of the head that stay trainable (`RedConfig(train_head=True)`), by name.
        frozen_head: the modules of a task head that are frozen like the base model, by name. The head of a language
            model is no task head.
    """

    model: str
    config: RedConfig
    planned: tuple[SiteReport, ...]
    trainable: int
    total: int
    warnings: tuple[str, ...] = ()
    trained_head: tuple[str, ...] = ()
    frozen_head: tuple[str, ...] = ()
    edits: Mapping[str, weakref.ref[RedEdit]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """One `SiteReport` for each edited site, in the model's order, as it is now."""
        return tuple(self._now(site) for site in self.planned)

    def _now(self, site: SiteReport) -> SiteReport:
        reference = self.edits.get(site.site)
        own = None if reference is None else reference()
        found = None if own is None else what_of(own)
        return (
            site
            if found is None
            else replace(site, fused=found[0], reason="; ".join(filter(None, (found[1], site.remark))))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.model, self.config, self.sites, self.trainable, self.total, self.warnings,
                           self.trained_head, self.frozen_head)  # fmt: skip

    def __str__(self) -> str:
        dtype = str(self.config.dtype).removeprefix("torch.")
        patterns = self.config.sites
        where = f"position {self.config.position}" if patterns is None else f"sites {listed(tuple(patterns))}"
        lines = [f"RED in {self.model}: {where}, kind {self.config.kind}, vectors in {dtype}"]
        lines += _table([("sites", "width", "fused with"), *_rows(self.sites)])
        share = 100.0 * self.trainable / max(1, self.total)
        lines.append(f"{self.trainable:,} of {self.total:,} parameters are trained ({share:.3f}%)")
        if self.trained_head:
            lines.append(f"the head is trained too: {listed(self.trained_head)}")
        if self.frozen_head:
            lines.append(
                f"the head is frozen: {listed(self.frozen_head)}; train a new head with the edits by "
                "rk.RedConfig(train_head=True)"
            )
        return "\n".join(lines + [f"warning: {text}" for text in self.warnings])


def _restored(*fields: Any) -> PatchReport:
    return PatchReport(*fields)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; 4-bit ones are counted as stored."""
    every = list(model.parameters())
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)


def _rows(sites: tuple[SiteReport, ...]) -> list[tuple[str, str, str]]:
    """One row for each group of sites that differ only in their layer's number."""
    groups: dict[tuple[str, int, str], list[int]] = {}
    for site in sites:
        # The first number in a name is the layer's: encoder.block.3.layer.1.wo
        number = re.search(r"(?<![^.])[0-9]{1,9}(?![^.])", site.site)
        pattern = site.site if number is None else site.site[: number.start()] + "{}" + site.site[number.end() :]
        pattern = f"input of {pattern}" if site.of_input else pattern
        what = site.fused or "nothing"
        what += f" ({site.reason})" if site.reason else ""
        groups.setdefault((pattern, site.width, what), []).append(-1 if number is None else int(number.group()))
    return [(pattern.replace("{}", _ranges(at)), str(width), what) for (pattern, width, what), at in groups.items()]


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `{0-2,5}`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"  {row[0]:<{first}}  {row[1]:>{second}}  {row[2]}" for row in rows]
