"""What is known of the sums of a site from its earlier calls, and of the norm that reads them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .observe import observed

__all__ = ["Link", "Record"]


class Link:
    """The norm that reads a sum, learnt from an earlier call.

    It keeps no module alive: the sites of a layer hold links to its own norms.

    Attributes:
        across: whether it lies outside of the block that computes the sum, in the same stack.
        leaves, enters: the modules that the sum leaves on its way, and those that it enters, the norm included.
        title: for the report.
    """

    __slots__ = ("_norm", "across", "enters", "free", "hooks", "leaves", "title")

    def __init__(
        self, norm: nn.Module, across: bool, title: str, leaves: Iterable[nn.Module], enters: Iterable[nn.Module]
    ) -> None:
        self._norm, self.across, self.title = weakref.ref(norm), across, title
        self.leaves, self.enters = (tuple(map(weakref.ref, passed)) for passed in (leaves, enters))
        self.hooks, self.free = -1, False

    @property
    def norm(self) -> nn.Module | None:
        """The module; None once it is gone."""
        return self._norm()

    def unseen(self) -> bool:
        """Whether nobody observes a sum on its way."""
        if self.hooks != RemovableHandle.next_id or not self.free or self.across:
            # Hooks of transformers observe at times, so a way across blocks is asked for each time.
            left, entered = ([reference() for reference in passed] for passed in (self.leaves, self.enters))
            self.free = not (
                any(module is None or observed(module, entering=False) for module in left)
                or any(module is None or observed(module) for module in entered)  # forward hooks see what it is given
            )
            self.hooks = RemovableHandle.next_id
        return self.free


class Record:
    """What is known of the sums of one site in one mode (training or not, with gradients or without).

    Attributes:
        name: the site's.
        link: the norm of its sums, if there is one.
        alone: nothing but that norm reads them, so they need not be kept.
        lazy: something was done to a sum before its norm read it, so that it waits as well.
        proven: an addition or a norm has taken the site's value.
        at_once: something else has, so that it need not wait.
        astray: it was settled without gradients, as by an `autograd.Function`: give it a node of its own.
        what: what the edit was fused with in the last forward; `by` the function that settled it.
        returned_by: the forwards of a site that return the output of the norm in it as it is.
    """

    __slots__ = (
        "alone", "astray", "at_once", "behind", "by", "decided", "lazy", "link", "misses", "name", "proven",
        "returned_by", "searches", "what",
    )  # fmt: skip

    total: ClassVar[Any]  # computes a sum that waits; `sums.py` sets it

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.link: Link | None = None
        self.alone = self.proven = self.at_once = self.astray = self.decided = self.lazy = False
        self.misses = self.searches = 0
        self.what: str | None = None
        self.by = ""
        self.behind: Record | None = None
        self.returned_by: tuple[Any, Any] | None = None

    def settled(self, by: str) -> None:
        """A function that takes no waiting value was given one."""
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
        """Tell from what goes on as the stream, in the first call, whether the sum is read by its norm alone."""
        if not self.decided and (stream is total or stream is normed):
            self.decided = True
            self.alone = stream is normed

    def of_norm(self) -> Record:
        """The record of what the norm of this site's value is added to."""
        if self.behind is None:
            self.behind = Record(self.name)
        return self.behind
