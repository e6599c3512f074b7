"""The bars of other libraries, only on a terminal: in a log file each update of a bar would be a line."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["bars_on_terminals_only"]

_BEFORE_DISABLE = 10  # arguments of tqdm that come before `disable`


@contextlib.contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Disables the bars of tqdm, transformers, datasets and huggingface_hub if standard error is no terminal.

    Each library's own switch is set, and restored after. tqdm has only a switch for each bar (`disable=None`: no bar if
    its file is no terminal), which becomes the default in the meantime. The other three are switched if they are
    imported already; a later import uses tqdm's default. The switches belong to the process: other threads see them
    too.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        yield
        return
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("tqdm") is not None:
            stack.enter_context(_tqdm())
        for switch in (_hub, _transformers, _datasets):
            stack.enter_context(switch())
        yield


@contextlib.contextmanager
def _tqdm() -> Iterator[None]:
    bar: Any = importlib.import_module("tqdm.std").tqdm
    former = vars(bar)["__init__"]  # the raw attribute: access through the class would bind it
    unbound = bar.__init__

    @functools.wraps(unbound)
    def made(self: Any, *arguments: Any, **options: Any) -> None:
        if len(arguments) <= _BEFORE_DISABLE:
            options.setdefault("disable", None)
        unbound(self, *arguments, **options)

    bar.__init__ = made
    try:
        yield
    finally:
        bar.__init__ = former


@contextlib.contextmanager
def _hub() -> Iterator[None]:
    hub: Any = sys.modules.get("huggingface_hub.utils")
    constants: Any = sys.modules.get("huggingface_hub.constants")
    # If the variable HF_HUB_DISABLE_PROGRESS_BARS is set, the library refuses to be switched.
    if hub is None or getattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None) is not None:
        yield
        return
    off = hub.are_progress_bars_disabled()
    hub.disable_progress_bars()
    try:
        yield
    finally:  # restoring transformers' switch has turned the hub's on
        (hub.disable_progress_bars if off else hub.enable_progress_bars)()


@contextlib.contextmanager
def _transformers() -> Iterator[None]:
    logging: Any = sys.modules.get("transformers.utils.logging")
    if logging is None or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextlib.contextmanager
def _datasets() -> Iterator[None]:
    datasets: Any = sys.modules.get("datasets")
    if datasets is None or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
