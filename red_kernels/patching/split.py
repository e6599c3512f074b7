"""How tensor parallelism splits the sites of a model, by the weights and outputs of their linear layers.

A linear layer's weight is a DTensor. It shows the split dimension, but not the layer's output: a layer split by columns
may gather them, and one split by rows may keep a part of the rows of its output. So the layer runs once, on zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.kinds import Kind
from ..edits.lies import Lies
from ..support.sharded import is_sharded
from .plan import PlannedSite

__all__ = ["Split", "mesh_of", "split_of"]

# Styles of a plan that determine the gradients of a module without a split weight; transformers leaves the plan in
# the model.
_PARTIAL = "replicated_with_grad_allreduce"
_PARTLY = "mla_kv_a_proj"


@dataclass(frozen=True)
class Split:
    """The placement of one site's vectors on the processes of a mesh.

    Attributes:
        mesh: a `DeviceMesh` of one dimension.
        placement: of the vectors.
        lies: the part of them that each process applies.
        remark: for the report.
    """

    mesh: Any
    placement: Any
    lies: Lies
    remark: str = ""


def mesh_of(model: nn.Module) -> Any:
    """The mesh of the processes that share a batch, each with a part of the weights; None if there is none.

    Raises:
        ValueError: the weights are split over a mesh of several dimensions.
    """
    mesh: Any = next((own.device_mesh for own in model.parameters() if is_sharded(own) and own.dim() < 3), None)  # type: ignore[attr-defined]
    if mesh is None and any(map(is_sharded, model.parameters())):
        # Only experts are split, perhaps over processes with other batches; transformers lists the processes of this
        # batch.
        manager: Any = getattr(model, "_mesh_manager", None)
        mesh = None if manager is None else manager.get_mesh("tp")
    if mesh is None or mesh.size() < 2:
        return None
    if mesh.ndim != 1:
        raise ValueError(
            f"model: its weights are split over a mesh of {mesh.ndim} dimensions, expected one; patch after tensor "
            "parallelism and before fully_shard"
        )
    return mesh


def split_of(model: nn.Module, sites: Iterable[PlannedSite], kind: Kind, mesh: Any) -> list[Split]:
    """How the sites of a model are split over a mesh; all processes of the mesh must call this.

    Raises:
        ValueError: a site is split, but an edit of this kind cannot be; or the split of the site is unknown.
    """
    plan = getattr(model, "_tp_plan", None)
    return [_split(site, kind, mesh, plan if isinstance(plan, dict) else {}) for site in sites]


def _split(site: PlannedSite, kind: Kind, mesh: Any, plan: dict[str, str]) -> Split:
    from torch.distributed.tensor import Replicate

    name, count = site.report.site, mesh.size()
    style = plan.get(re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name))
    if style == _PARTLY and not site.on_input:
        raise ValueError(
            f"model: each process has the whole gradient of some columns of {name} and a part of the gradient of the "
            f"others (style {style!r}), so the gradients of its vectors would be wrong; choose other sites or layers"
        )
    weight = None if site.hooked is not None else _split_weight(site.module)
    columns, rows = (False, style == _PARTIAL) if weight is None else _probed(site, weight, count)
    groups = (mesh.get_group(),) if rows else ()
    remark = f"rows split over {count} processes" if rows and weight is not None else ""
    if not columns:
        return Split(mesh, Replicate(), Lies(groups=groups), remark)
    try:
        part = kind.split(site.width, count)
    except ValueError as error:
        side = "input" if site.on_input else "output"
        raise ValueError(
            f"model: tensor parallelism splits the columns of the {side} of {name} over {count} processes, and an edit "
            f"of kind {kind.name!r} {error}; choose another kind, or a position whose sites are whole"
        ) from None
    remark = "; ".join(filter(None, (f"columns split over {count} processes", remark)))
    return Split(mesh, _of_vectors(weight, site.on_input), Lies(part, True, groups), remark)


def _split_weight(module: nn.Module) -> Any:
    """The weight of a linear layer that is split over processes; None for another module."""
    while callable(inner := getattr(module, "get_base_layer", None)) and (base := inner()) is not module:
        module = base
    weight: Any = getattr(module, "weight", None)
    linear = isinstance(weight, Tensor) and weight.dim() == 2 and hasattr(module, "out_features")
    return weight if linear and is_sharded(weight) and weight.placements[0].is_replicate() is False else None


def _of_vectors(weight: Any, on_input: bool) -> Any:
    """The placement of vectors that are split like the columns of a weight's output or input."""
    from torch.distributed.tensor import Shard

    placement = weight.placements[0]
    # A placement that interleaves the parts of a packed weight holds for the output's vectors too.
    return Shard(0) if on_input or isinstance(placement, Shard) else placement


def _probed(site: PlannedSite, weight: Any, count: int) -> tuple[bool, bool]:
    """Whether a process has only a part of the columns of the edited tensor, and whether a part of the rows."""
    name, local = site.report.site, weight.to_local()
    by_rows = weight.placements[0].dim == 1  # of the weight (out, in): its inputs are split
    widths = (int(local.shape[1]), int(weight.shape[1])) if by_rows else (int(weight.shape[1]),)
    given = 2 * count
    for width in widths:
        try:
            with torch.no_grad():
                returned: Any = site.module(torch.zeros(1, given, width, dtype=_dtype(weight), device=local.device))
        except Exception as error:
            failure = error
            continue
        if is_sharded(returned) or not isinstance(returned, Tensor):
            raise ValueError(
                f"model: {name} returns a {type(returned).__name__} under tensor parallelism, expected this process's "
                "part as a plain tensor (use_local_output=True)"
            )
        rows = int(returned.shape[-2])
        if site.on_input:
            return width < weight.shape[1], rows > given
        whole = int(returned.shape[-1]) == site.width
        if whole or returned.shape[-1] == local.shape[0]:
            return not whole, rows < given
        raise ValueError(
            f"model: {name} returns {returned.shape[-1]} of {site.width} columns under tensor parallelism, expected "
            f"all or the {local.shape[0]} of this process's part of the weight"
        )
    raise ValueError(
        f"model: it is unknown how tensor parallelism splits {name}: its layer does not run on zeros "
        f"({type(failure).__name__}: {str(failure)[:200]})"
    )


def _dtype(weight: Tensor) -> torch.dtype:
    return weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
