"""Forks while another thread is in an operation: what that thread had locked must not stay locked in the child."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from build_tools import ROOT

from red_kernels.backends import cpu

# A child that hangs is ended by an alarm and makes a status other than 0; the first of them ends the run.
_FORKS = """
def forks(count, in_child):
    for number in range(count):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            in_child()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status != 0:
            print(f"child {number} ended with status {status}", flush=True)
            os._exit(1)
"""

# The pool alone, in a process without torch, so that 2,000 forks take seconds: a thread takes and gives back.
_HAMMER = """
#include "cpu/memory.h"

#include <atomic>
#include <thread>

namespace {
std::atomic<bool> stop{false};
std::thread worker;
}  // namespace

extern "C" void once() { red::release(red::acquire(1 << 17)); }
extern "C" void start() {
  worker = std::thread([] {
    while (!stop) once();
  });
}
extern "C" void finish() {
  stop = true;
  worker.join();
}
"""


def run(script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RED_KERNELS_CPU_POOL_MB": "0", **variables}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_2000_forks_while_a_thread_uses_the_pool(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source, library = tmp_path / "hammer.cpp", tmp_path / "libhammer.so"
    source.write_text(_HAMMER)
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{ROOT / 'csrc'}"]
    subprocess.run(
        [compiler, *flags, str(source), str(ROOT / "csrc" / "cpu" / "memory.cpp"), "-o", str(library)], check=True
    )
    done = run(f"""
import ctypes, os, signal
{_FORKS}
hammer = ctypes.CDLL({str(library)!r})
hammer.start()
forks(2000, hammer.once)
hammer.finish()
print("done")
""")
    assert done.stdout == "done\n", done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_forks_while_threads_enter_blocks_and_add_edits() -> None:
    """What Python locks is free in the child too, and whole: its edits can be used, added and deleted."""
    done = run(f"""
import os, signal, sys, threading
import torch
import red_kernels as rk
{_FORKS}
sys.setswitchinterval(1e-4)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
rk.patch(model, rk.RedConfig(sites="0"))
for name in ("a", "b"):
    rk.add_edit(model, name)
stop = False
def blocks():
    while not stop:
        with rk.use_edits(model, ["a", "b"]), rk.disable_edits(model):
            rk.switch_edit(model, "b")
def edits(own):
    while not stop:
        rk.add_edit(model, own)
        rk.delete_edit(model, own)
def in_child():
    rk.add_edit(model, "z")
    with rk.use_edits(model, ["a", "z"]):
        model(torch.ones(2, 4))
    rk.switch_edit(model, "a")
    rk.delete_edit(model, "z")
threads = [threading.Thread(target=blocks), *(threading.Thread(target=edits, args=name) for name in "cd")]
for thread in threads:
    thread.start()
forks(80, in_child)
stop = True
for thread in threads:
    thread.join()
print("done")
""")
    assert done.stdout == "done\n", done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.skipif(cpu.load_error() is not None, reason="needs the CPU kernels")
def test_forks_while_a_thread_is_in_an_operation() -> None:
    """A backward takes its column sums from the pool, which keeps nothing here: it gives them back to the system."""
    done = run(f"""
import os, signal, sys, threading
import torch
import red_kernels as rk
{_FORKS}
sys.setswitchinterval(1e-4)
torch.set_num_threads(1)
x, scale, small = torch.randn(16384, 4), torch.ones(1024), torch.randn(32, 1024)
assert small.numel() * 4 >= 1 << 17
stop = False
def work():
    while not stop:
        torch.ops.red_kernels.edit_backward(x, x, None, None, None, 0.0, 1, 6)
        rk.edit(small, scale)
thread = threading.Thread(target=work)
thread.start()
forks(60, lambda: rk.edit(small, scale))
stop = True
thread.join()
print("done")
""")
    assert done.stdout == "done\n", done.stdout + done.stderr
