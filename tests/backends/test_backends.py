"""Choosing a backend and an instruction set: by the block, by the process, and what happens where one is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import pytest
import ready
import torch
from patience import HANGS
from places import ROOT
from torch import Tensor

import red_kernels as rk
from red_kernels import backends
from red_kernels.backends import cpu, find_triton
from red_kernels.ops import fused

compiled_only = pytest.mark.skipif(cpu.load_error() is not None, reason=f"no CPU kernels: {cpu.load_error()}")


class Calls:
    """Which backend each forward and backward ran on."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def taken(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    for record in (backends.by_name("cpu"), backends.REFERENCE):
        for name in ("edit_forward", "edit_backward"):
            function = getattr(record.operations, name)

            def counted(*arguments, _function=function, _name=record.name):  # type: ignore[no-untyped-def]
                found.seen.append(_name)
                return _function(*arguments)

            monkeypatch.setattr(record.operations, name, counted)
    monkeypatch.setattr(fused, "_nodes", lambda x, operation: None)  # nodes in C++ call the operators themselves
    return found


def _run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RED_KERNELS")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANGS)


def _ready(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same where other packages may be there already."""
    return ready.run(["-c", code], **variables)


def test_available_backends() -> None:
    found = rk.available_backends()
    assert set(found) == {"triton", "cuda", "cpu", "reference"}
    assert found["reference"] is None
    for reason in found.values():
        assert reason is None or "remedy" in reason


@compiled_only
def test_automatic_choice(calls: Calls) -> None:
    """The kernels where they can take the tensor, plain PyTorch where not."""
    rk.edit(torch.randn(3, 5))
    rk.edit(torch.randn(3, 5).half())
    rk.edit(torch.nn.Parameter(torch.randn(3, 5)))
    assert calls.taken() == ["cpu"] * 3
    rk.edit(torch.randn(3, 5).double())
    rk.edit(torch.randn(3, 5, device="meta"))
    assert calls.taken() == ["reference"] * 2


@compiled_only
def test_blocks_nest_and_end(calls: Calls) -> None:
    x = torch.randn(3, 5)
    with rk.backend("reference"):
        rk.edit(x)
        with rk.backend("cpu"):
            rk.edit(x)
        rk.edit(x)
        with pytest.raises(KeyError), rk.backend("cpu"):
            raise KeyError
        rk.edit(x)
    rk.edit(x)
    assert calls.taken() == ["reference", "cpu", "reference", "reference", "cpu"]


@compiled_only
def test_blocks_end_in_any_order() -> None:
    """Each takes back its own choice, and with the last of them all are gone."""
    blocks = [rk.backend(name) for name in ("reference", "cpu", "reference")]
    for block in blocks:
        block.__enter__()
    seen = []
    for block in (blocks[1], blocks[0], blocks[2]):
        seen.append(backends.forced_backend())
        block.__exit__(None, None, None)
    assert seen == ["reference"] * 3
    assert backends.forced_backend() is None
    first, second = rk.backend("reference"), rk.backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert backends.forced_backend() == "cpu"
    second.__exit__(None, None, None)
    assert backends.forced_backend() is None


def test_block_that_another_thread_closes() -> None:
    """As happens to a generator that is collected there: the choice of the thread that opened it ends."""
    block = rk.backend("reference")
    block.__enter__()
    thread = threading.Thread(target=block.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert backends.forced_backend() is None


@compiled_only
def test_backward_uses_the_backend_of_its_forward(calls: Calls) -> None:
    x, scale = torch.randn(3, 5, requires_grad=True), torch.randn(5)
    with rk.backend("reference"):
        y = rk.edit(x, scale)
    y.sum().backward()
    y = rk.edit(x, scale)
    with rk.backend("reference"):
        y.sum().backward()
    assert calls.taken() == ["reference", "reference", "cpu", "cpu"]


@compiled_only
def test_each_thread_has_its_own_choice(calls: Calls) -> None:
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with rk.backend("reference"):
            inside.set()
            done.wait(HANGS)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(HANGS)
    rk.edit(torch.randn(3, 5))
    done.set()
    thread.join()
    assert calls.taken() == ["cpu"]


@compiled_only
def test_threads_run_at_once() -> None:
    x, scale = torch.randn(400, 577), torch.randn(577)
    expected = rk.edit(x, scale)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(rk.edit(x, scale), expected):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@compiled_only
def test_in_compiled_functions(calls: Calls) -> None:
    """The trace has the backend in use, whether the block is around the function or in it."""
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):  # type: ignore[no-untyped-def]
        seen.append("cpu" if "red_kernels" in str(graph.code) else "reference")
        return graph

    def block(x: Tensor) -> Tensor:
        with rk.backend("reference"):
            return rk.edit(x, x[0]) * 2

    def plain(x: Tensor) -> Tensor:
        return rk.edit(x, x[0]) * 2

    x = torch.randn(3, 5)
    for function, around, expected in ((plain, None, "cpu"), (plain, "reference", "reference"), (plain, None, "cpu")):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        if around is None:
            compiled(x)
        else:
            with rk.backend(around):
                assert torch.allclose(compiled(x), function(x))
        assert seen.pop() == expected
    assert torch.allclose(torch.compile(block, backend=backend)(x), block(x))


@compiled_only
def test_compiled_again_for_another_backend() -> None:
    """A function that was compiled outside a block is not what runs inside it."""
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):  # type: ignore[no-untyped-def]
        graphs.append(str(graph.code))
        return graph

    compiled = torch.compile(lambda x: rk.edit(x, x[0]), fullgraph=True, backend=backend)
    x = torch.randn(3, 5)
    compiled(x)
    with rk.backend("reference"):
        compiled(x)
    compiled(x)
    assert ["red_kernels" in code for code in graphs] == [True, False]


@compiled_only
def test_compiled_code_follows_the_thread_that_calls_it() -> None:
    """Blocks that other threads open and close neither force a backend on it nor take one from it."""
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):  # type: ignore[no-untyped-def]
        ours = "red_kernels" in str(graph.code)

        def run(*arguments: Tensor):  # type: ignore[no-untyped-def]
            graphs.append("cpu" if ours else "reference")
            return graph(*arguments)

        return run

    compiled = torch.compile(lambda x: rk.edit(x, x[0]), fullgraph=True, backend=backend)
    x = torch.randn(3, 5)

    def elsewhere(name: str | None) -> None:
        def call() -> None:
            if name is None:
                compiled(x)
            else:
                with rk.backend(name):
                    compiled(x)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with rk.backend("reference"):
        elsewhere(None)
        compiled(x)
        elsewhere("cpu")
        compiled(x)
        elsewhere("reference")
    compiled(x)
    assert graphs == ["cpu", "reference", "cpu", "reference", "reference", "cpu"]


@pytest.mark.parametrize("name", ["tirton", "", "CPU", None, 3])
def test_unknown_backend(name: object) -> None:
    with pytest.raises(ValueError, match=r"rk\.backend got .*expected one of 'triton', 'cuda', 'cpu', 'reference'"):
        rk.backend(name).__enter__()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, reason in rk.available_backends().items() if reason is not None])
def test_missing_backend(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"rk.backend: the backend '{name}' is missing: .*remedy"):
        rk.backend(name).__enter__()


@compiled_only
@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.randn(3, 5).double(), "x has dtype torch.float64, and these kernels take"),
        (torch.randn(3, 5, device="meta"), "x is on meta, and these kernels run on the CPU"),
        (torch.randn(3, 5).as_subclass(type("Other", (Tensor,), {})), "x is a Other, and these kernels take plain"),
    ],
    ids=["fp64", "meta", "subclass"],
)
def test_backend_that_cannot_take_a_tensor(x: Tensor, reason: str) -> None:
    with rk.backend("cpu"), pytest.raises(ValueError, match=f"the backend 'cpu' was asked for, but {reason}.*remedy"):
        rk.edit(x)


SHOW = """
import torch
from red_kernels import backends
print(backends.choose(torch.ones(1, 1), "edit").name)
"""


def test_environment_chooses_the_backend() -> None:
    assert _ready(SHOW, RED_KERNELS_BACKEND="reference").stdout.strip() == "reference"
    done = _ready(SHOW, RED_KERNELS_BACKEND="abacus")
    assert "ValueError: RED_KERNELS_BACKEND got 'abacus', expected one of 'triton'" in done.stderr
    if rk.available_backends()["triton"] is not None:
        done = _ready(SHOW, RED_KERNELS_BACKEND="triton")
        assert "RuntimeError: RED_KERNELS_BACKEND: the backend 'triton' is missing:" in done.stderr
        assert "remedy" in done.stderr


@compiled_only
def test_environment_chooses_the_instruction_set() -> None:
    code = "from red_kernels.backends import cpu; print(cpu.instruction_set())"
    first = cpu.instruction_sets()[0]
    assert _ready(code, RED_KERNELS_CPU=first).stdout.strip() == first
    assert _ready(code, RED_KERNELS_CPU="").stdout.strip() == cpu.instruction_sets()[-1]
    message = f"RED_KERNELS_CPU is 'neon9', expected one that this processor can run: {first}"
    done = _ready(SHOW, RED_KERNELS_CPU="neon9")
    assert f"ValueError: {message}" in done.stderr
    done = _ready(SHOW, RED_KERNELS_CPU="neon9", RED_KERNELS_BACKEND="cpu")
    assert f"RuntimeError: RED_KERNELS_BACKEND: the backend 'cpu' is missing: {message}" in done.stderr
    done = _ready(SHOW, RED_KERNELS_CPU="neon9", RED_KERNELS_BACKEND="reference")
    assert done.stdout.strip() == "reference"


def test_import_with_wrong_variables() -> None:
    """Is fine: what is wrong is said at the first use, in compiled code too, and a block may choose otherwise."""
    code = """
import torch, red_kernels as rk
x = torch.ones(1, 1)
with rk.backend("reference"):
    assert rk.edit(x) == 1
for function in (rk.edit, torch.compile(rk.edit, backend="eager")):
    try:
        function(x)
    except ValueError as error:
        assert "RED_KERNELS_" in str(error) and "expected one" in str(error), error
        print("said")
"""
    assert _ready(code, RED_KERNELS_BACKEND="abacus").stdout == "said\nsaid\n"
    if cpu.load_error() is None:
        assert _ready(code, RED_KERNELS_CPU="neon9").stdout == "said\nsaid\n"


@compiled_only
def test_instruction_sets() -> None:
    names = cpu.instruction_sets()
    assert names[0] == ("neon" if platform.machine() in ("aarch64", "arm64") else "base")
    before = cpu.instruction_set()
    with cpu.use_instruction_set(names[0]):
        assert cpu.instruction_set() == names[0]
    assert cpu.instruction_set() == before
    with pytest.raises(RuntimeError, match=f"'mmx', expected one that this processor can run: {names[0]}"):
        cpu.use_instruction_set("mmx").__enter__()
    assert cpu.instruction_set() == before


ANOTHER_TRITON = {
    "none": ("raise ModuleNotFoundError(\"No module named 'triton'\")", "Triton cannot be imported .*No module named"),
    "unloadable": ("raise OSError('libtriton.so: no such file')", "Triton cannot be imported .*OSError: libtriton.so"),
    # which Python also makes of any folder of this name where there is no other
    "without a version": ("", "Triton cannot be imported .*AttributeError"),
    "old": ("__version__ = '3.5.1'", "Triton is 3.5.1, expected 3.6 or later"),
    "empty": ("__version__ = '3.9.0'", r"the kernels do not load \(.*Error: "),
}


@pytest.mark.parametrize("which", ANOTHER_TRITON)
def test_import_with_another_triton(which: str, tmp_path: Path) -> None:
    """The package loads and works without Triton's kernels, and says why and what to do."""
    source, reason = ANOTHER_TRITON[which]
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(source)
    code = """
import torch, red_kernels as rk
print(rk.available_backends()["triton"])
assert rk.edit(torch.ones(2, 3), torch.full((3,), 2.0)).eq(2).all()
try:
    rk.backend("triton").__enter__()
except RuntimeError as error:
    print(error)
"""
    done = _run(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    said, raised = done.stdout.splitlines()
    assert re.fullmatch(f"{reason}.*; remedy: pip install .*", said), said
    assert raised == f"rk.backend: the backend 'triton' is missing: {said}"


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_without_a_gpu_triton_is_not_imported(cuda: str | None) -> None:
    """It takes a second, and nothing would come of it: whatever torch is built for."""
    code = f"""
import ctypes, sys, torch
torch.version.cuda, torch.version.hip = {cuda!r}, None
load = ctypes.CDLL
def pretended(name, *more, **options):
    if name in ("libcuda.so.1", "nvcuda.dll"):
        raise OSError(name)
    return load(name, *more, **options)
ctypes.CDLL = pretended
torch.cuda.is_available = lambda: False
import red_kernels as rk
print("triton" in sys.modules, rk.available_backends()["triton"])
"""
    done = _run(code, TRITON_INTERPRET="0")
    assert re.match(
        "False torch finds no GPU here; remedy: a GPU and a torch built for it, or TRITON_INTERP", done.stdout
    ), done.stderr


@pytest.mark.parametrize(
    ("cuda", "hip", "driver", "expected"),
    [
        (None, None, True, False),
        ("13.0", None, False, False),
        ("13.0", None, True, True),
        (None, "7.0", False, True),
    ],
)
def test_the_driver_of_a_gpu(
    cuda: str | None, hip: str | None, driver: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> None:
        if not driver:
            raise OSError(name)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(find_triton.ctypes, "CDLL", load)
    assert find_triton._driver() == expected


def _interpreter_missing() -> str:
    """Why Triton's interpreter does not run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    return "the interpreter of Triton 3.6 does not run with numpy 2.4" if triton < (3, 7) and numpy >= (2, 4) else ""


@pytest.mark.skipif(bool(_interpreter_missing()), reason=_interpreter_missing())
def test_in_the_interpreter() -> None:
    """The kernels run on CPU tensors, if they are asked for: never of themselves."""
    code = """
import torch, red_kernels as rk
from red_kernels import backends
assert rk.available_backends()["triton"] is None
x, scale = torch.randn(3, 5, requires_grad=True), torch.randn(5)
assert backends.choose(x, "edit").name != "triton"
with rk.backend("triton"):
    assert backends.choose(x, "edit").name == "triton"
    y = rk.edit(x, scale)
assert torch.equal(y, x * scale)
y.sum().backward()
assert torch.equal(x.grad, scale.expand(3, 5))
with rk.backend("triton"):
    for other, reason in ((x.double(), "x has dtype torch.float64"), (x.to("meta"), "x is on meta")):
        try:
            rk.edit(other)
        except ValueError as error:
            assert f"the backend 'triton' was asked for, but {reason}" in str(error), error
            print("said")
"""
    done = _run(code, TRITON_INTERPRET="1")
    assert done.stdout == "said\nsaid\n", done.stderr


@pytest.fixture
def _without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_dll", None)
    monkeypatch.setattr(cpu, "_error", "it was never built; remedy: build it")


@pytest.mark.usefixtures("_without_library")
def test_without_the_library() -> None:
    """What an installation without a compiler does."""
    assert rk.available_backends()["cpu"] == "it was never built; remedy: build it"
    assert backends.choose(torch.empty(1), "edit") is backends.REFERENCE
    x, scale = torch.randn(3, 5), torch.randn(5)
    assert torch.equal(rk.edit(x, scale), x * scale)
    with pytest.raises(RuntimeError, match="the backend 'cpu' is missing: it was never built; remedy: build it"):
        rk.backend("cpu").__enter__()
    with pytest.raises(RuntimeError, match="the CPU kernels are missing: it was never built; remedy: build it"):
        cpu.instruction_sets()


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libred_kernels_cpu.so"
    monkeypatch.setattr(cpu, "_LIBRARY", library)
    assert cpu._load()[1].startswith("it was never built; remedy:")
    (tmp_path / "cpu.missing").write_text("no C++ compiler was found; remedy: install g++")
    assert cpu._load()[1] == "no C++ compiler was found; remedy: install g++"
    library.write_bytes(b"\x7fELF, but not for long")
    assert "libred_kernels_cpu.so does not load (" in cpu._load()[1]
    assert "remedy" in cpu._load()[1]
