"""The blocks and stacks whose forward runs in this thread, and the values that leave them.

A value waits, and a sum carries a note, only while the forward of a block runs. At its end each value that leaves is
settled, and a note is removed unless the stack around the block may read it.
"""

from __future__ import annotations

import operator
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from ..edits.module import RedEdit
from .norms import OWN_HOOKS, globally_hooked
from .observe import observed
from .waiting import Waiting

if TYPE_CHECKING:
    from .record import Record

__all__ = ["OWN_HOOKS", "SCOPE", "SITES", "Leaving", "Scope", "Verdict", "collects", "here", "running", "stack_of"]

SITES = "_red_kernels_sites"  # the attribute of a layer with its watched sites
SCOPE = "_red_kernels_scope"  # the attribute of a patched block or stack with its `Verdict`


class _Running(threading.local):
    def __init__(self) -> None:
        self.scopes: list[Scope] = []


here = _Running()


def running() -> list[Scope]:
    """The scopes of this thread, innermost last; ``here.scopes`` where each call counts."""
    return here.scopes


class Verdict:
    """Whether the inside of a block is unobserved, and its sites; found again after each registration of hooks there.

    torch counts all registered hooks, so one number shows whether any was added. But a module may come with earlier
    hooks, so `tree` has the children of each inner module. A copy starts empty.
    """

    __slots__ = ("clean", "hooks", "inside", "sites", "stack", "tree")

    def __init__(self, stack: bool = False) -> None:
        self.stack = stack
        self.hooks = -1
        self.clean = False
        self.inside: list[nn.Module] = []
        self.tree: list[tuple[dict[str, nn.Module | None], tuple[nn.Module | None, ...]]] = []
        self.sites: frozenset[int] = frozenset()

    def __reduce__(self) -> tuple[type[Verdict], tuple[bool]]:
        return Verdict, (self.stack,)

    def holds_for(self, own: RedEdit, block: nn.Module) -> bool:
        """Whether a value of this site may wait in the block, which should contain it, if nothing in it is compiled."""
        # A hook may have been removed since: torch counts only registrations.
        latest = self.hooks == RemovableHandle.next_id and self.clean
        if not latest or id(own) not in self.sites or self._has_changed():
            inside = self.inside = _inside(block)
            self.tree = [
                (one._modules, tuple(one._modules.values())) for one in (block, *inside) if not isinstance(one, RedEdit)
            ]
            self.sites = frozenset(id(module) for module in inside if isinstance(module, RedEdit))
            self.clean = not (globally_hooked() or any(map(observed, inside)))
            self.hooks = RemovableHandle.next_id
        return self.clean and id(own) in self.sites

    def _has_changed(self) -> bool:
        for children, before in self.tree:
            if len(children) != len(before) or any(map(operator.is_not, children.values(), before)):
                return True
        return False

    def compiled(self) -> bool:
        """Whether an inner module is compiled: a waiting value is not for the compiler."""
        return any(module._compiled_call_impl is not None for module in self.inside)


def _inside(block: nn.Module) -> list[nn.Module]:
    """The modules in a block, each once, without the modules of vectors in its sites.

    Those are never called, so hooks on them observe nothing. There may be a thousand, which each call would scan, and
    the list would keep the vectors of a deleted edit.
    """
    found: dict[int, nn.Module] = {}
    waiting = [block]
    while waiting:
        for module in waiting.pop()._modules.values():
            if module is not None and module is not block and id(module) not in found:
                found[id(module)] = module
                if not isinstance(module, RedEdit):
                    waiting.append(module)
    return list(found.values())


class Leaving(Protocol):
    """The end of a scope: checks, and a clean-up after an exception."""

    def leave(self, scope: Scope) -> None: ...

    def drop(self) -> None: ...


class Scope:
    """One call of a block or of a stack.

    Attributes:
        module: the running module.
        stack: whether it is a stack of blocks; sums of a block may be handed on inside it.
        recorded: whether it was entered with gradients; the forward of an `autograd.Function` has none.
        collects: of a stack, whether it returns the values between its blocks, with gradients.
        made: the waiting values, present and former.
        left: the notes not taken yet.
        undecided: sums that may have other readers than their norm.
        compiled: whether a part of the block is compiled; None before the first check.
    """

    __slots__ = ("collects", "compiled", "left", "made", "module", "recorded", "stack", "undecided", "verdict")

    def __init__(self, module: nn.Module, verdict: Verdict, collects: bool = False) -> None:
        self.module, self.verdict, self.stack, self.collects = module, verdict, verdict.stack, collects
        self.made: list[weakref.ref[Waiting]] = []
        self.left: list[Leaving] = []
        self.undecided: list[tuple[Record, Tensor, Tensor]] = []
        self.recorded = torch.is_grad_enabled()
        self.compiled: bool | None = None

    def lets_wait(self, own: RedEdit) -> bool:
        """Whether a value of this site may wait here: its taker then has the same gradient mode as the site."""
        if self.stack or self.recorded != torch.is_grad_enabled() or not self.verdict.holds_for(own, self.module):
            return False
        return not self._has_compiled()

    def _has_compiled(self) -> bool:
        if self.compiled is None:
            self.compiled = self.verdict.compiled()
        return self.compiled

    def close(self, output: Any) -> Any:
        """The block's output, with all its waiting values settled."""
        if self.made and any(value() is not None for value in self.made):
            output = _settled(output)
            for reference in self.made:
                value = reference()
                if value is not None:
                    value.settle_for(f"{type(self.module).__name__} keeps it")
        left = self.left[:]
        self.left.clear()  # each note refers to its list
        for note in left:
            note.leave(self)
        for record, total, normed in self.undecided:
            record.decide(output[0] if type(output) is tuple and output else output, total, normed)
        return output

    def end(self) -> None:
        """Drop the values, after an exception too: a sum that is handed on still refers to this scope."""
        left = self.left[:]
        self.left.clear()
        for note in left:
            note.drop()
        self.undecided.clear()


def _settled(output: Any) -> Any:
    if type(output) is Tensor:
        return output
    if type(output) is Waiting:
        return output.settle_for("the end of its block")
    if type(output) is tuple:
        return tuple(_settled(part) for part in output)
    leaves, structure = tree_flatten(output)
    if not any(type(leaf) is Waiting for leaf in leaves):
        return output
    return tree_unflatten([_settled(leaf) if type(leaf) is Waiting else leaf for leaf in leaves], structure)


def stack_of(scopes: list[Scope]) -> Scope | None:
    """The innermost running stack."""
    for scope in reversed(scopes):
        if scope.stack:
            return scope
    return None


def collects(stack: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether a stack's own forward returns the values between its blocks, with gradients."""
    if not torch.is_grad_enabled():
        return False
    asked = kwargs.get("output_hidden_states")
    return bool(getattr(getattr(stack, "config", None), "output_hidden_states", False) if asked is None else asked)
