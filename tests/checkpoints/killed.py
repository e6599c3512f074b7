"""Killing a process at each of its file operations in turn, or making one of them fail."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from red_kernels.support import swap as _swap

OPERATIONS = (
    *((os, name) for name in ("open", "mkdir", "replace", "rename", "fsync", "unlink", "rmdir")),
    (_swap, "_renameat2"),
)
_KILLED = 9


def counted(patch: pytest.MonkeyPatch, at: int, then: Callable[[], None]) -> None:
    """Call `then` before the file operation of number `at`."""
    done = [0]

    def wrapper(real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] == at + 1:
                then()
            return real(*args, **options)

        return operation

    for owner, name in OPERATIONS:
        patch.setattr(owner, name, wrapper(getattr(owner, name)))


def each_kill(action: Callable[[], object], prepare: Callable[[], object]) -> Iterator[int]:
    """Run `prepare`, then `action` in a child that is killed before its first, second, ... file operation; yields.

    The last child runs to its end, and nothing is yielded for it.
    """
    number = 0
    while True:
        prepare()
        child = os.fork()
        if child == 0:
            try:
                counted(pytest.MonkeyPatch(), number, lambda: os._exit(_KILLED))
                action()
                os._exit(0)
            finally:  # whatever happens, the child must not go on with the tests
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        assert status == _KILLED, f"the child failed at operation {number}"
        yield number
        number += 1
