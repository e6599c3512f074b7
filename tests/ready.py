"""Processes that begin with torch and transformers imported, which takes a new interpreter ten seconds of a processor.

A server (``ready_server.py``) imports these packages once for the tests of a process, and forks itself for each process
that a test asks for. red_kernels is not among them: each process imports it anew, with its own variables. Two servers
order what is in a set in two ways, as two interpreters do; the processes of a group are of both in turn.

What a new interpreter does by itself before that (the order of imports, what packages say) is for tests that start one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from patience import HANGS
from places import TESTS, python_path

# All others are as they were at the start of the tests, since packages read some of them when they are imported.
MAY_DIFFER = ("RED_KERNELS_", "COLUMNS", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
_START = {**os.environ, "PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1"}


@functools.cache
def _server(number: int) -> str:
    """Start a server, and return the path of its socket."""
    folder = tempfile.mkdtemp(prefix="ready-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = str(Path(folder) / "socket")
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "ready_server.py"), address],
        env={**_START, "PYTHONHASHSEED": str(number + 1)},
        stdin=subprocess.PIPE,  # its end is that of the server
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n", "the server of ready processes did not start"
    return address


class Process:
    """A running ``python WORDS``, as ``subprocess.Popen`` has it.

    Args:
        words: ``-m``, a module and its arguments; ``-c``, code and its arguments; or a script and its arguments.
        changes: variables that differ from those at the start of the tests.
        folder: in which it runs.
        number: of the process in its group.
    """

    def __init__(self, words: Sequence[str], *, folder: Path | None = None, number: int = 0, **changes: str) -> None:
        for name in changes:
            if not name.startswith(MAY_DIFFER):
                raise ValueError(
                    f"changes: got {name}, which packages may read when they are imported; expected one of "
                    f"{', '.join(MAY_DIFFER)}, or a test with an interpreter of its own"
                )
        self.returncode: int | None = None
        self._files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  # read behind its end
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(_server(number % 2))
        request = {"folder": str(folder or Path.cwd()), "variables": {**_START, **changes}, "words": list(words)}
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [data], [file.fileno() for file in self._files])
        self._connection.sendall(data[sent:])
        self._lines = self._connection.makefile("rb")
        self.pid = int(self._lines.readline())

    def fileno(self) -> int:
        """What becomes readable when the process has ended."""
        return self._connection.fileno()

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float = HANGS) -> int:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired("a ready process", timeout)
            self.returncode = int(self._lines.readline())
            self._connection.close()
        return self.returncode

    def communicate(self, timeout: float = HANGS) -> tuple[str, str]:
        """Wait for the end; returns what was written to the standard output and to the standard error."""
        self.wait(timeout)
        shown = []
        for file in self._files:
            file.seek(0)
            shown.append(file.read().decode(errors="backslashreplace"))
        return shown[0], shown[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(words: Sequence[str], *, folder: Path | None = None, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run one to its end."""
    process = Process(words, folder=folder, **changes)
    try:
        shown = process.communicate()
    finally:
        process.kill()
    return subprocess.CompletedProcess(list(words), process.wait(), *shown)


def run_group(words: Sequence[str], count: int) -> subprocess.CompletedProcess[str]:
    """Run several as one group of torch.distributed, with the variables that torchrun gives; see :func:`ended`."""
    port = free_port()
    processes = [
        Process(words, number=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank),
                WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
        for rank in range(count)
    ]  # fmt: skip
    code = ended(processes)
    shown = ["".join(texts) for texts in zip(*(process.communicate() for process in processes), strict=True)]
    return subprocess.CompletedProcess(list(words), code, *shown)


def free_port() -> str:
    """One that nothing on this machine listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ended(processes: Sequence[Process], timeout: float = HANGS) -> int:
    """Wait until all have ended, and end the others when one fails; returns the status of the first that failed."""
    left, code = list(processes), 0
    try:
        with selectors.DefaultSelector() as selector:
            for process in left:
                selector.register(process, selectors.EVENT_READ)
            while left and not code:
                found = selector.select(timeout)
                if not found:
                    raise subprocess.TimeoutExpired("a group of ready processes", timeout)
                for key, _ in found:
                    selector.unregister(key.fileobj)
                    process = key.fileobj
                    assert isinstance(process, Process)
                    left.remove(process)
                    code = code or process.wait()
        for process in left:
            process.send_signal(signal.SIGTERM)
        for process in left:
            process.wait(timeout)
    finally:
        for process in processes:
            process.kill()
    return code
