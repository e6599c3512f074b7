"""The input of a stack's first layer, for edits in that stack that read it.

A hook before the stack opens an entry. Hooks before the layers store the input of the first one. A hook after the
stack, which runs after an exception too, closes the entry. Entries belong to a thread. Under activation checkpointing
the first run leaves the value next to the notes of `recompute`, and the second run takes it from there.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .recompute import keep, kept

__all__ = ["STREAM", "Stream", "close_stream", "enter_hook", "given_hook", "initial_of", "leave_hook", "open_stream"]

STREAM = "_red_kernels_stream"  # of a layer and of a `RedEdit`: the `Stream` of its stack
_STREAMS = "_red_kernels_streams"  # of the module that calls the layers: the streams of its stacks
_ROOT = "_red_kernels_root"  # of an alias: its original tensor
_LATE = "_red_kernels_late"  # of a tensor: gradients that reach it on another path
_CALL = nn.Module._call_impl.__code__


class Stream:
    """One stack of layers, by its name, for messages."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Entry:
    """A running forward of a stack.

    Attributes:
        frame: that runs it; None if unknown.
        task: of autograd, if it runs in a backward pass.
        given: the first layer's input, and its count of in-place changes.
        outer: the entry before.
    """

    def __init__(self, stream: Stream, outer: _Entry | None) -> None:
        self.stream, self.outer = stream, outer
        self.frame, self.task = _calling(), torch._C._current_graph_task_id()
        self.given: tuple[Tensor, int] | None = None


class _Running(threading.local):
    top: _Entry | None = None


_running = _Running()


def open_stream(stream: Stream, owner: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Make the layers of a stack store the first layer's input while the forward of `owner` runs."""
    if _STREAMS not in owner.__dict__:
        nn.Module.register_forward_pre_hook(owner, enter_hook)
        nn.Module.register_forward_hook(owner, leave_hook, always_call=True)
    owner.__dict__[_STREAMS] = (*owner.__dict__.get(_STREAMS, ()), stream)
    for layer in layers:
        layer.__dict__[STREAM] = stream
        nn.Module.register_forward_pre_hook(layer, given_hook, with_kwargs=True)


def close_stream(module: nn.Module) -> None:
    """Remove the marks of `open_stream` from a module."""
    module.__dict__.pop(_STREAMS, None)
    module.__dict__.pop(STREAM, None)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (enter_hook, leave_hook, given_hook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def enter_hook(module: nn.Module, args: Any) -> None:
    """The hook before the module that calls the layers."""
    _eagerly(_enter, module)


def leave_hook(module: nn.Module, args: Any, output: Any) -> None:
    """The hook after it."""
    _eagerly(_leave, module)


def given_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hook before a layer."""
    _eagerly(_fill, layer, args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))


def initial_of(stream: Stream | None, hidden: Tensor, site: str) -> Tensor:
    """The first layer's input in this forward, in the shape of `hidden`. Raises RuntimeError if it is unknown."""
    found: Tensor = _eagerly(_initial, stream, hidden, site)
    return found


def _eagerly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function outside the graph of compiled code: a thread's state is not for graphs."""
    if torch.compiler.is_compiling():
        from .uncompiled import uncompiled  # late: it imports the compiler

        return uncompiled(function, *arguments)
    return function(*arguments)


def _enter(module: nn.Module) -> None:
    _forget()
    for stream in module.__dict__.get(_STREAMS, ()):
        _running.top = _Entry(stream, _running.top)


def _leave(module: nn.Module) -> None:
    streams = module.__dict__.get(_STREAMS)
    entry = _entry(streams[0]) if streams else None  # the others are above it
    if entry is not None:
        _running.top = entry.outer


def _fill(layer: nn.Module, given: object) -> None:
    _forget()
    entry = _entry(layer.__dict__.get(STREAM))
    if entry is None or entry.given is not None or not isinstance(given, Tensor):
        return
    if entry.task == torch._C._current_graph_task_id():  # otherwise a layer of an earlier forward runs again
        entry.given = given, _version(given)


def _entry(stream: Stream | None) -> _Entry | None:
    entry = _running.top
    while entry is not None and entry.stream is not stream:
        entry = entry.outer
    return entry


def _forget() -> None:
    """Drop the entries of forwards that an interrupt has ended without a hook."""
    if _running.top is None:
        return
    while _running.top is not None and _running.top.frame is not None and not _runs(_running.top.frame):
        _running.top = _running.top.outer


def _runs(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is wanted


def _calling() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


def _initial(stream: Stream | None, hidden: Tensor, site: str) -> Tensor:
    _forget()
    entry = _entry(stream)
    found = None
    if entry is not None and entry.given is not None and entry.task == torch._C._current_graph_task_id():
        found = entry.given
        if _version(found[0]) != found[1]:
            raise RuntimeError(
                f"model: the first layer of {entry.stream.name} has changed its input in place, but the edit at "
                f"{site} reads that input; an edit of kind 'initial' cannot be used here"
            )
        first = found[0]
    else:
        noted, by_node = kept(stream)
        if noted is None:
            where = "it is in no stack of layers" if stream is None else f"no forward of {stream.name} is running"
            raise RuntimeError(
                f"model: the edit at {site} reads the input of its stack's first layer, but {where}; call the model, "
                "or disable the edits (rk.disable_edits) to call a part of it"
            )
        first = _again(noted) if by_node and torch.is_grad_enabled() and noted.requires_grad else noted
    keep(stream, first)
    if first.shape == hidden.shape:
        return first
    rows = first.shape[:-1].numel()
    if hidden.dim() == 2 and (rows, first.shape[-1]) == tuple(hidden.shape):  # tokens laid out in rows
        return first.reshape(hidden.shape)
    raise RuntimeError(
        f"model: the edit at {site} is of an output of shape {tuple(hidden.shape)}, but the input of its stack's first "
        f"layer has shape {tuple(first.shape)}; an edit of kind 'initial' adds them"
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _again(first: Tensor) -> Tensor:
    """For the second run of a reentrant checkpoint: an alias whose gradient joins the tensor's other ones.

    That run's own backward pass would continue past the tensor, once for each checkpoint. Its gradient is kept instead
    until autograd reaches the tensor: after all layers, since their input depends on it.
    """
    root = getattr(first, _ROOT, first)
    late: list[Tensor] | None = getattr(root, _LATE, None)
    if late is None:
        late = []
        setattr(root, _LATE, late)
        root.register_hook(_adding(late))
    with torch.enable_grad():
        alias = first.detach().requires_grad_()
    setattr(alias, _ROOT, root)
    alias.register_hook(_keeping(late))
    return alias


def _adding(late: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def hook(gradient: Tensor) -> Tensor:
        for one in late:
            gradient = gradient + one
        late.clear()
        return gradient

    return hook


def _keeping(late: list[Tensor]) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        late.append(gradient.detach())

    return hook
