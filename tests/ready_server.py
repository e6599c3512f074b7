"""What imports the packages that take long, and then is forked for each process that ``ready.py`` asks for.

Its standard input ends with the process of the tests, and so does it, with all that it has forked. Argument: the path
of a socket. A connection is one process: it gets a request (JSON, with the descriptors of the two outputs), then tells
the process's id and its exit status.

This is the main module of each of those processes: it leaves nothing behind but the packages.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import socket
import sys

PACKAGES = (
    "torch",
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "safetensors.torch",
    "accelerate",
    "peft",
    "transformers.trainer",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.dpo_trainer",
)


def serve(listening: socket.socket) -> dict[str, object]:
    """Fork for each connection; returns in the forks only, with what was asked for."""
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    while True:
        if any(key.fileobj is sys.stdin for key, _ in selector.select()):
            os.killpg(0, signal.SIGKILL)  # with whatever still runs
        connection, _ = listening.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            selector.close()
            listening.close()
            return watched(connection)
        connection.close()


def watched(connection: socket.socket) -> dict[str, object]:
    """Fork the process, and tell how it ended."""
    text, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return json.loads(text)  # type: ignore[no-any-return]
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def begin(request: dict[str, object], installed: list[str]) -> list[str]:
    """Make this process what a new interpreter is before its first line; returns its arguments.

    ``installed`` is what stands in ``sys.path`` without PYTHONPATH.
    """
    folder, variables, words = request["folder"], request["variables"], request["words"]
    assert isinstance(folder, str)
    assert isinstance(variables, dict)
    assert isinstance(words, list)
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)
    os.chdir(folder)
    sys.path[:] = [*filter(None, variables.get("PYTHONPATH", "").split(os.pathsep)), *installed]
    return words


if __name__ == "__main__":
    os.setpgid(0, 0)  # a group to end; a session of its own would have its own share of the processors
    del sys.path[0]  # the tests' folder
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    for package in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(sys.argv[1])
    listening.listen(64)
    print("ready", flush=True)
    words = begin(serve(listening), [entry for entry in sys.path if entry not in named])
    assert not [name for name in sys.modules if name.partition(".")[0] in ("red_kernels", "pytest")]
    import runpy

    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv[:] = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")
