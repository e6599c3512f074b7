"""The data that the fast paths in C++ read from this package: classes, whose slots they find, and the edits in force.

The fast paths are in ``csrc/nodes/quick.cpp`` and ``scopes.cpp``, and do not change results. If anything differs from
an earlier call, they leave the call to the functions here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._device import DeviceContext
from torch.utils.hooks import RemovableHandle

from ..backends import Backend, choose, nodes
from ..backends.arguments import Dropout, Edit
from ..edits import blocks
from ..edits.module import NAME
from ..ops.handover import Handover
from .norms import SPEC
from .plan import Records, SitePlan
from .record import Link, Record
from .scopes import SCOPE, SITES, Scope, Verdict, collects, here
from .site import CARRIER, RECORDS
from .sums import NOTE, Note
from .waiting import Waiting

__all__ = ["prepare"]


def _chosen(x: Tensor, operation: str) -> Backend:
    return choose(x, operation)


def prepare(check_layer: Callable[[nn.Module], None]) -> None:
    """Enable the fast paths; ``check_layer`` checks that the edits of a layer have run."""
    if nodes.know is None or nodes.forget_choices is None:
        return
    classes = (Dropout, Edit, Handover, Link, Note, Record, Records, RemovableHandle, Scope, SitePlan, Verdict, Waiting)
    nodes.know(
        {kind.__name__: kind for kind in classes}
        | {"own_edit": NAME, "carrier": CARRIER, "records": RECORDS, "note": NOTE, "spec": SPEC, "sites": SITES}
        | {"here": here, "streams": blocks._streams, "held": blocks._held, "choose": _chosen, "collects": collects}
        | {"compiler": vars(torch.compiler), "functional": vars(functional), "dropout_function": functional.dropout}
        | {"check_layer": check_layer, "scope": SCOPE, "device_context": DeviceContext}
    )
    nodes.forget_choices(True)
