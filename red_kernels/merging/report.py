"""The result of a merge, with its errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["MergeReport", "SiteMerge"]


@dataclass(frozen=True)
class SiteMerge:
    """One merged edit.

    Attributes:
        site: the edited module.
        module: the linear layer or norm that the edit went into.
        dtype: of its weight.
        weight_error: the size of the weight's change that rounding lost, over the size of that change (Frobenius
            norms); 0 if the weight does not change.
        bias_error: the same for the bias.
        created_bias: whether the module had no bias before.
    """

    site: str
    module: str
    dtype: str
    weight_error: float
    bias_error: float
    created_bias: bool

    @property
    def error(self) -> float:
        """The larger of both errors; NaN if one of them is."""
        both = self.weight_error, self.bias_error
        return max(both) if not any(map(math.isnan, both)) else math.nan


@dataclass(frozen=True)
class MergeReport:
    """The result of `rk.merge`; `print` shows a table.

    Attributes:
        model: the class of the model.
        edit: the name of the merged edit.
        sites: one `SiteMerge` for each site.
        config_changes: the attributes of the model's config that were set.
        zero_biases: further biases that these imply, added as zeros.
        unplaced: biases that plain transformers will not load; empty if it loads all.
    """

    model: str
    edit: str
    sites: tuple[SiteMerge, ...]
    config_changes: dict[str, Any]
    zero_biases: tuple[str, ...]
    unplaced: str = ""

    def __str__(self) -> str:
        width = max(len(site.module) for site in self.sites)
        lines = [f"edit {self.edit!r} merged into {len(self.sites)} layers of {self.model}; lost in rounding:"]
        lines.append(f"  {'layer':<{width}}  {'dtype':<8}  {'weight':>8}  {'bias':>8}")
        for site in self.sites:
            remark = "  new bias" if site.created_bias else ""
            lines.append(
                f"  {site.module:<{width}}  {site.dtype:<8}  {site.weight_error:>8.2%}  {site.bias_error:>8.2%}{remark}"
            )
        if self.config_changes:
            changes = ", ".join(f"{key}={value}" for key, value in self.config_changes.items())
            lines.append(f"config: {changes}; {len(self.zero_biases)} more new biases are zeros")
        if self.unplaced:
            lines.append(f"warning: plain transformers will not load {self.unplaced}")
        return "\n".join(lines)
