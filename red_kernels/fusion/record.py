"""The record of a site's sums from its earlier calls, and of the norm that reads them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..backends.arguments import Norm
from ..ops.ambient import QUIET
from .norms import SPEC
from .observe import hooked, observed

__all__ = ["ADDS", "Link", "Record"]

ADDS = ("residual add", "dropout + residual add")  # operations fused with an edit, for the report


class Link:
    """The norm that reads a sum, learnt in an earlier call.

    It refers to no module strongly: the sites of a layer have links to their own norms.

    Attributes:
        across: whether it is outside the block that computes the sum, in the same stack.
        leaves, enters: the modules that the sum leaves on its path, and those that it enters, the norm included.
        title: for the report; `said` with the addition in front, and with a dropout in front of that.
    """

    __slots__ = ("_kept", "_norm", "_passed", "across", "enters", "free", "hooks", "leaves", "said", "title")

    def __init__(
        self, norm: nn.Module, across: bool, title: str, leaves: Iterable[nn.Module], enters: Iterable[nn.Module]
    ) -> None:
        self._norm, self.across, self.title = weakref.ref(norm), across, title
        self.said = tuple(f"{adds} + {title}" for adds in ADDS)
        self.leaves, self.enters = (tuple(map(weakref.ref, passed)) for passed in (leaves, enters))
        self.hooks, self.free = -1, False
        self._passed: tuple[tuple[nn.Module, bool], ...] = ()  # those with foreign hooks
        self._kept: _Kept | None = None

    @property
    def norm(self) -> nn.Module | None:
        """The module; None after its deletion."""
        return self._norm()

    def unseen(self) -> bool:
        """Whether no hook observes a sum on its path."""
        if self.hooks != RemovableHandle.next_id or not self.free:
            passed = [(reference(), False) for reference in self.leaves]
            passed += [(reference(), True) for reference in self.enters]
            there = [(module, enters) for module, enters in passed if module is not None]
            self._passed = tuple((module, enters) for module, enters in there if hooked(module))
            self.free = len(there) == len(passed) and not self._observed()
            self.hooks = RemovableHandle.next_id
        elif self.across and self._passed:  # hooks of transformers observe at times
            return not self._observed()
        return self.free

    def _observed(self) -> bool:
        return any(observed(module, entering=enters) for module, enters in self._passed)

    def keep(self, norm: nn.Module, found: Norm, dtype: torch.dtype, device: torch.device, now: int) -> None:
        """Keep the norm's arguments for the next call."""
        spec = norm.__dict__[SPEC]
        parameters = norm._parameters
        own = found.weight is (parameters.get(spec.weight) if spec.weight else None)
        if own and not now & ~QUIET and device.type in ("cpu", "cuda"):  # `now` covers autocast only there
            names = spec.weight or None, spec.bias or None, spec.eps or None
            self._kept = _Kept(now, RemovableHandle.next_id, dtype, device, found, *names)


class _Kept(NamedTuple):
    """The arguments of a norm, with their sources; ``csrc/nodes/quick.cpp`` reads it by position."""

    now: int
    hooks: int
    dtype: torch.dtype
    device: torch.device
    found: Norm
    weight: str | None  # names in the norm; None for none
    bias: str | None
    eps: str | None


class Record:
    """The record of one site's sums in one mode (training or not, with gradients or without).

    Attributes:
        name: the site's.
        link: the norm of its sums, if there is one.
        alone: only that norm reads them, so they need not be kept.
        lazy: an operation came between a sum and its norm, so the sum waits as well.
        proven: an addition or a norm has taken the site's value.
        at_once: another function has taken it, so it need not wait.
        astray: it was settled without gradients, as by an `autograd.Function`: it gets its own node.
        what: the operations fused with the edit in the last forward; `by` the function that settled it.
        apart: the edit had its own pass before that, since no kernel for it takes an addition.
        returned_by: the forwards of a site that return their norm's output unchanged.
    """

    __slots__ = (
        "alone", "apart", "astray", "at_once", "behind", "by", "decided", "lazy", "link", "misses", "name", "proven",
        "returned_by", "searches", "what",
    )  # fmt: skip

    total: ClassVar[Any]  # computes a waiting sum; `sums.py` sets it

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.link: Link | None = None
        self.apart = self.alone = self.proven = self.at_once = self.astray = self.decided = self.lazy = False
        self.misses = self.searches = 0
        self.what: str | None = None
        self.by = ""
        self.behind: Record | None = None
        self.returned_by: tuple[Any, Any] | None = None

    def settled(self, by: str) -> None:
        """A function that takes no waiting value was called with one."""
        self.by, self.what = by, None
        self.at_once = not self.proven

    def taken(self, what: str) -> None:
        self.proven, self.what, self.by = not self.astray, what, ""

    def alone_in_pass(self) -> None:
        """The edit was applied at once, in a pass of its own."""
        self.what = None
        self.by = self.by if self.at_once else ""

    def missed(self) -> None:
        """The norm did not read the sum this time."""
        self.link, self.alone, self.decided = None, False, True
        self.misses += 1

    def decide(self, stream: object, total: Tensor, normed: Tensor) -> None:
        """Decide from the present stream, in the first call, whether only its norm reads the sum."""
        if not self.decided and (stream is total or stream is normed):
            self.decided = True
            self.alone = stream is normed

    def of_norm(self) -> Record:
        """The record of the sum with the norm of this site's value."""
        if self.behind is None:
            self.behind = Record(self.name)
        return self.behind
