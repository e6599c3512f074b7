"""The blocks and stacks whose forward is running in this thread, and what leaves them.

A value waits, and a sum carries a note, only while the forward of a block runs: when it ends, each of them that leaves is
settled, or its note is taken off unless the stack around the block may read it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from ..edits.module import RedEdit
from .norms import OWN_HOOKS, globally_hooked
from .waiting import Waiting

if TYPE_CHECKING:
    from ..ops.handover import Handover
    from .sums import Note, Record

__all__ = ["OWN_HOOKS", "SCOPE", "Scope", "Verdict", "observed", "running", "scope_of", "stack_of"]

SCOPE = "_red_kernels_scope"  # the attribute of a patched block or stack with its `Verdict`
_CAPTURING = "transformers.utils.output_capturing"


class _Running(threading.local):
    def __init__(self) -> None:
        self.scopes: list[Scope] = []


_running = _Running()


def running() -> list[Scope]:
    """The scopes of this thread, the innermost last."""
    return _running.scopes


class Verdict:
    """Whether nobody observes the inside of a block, and the sites in it; found again whenever a hook was registered.

    torch numbers all hooks, so that one number says whether any was added since. A copy starts anew.
    """

    __slots__ = ("clean", "hooks", "sites", "stack")

    def __init__(self, stack: bool = False) -> None:
        self.stack = stack
        self.hooks = -1
        self.clean = False
        self.sites: frozenset[int] = frozenset()

    def __reduce__(self) -> tuple[type[Verdict], tuple[bool]]:
        return Verdict, (self.stack,)

    def holds_for(self, own: RedEdit, block: nn.Module) -> bool:
        """Whether a value of this site, which is to be in the block, may wait there."""
        if self.hooks != RemovableHandle.next_id or id(own) not in self.sites:
            inside = [module for module in block.modules() if module is not block]
            self.sites = frozenset(id(module) for module in inside if isinstance(module, RedEdit))
            self.clean = not (globally_hooked() or any(map(observed, inside)))
            self.hooks = RemovableHandle.next_id
        return self.clean and id(own) in self.sites


class Scope:
    """One call of a block or of a stack.

    Attributes:
        module: that is running.
        stack: whether it is a stack of blocks; sums of a block may be handed on inside of it.
        collects: of a stack, whether it hands out what lies between its blocks, with gradients.
        made: the values that wait, or did.
        left: the notes that were left and are not taken yet.
        undecided: sums of which it is not known yet whether anything but their norm reads them.
    """

    __slots__ = ("collects", "handed", "left", "made", "module", "stack", "undecided", "verdict")

    def __init__(self, module: nn.Module, verdict: Verdict, collects: bool = False) -> None:
        self.module, self.verdict, self.stack, self.collects = module, verdict, verdict.stack, collects
        self.made: list[weakref.ref[Waiting]] = []
        self.left: list[Note] = []
        self.undecided: list[tuple[Record, Tensor, Tensor, Handover]] = []
        self.handed = False

    def close(self, output: Any) -> Any:
        """What the block returns, with all in it that waits settled."""
        if self.made and any(value() is not None for value in self.made):
            output = _settled(output)
            for reference in self.made:
                value = reference()
                if value is not None:
                    value.settle_for(f"{type(self.module).__name__} keeps it")
        for note in self.left:
            note.leave(self)
        for record, total, normed, handover in self.undecided:
            record.decide(output[0] if type(output) is tuple and output else output, total, normed, handover)
        return output


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


def scope_of(module: nn.Module) -> Verdict | None:
    """The `Verdict` of a patched block or stack."""
    found: Verdict | None = module.__dict__.get(SCOPE)
    return found


def stack_of(scopes: list[Scope]) -> Scope | None:
    """The innermost stack that is running."""
    for scope in reversed(scopes):
        if scope.stack:
            return scope
    return None


def observed(module: nn.Module, entering: bool = True, leaving: bool = True) -> bool:
    """Whether hooks of others see what a module is given or returns."""
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if entering and module._forward_pre_hooks and any(map(_observes, module._forward_pre_hooks.values())):
        return True
    return bool(leaving and module._forward_hooks and any(map(_observes, module._forward_hooks.values())))


def _observes(hook: Callable[..., Any]) -> bool:
    """Whether a hook may look at what passes: any but ours may, and but transformers' own, which stay once needed."""
    if hook in OWN_HOOKS:
        return False
    if getattr(hook, "__module__", None) != _CAPTURING:
        return True
    capturing = sys.modules.get(_CAPTURING)
    collector = getattr(capturing, "_active_collector", None)
    if collector is None:
        return True
    collected = collector.get()
    return torch.is_grad_enabled() and collected is not None and "hidden_states" in collected


def chain(outer: nn.Module, inner: nn.Module) -> Iterator[nn.Module]:
    """The modules between two, the second one included; nothing where it is not inside of the first."""
    for name, module in outer.named_modules():
        if module is inner:
            between: nn.Module = outer
            for part in name.split("."):
                between = between._modules[part]  # type: ignore[assignment]
                yield between
            return
