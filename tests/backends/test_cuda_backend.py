"""The backend "cuda" as Python sees it: what its library was built for, how it is loaded, when it is chosen.

What its kernels compute is tested with all operations: in the emulator, if RED_KERNELS_CUDA_EMULATED is the path of
their library for it, and on a GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patience import HANGS
from places import ROOT
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import red_kernels as rk
from red_kernels import backends
from red_kernels.backends import Backend, choice, cpu, cuda

emulated_only = pytest.mark.skipif(
    not cuda.EMULATED or cuda.load_error() is not None,
    reason=f"not in the emulator: RED_KERNELS_CUDA_EMULATED is no path of its library ({cuda.load_error()})",
)
H200, A100, B200, T4 = (9, 0), (8, 0), (10, 0), (7, 5)


def _run(code: str, root: Path = ROOT, **variables: str) -> str:
    """What code prints in a process of its own, without this one's settings; ``root`` holds the package."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RED_KERNELS", "TRITON_INTERPRET"))}
    environment = environment | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | variables
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ("sm_80 sm_90 compute_90", (8, 0), True),
        ("sm_80 sm_90 compute_90", (8, 9), True),  # the same major number, and later
        ("sm_80 sm_90 compute_90", (9, 0), True),
        ("sm_80 sm_90 compute_90", (10, 0), True),  # by PTX
        ("sm_80 sm_90 compute_90", (12, 1), True),
        ("sm_80 sm_90 compute_90", (7, 5), False),
        ("sm_86", (8, 0), False),  # earlier
        ("sm_86", (8, 9), True),
        ("sm_90", (10, 0), False),  # another major number
        ("sm_80 sm_100", (9, 0), False),
        ("compute_100", (9, 0), False),
        ("compute_80", (9, 0), True),
        ("sm_120", (12, 0), True),
        ("", (9, 0), False),
    ],
)
def test_devices_that_run_a_library(built: str, device: tuple[int, int], runs: bool) -> None:
    assert any(code.runs_on(device) for code in cuda.parse_architectures(built)) is runs


@pytest.mark.parametrize("text", ["sm_9", "sm90", "gfx942", "sm_90 compute-90", "emulated", "sm_90a"])
def test_names_that_are_no_architectures(text: str) -> None:
    with pytest.raises(ValueError, match="expected names such as sm_90 or compute_100"):
        cuda.parse_architectures(text)


@pytest.fixture
def built_for(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the library be built for some architectures, and every GPU have one compute capability."""

    def build(text: str, device: tuple[int, int]) -> list[int]:
        asked: list[int] = []

        def capability(index: int) -> tuple[int, int]:
            asked.append(index)
            return device

        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(cuda, "_architectures", text)
        monkeypatch.setattr(cuda, "_codes", cuda.parse_architectures(text))
        monkeypatch.setattr(cuda, "_dll", SimpleNamespace(red_kernels_cuda_check=lambda *arguments: 1))
        for kept in ("_unusable", "_capabilities"):
            monkeypatch.setattr(cuda, kept, {})
        return asked

    return build


def test_a_device_that_the_library_was_not_built_for(built_for: Any) -> None:
    """The reason names both, and what to do; each device is asked once."""
    asked = built_for("sm_80 sm_90", B200)
    assert cuda.unusable(2) == (
        "its compute capability is 10.0, expected 8.0 or later and one that the library was built for: sm_80 sm_90; "
        "remedy: install red-kernels with RED_KERNELS_ARCHS=100"
    )
    assert cuda.unusable(2) == cuda.unusable(3)
    assert asked == [2, 3]
    built_for("sm_80 compute_80", T4)
    reason = cuda.unusable(0)
    assert reason is not None
    assert reason.endswith("compute capability is 7.5, expected 8.0 or later and one that the library was built for: "
                           "sm_80 compute_80; remedy: rk.backend('triton')")  # fmt: skip
    built_for("sm_80 compute_80", H200)
    assert cuda.unusable(0) is None


def test_a_driver_that_does_not_load_the_kernels(built_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library is asked, and what it says is the reason."""
    built_for("sm_90", H200)

    def check(device: int, text: Any, size: Any) -> int:
        text.value = b"the driver is older than cudart"
        return 0

    monkeypatch.setattr(cuda, "_dll", SimpleNamespace(red_kernels_cuda_check=check))
    reason = cuda.unusable(1)
    assert reason == (
        "the kernels do not load (the driver is older than cudart); remedy: a newer driver, or rk.backend('triton')"
    )


def test_every_row_of_the_table_is_taken() -> None:
    """And says why: what was measured, or what it was reasoned from."""
    cases = [
        (operation, elements, width, capability)
        for operation in ("edit", "edit_norm", "norm_edit", "linear_edit", "edit_norm backward")
        for elements in (0, (1 << 22) - 1, 1 << 22, 1 << 31)
        for width in (1, 768, 8192, 8193, 65536)
        for capability in (A100, (8, 9), H200, B200)
    ]
    taken = [choice.preferred(*case) for case in cases]
    assert {id(row) for row in taken} == {id(row) for row in choice.TABLE}
    for row in choice.TABLE:
        assert row.cause.startswith(("reasoned: ", "measured: "))
        assert len(row.cause) > 40
        assert row.backend in ("cuda", "triton")
        assert row.where
    with pytest.raises(ValueError, match="operation is 'norm', expected one of 'edit', "):
        choice.preferred("norm", 1, 1, H200)


@pytest.mark.parametrize(
    ("operation", "shape", "capability", "expected"),
    [
        ("edit_norm", (512, 768), H200, "cuda"),
        ("edit", (512, 768), A100, "cuda"),
        ("edit", (8192, 8193), H200, "triton"),
        ("edit_norm", (8192, 4096), H200, "triton"),
        ("edit_norm", (8192, 8192), H200, "triton"),
        ("norm_edit", (8192, 8193), H200, "cuda"),
        ("edit_norm", (8192, 16384), B200, "cuda"),
        ("edit_norm", (8192, 16384), A100, "triton"),
        ("linear_edit", (8, 768), H200, "triton"),
        ("edit_norm backward", (8192, 4096), H200, "triton"),
        ("edit_norm backward", (8192, 5120), H200, "cuda"),
        ("edit_norm backward", (8192, 16384), A100, "cuda"),
    ],
)
def test_the_table(operation: str, shape: tuple[int, int], capability: tuple[int, int], expected: str) -> None:
    assert choice.preferred(operation, shape[0] * shape[1], shape[1], capability).backend == expected


def test_rows_in_words() -> None:
    row = choice.Row("cuda", "", ("edit",), (5, 9), (8193, 1 << 63), ((9, 0), (10, 0)))
    assert row.where == "edit, elements >= 5, elements < 9, width >= 8193, compute capability >= 9.0, " \
                        "compute capability < 10.0"  # fmt: skip
    assert choice.Row("cuda", "").where == "edit edit_norm norm_edit"


def _backend(name: str, takes: bool | None) -> Backend:
    """One of a GPU that takes every tensor or none; None: it is not there."""
    return Backend(
        name,
        None if takes is None else SimpleNamespace(),
        lambda: None if takes is not None else "it is not there",
        lambda x: None if takes else f"{name} does not want to",
        "cuda",
    )


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, built_for: Any) -> Any:
    """Has these be the backends of a GPU, of compute capability 9.0."""
    built_for("sm_90", H200)

    def have(of_cuda: bool | None, of_triton: bool | None) -> None:
        table = _backend("triton", of_triton), _backend("cuda", of_cuda), cpu.BACKEND, backends.REFERENCE
        monkeypatch.setattr(backends, "_known", backends._Known(table))

    return have


class _OnGPU:
    """As much of a tensor on a GPU as choosing a backend asks for."""

    is_cpu, is_cuda = False, True

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def get_device(self) -> int:
        return 0


SMALL: Any = _OnGPU(512, 768)
LARGE: Any = _OnGPU(8192, 4096)


def test_choice_between_both(there: Any) -> None:
    there(True, True)
    assert [backends.choose(x, "edit_norm").name for x in (SMALL, LARGE)] == ["cuda", "triton"]
    assert backends.choose(SMALL, "linear_edit").name == "triton"
    for name in ("cuda", "triton", "reference"):
        with rk.backend(name):
            assert [backends.choose(x, "edit_norm").name for x in (SMALL, LARGE)] == [name, name]


def test_choice_by_the_environment(there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there(True, True)
    monkeypatch.setattr(backends, "_FROM_ENVIRONMENT", "cuda")
    assert backends.choose(LARGE, "edit_norm").name == "cuda"
    with rk.backend("triton"):
        assert backends.choose(SMALL, "edit_norm").name == "triton"


@pytest.mark.parametrize(
    ("of_cuda", "of_triton", "expected"),
    [
        (None, True, ["triton", "triton"]),
        (True, None, ["cuda", "cuda"]),
        (None, None, ["reference", "reference"]),
        (False, True, ["triton", "triton"]),  # there, but not for this tensor
        (True, False, ["cuda", "cuda"]),
        (False, False, ["reference", "reference"]),
        (False, None, ["reference", "reference"]),
    ],
)
def test_choice_where_one_is_missing(
    of_cuda: bool | None, of_triton: bool | None, expected: list[str], there: Any
) -> None:
    there(of_cuda, of_triton)
    assert [backends.choose(x, "edit_norm").name for x in (SMALL, LARGE)] == expected
    if of_cuda is None:
        with pytest.raises(RuntimeError, match="the backend 'cuda' is missing: it is not there"):
            rk.backend("cuda").__enter__()


WIDE: Any = _OnGPU(8192, 5120)


def test_a_backward_has_rows_of_its_own(there: Any) -> None:
    """Behind a forward by Triton's kernels, unless a backend was asked for; elsewhere it is that of the forward."""
    there(True, True)
    of = backends.by_name
    assert backends.choose(WIDE, "edit_norm").name == "triton"
    assert backends.choose_backward(WIDE, "edit_norm", of("triton")).name == "cuda"
    assert backends.choose_backward(LARGE, "edit_norm", of("triton")).name == "triton"
    for name in ("cuda", "reference"):
        assert backends.choose_backward(WIDE, "edit_norm", of(name)).name == name
    with rk.backend("triton"):
        assert backends.choose_backward(WIDE, "edit_norm", of("triton")).name == "triton"
    there(False, True)  # there, but not for this tensor
    assert backends.choose_backward(WIDE, "edit_norm", backends.by_name("triton")).name == "triton"
    there(None, True)
    assert backends.choose_backward(WIDE, "edit_norm", backends.by_name("triton")).name == "triton"


def test_choice_in_compiled_code(there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is traced without a break, and not once for each number of rows: once on each side of a row's limit."""
    torch._dynamo.reset()
    there(True, True)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: H200)

    def tells(x: Tensor) -> Tensor:
        preferred = choice.preferred("edit_norm", x.numel(), x.shape[-1], cuda.capability(0))
        return x[:1, :1] * 0 + (2.0 if preferred.backend == "cuda" else 3.0)

    counter = CompileCounter()
    compiled = torch.compile(tells, fullgraph=True, backend=counter, dynamic=True)
    for rows, expected in ((64, 2.0), (65, 2.0), (1000, 2.0), (8192, 3.0), (9000, 3.0), (70, 2.0)):
        assert float(compiled(torch.zeros(rows, 1024))) == expected
    assert counter.frame_count == 2


@pytest.mark.skipif(
    torch.version.cuda is not None or cuda.EMULATED, reason="this torch has CUDA, or the emulator is used"
)
def test_without_cuda_the_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is like: there is no GPU it could run on."""
    library = tmp_path / "libred_kernels_cuda.so"
    library.write_bytes(b"not even ELF")
    monkeypatch.setattr(cuda, "_LIBRARY", library)
    dll, reason = cuda._load()
    assert dll is None
    assert reason == cuda.load_error() == rk.available_backends()["cuda"]
    assert reason is not None
    assert reason.startswith("torch finds no GPU of NVIDIA's here; remedy: ")
    with pytest.raises(RuntimeError, match="'cuda' is missing: torch finds no GPU of NVIDIA's here"):
        rk.backend("cuda").__enter__()
    assert cuda.unsupported(torch.ones(1)) == reason


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libred_kernels_cuda.so"
    monkeypatch.setattr(cuda, "_LIBRARY", library)
    monkeypatch.setattr(cuda, "_EMULATED_PATH", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    reasons = [cuda._load()[1]]
    (tmp_path / "cuda.missing").write_text("nvcc was not found; remedy: install it")
    reasons.append(cuda._load()[1])
    library.write_bytes(b"\x7fELF, but not for long")
    reasons.append(cuda._load()[1])
    starts = (
        "it was never built; remedy:",
        "nvcc was not found; remedy: install it",
        "libred_kernels_cuda.so does not",
    )
    for reason, start in zip(reasons, starts, strict=True):
        assert reason is not None
        assert reason.startswith(start)
        assert "remedy" in reason


def _says(text: bytes, good: int) -> Any:
    def function(buffer: Any, size: Any) -> int:
        buffer.value = text
        return good

    return SimpleNamespace(_name="lib.so", red_kernels_cuda_architectures=function)


def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EMULATED", False)
    for dll, said in (
        (SimpleNamespace(_name="lib.so"), "no attribute 'red_kernels_cuda_architectures'"),
        (_says(b"it is Sunday", 0), "it is Sunday"),
        (_says(b"sm_1", 1), "it names the targets 'sm_1', expected names such as sm_90 or compute_100"),
    ):
        text, codes, reason = cuda._ask_architectures(dll)
        assert (text, codes) == ("", ())
        assert reason is not None
        assert reason.startswith("lib.so is not a library of this version (")
        assert said in reason
        assert "remedy" in reason
    text, codes, reason = cuda._ask_architectures(_says(b"sm_80 sm_90 compute_90", 1))
    assert (text, len(codes), reason) == ("sm_80 sm_90 compute_90", 3, None)


SHOW = """
import torch, red_kernels as rk
print(rk.available_backends()["cuda"])
x = torch.ones(2, 3)
assert rk.edit(x, torch.full((3,), 2.0)).eq(2).all()
assert torch.ops.red_kernels_emulated.edit_forward.default is not None
try:
    rk.backend("cuda").__enter__()
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("which", ["missing", "no library", "another library"])
def test_import_with_a_wrong_path_of_the_emulator(which: str, tmp_path: Path) -> None:
    """The package loads and works without, and says why and what to do."""
    path, reason = tmp_path / "libemulated.so", "libemulated.so does not load ("
    if which == "missing":
        reason = (
            f"RED_KERNELS_CUDA_EMULATED is {str(path)!r}, which is no file, expected the path of libred_kernels_cuda_"
        )
    elif which == "no library":
        path.write_bytes(b"\x7fELF, but not for long")
    else:
        if cpu.load_error() is not None:
            pytest.skip(f"no CPU kernels: {cpu.load_error()}")
        path, reason = cpu._LIBRARY, f"{cpu._LIBRARY} is not a library of this version ("
    said, raised = _run(SHOW, RED_KERNELS_CUDA_EMULATED=str(path)).splitlines()
    assert said.startswith(reason)
    assert "; remedy: " in said
    assert raised == f"rk.backend: the backend 'cuda' is missing: {said}"


def test_schemas_without_the_library_of_the_cpu_kernels(tmp_path: Path) -> None:
    """Then nobody else defines the operators that the CUDA library implements. They have their fakes, once."""
    shutil.copytree(
        ROOT / "red_kernels", tmp_path / "red_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = """
import torch, red_kernels as rk
from red_kernels.backends.schemas import SCHEMAS
from torch._subclasses.fake_tensor import FakeTensorMode

assert rk.available_backends()["cpu"] is not None
for schema in SCHEMAS:
    operator = getattr(torch.ops.red_kernels, schema[: schema.index("(")]).default
    assert operator._schema == torch._C.parse_schema(f"red_kernels::{schema}")
forward = torch.ops.red_kernels.edit_forward.default
x = torch.ones(2, 3)
arguments = (x, None, None, None, None, None, 0.0)
with FakeTensorMode(allow_non_fake_inputs=True):
    assert forward(*arguments).shape == (2, 3)
try:
    forward(*arguments)
except NotImplementedError:
    print("nobody implements it")
library = torch.library.Library("red_kernels", "IMPL")  # as a library for a device does
library.impl("edit_forward", lambda x, *rest: x * 2, "CPU")
assert forward(*arguments).eq(2).all()
"""
    assert _run(code, tmp_path) == "nobody implements it\n"


def test_launches_are_skipped_in_the_emulator_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EMULATED", False)
    with pytest.raises(RuntimeError, match="launches are skipped in the emulator only: "):
        cuda.skip_launches(True)


@emulated_only
def test_the_emulator_runs_where_it_is_asked_for() -> None:
    """And nowhere else: CPU tensors have kernels of their own."""
    x, scale = torch.randn(3, 5, requires_grad=True), torch.randn(5)
    assert backends.choose(x, "edit").name != "cuda"
    with rk.backend("cuda"):
        assert backends.choose(x, "edit").name == "cuda"
        y = rk.edit(x, scale)
        for other, reason in (
            (x.double(), "x has dtype torch.float64"),
            (x.to("meta"), "x is on meta, and these kern"),
        ):
            with pytest.raises(ValueError, match=f"the backend 'cuda' was asked for, but {reason}.*remedy"):
                rk.edit(other)
    assert torch.equal(y, x * scale)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, scale.expand(3, 5))
    assert "cuda" not in backends._known.orders.get("cpu", {})


@emulated_only
def test_compiled_code_has_the_operators() -> None:
    """In one graph, forward and backward; the numbers are those of a plain call."""
    torch._dynamo.reset()
    code: list[str] = []
    found: list[list[Tensor]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        code.append("\n".join(str(part.code) for part in graph.modules() if isinstance(part, torch.fx.GraphModule)))
        return graph

    x, residual = (torch.randn(7, 24, requires_grad=True) for _ in range(2))
    scale, bias = (torch.randn(24, requires_grad=True) for _ in range(2))
    compiled = torch.compile(rk.edit_add_rms_norm, fullgraph=True, backend=backend)
    with rk.backend("cuda"):
        for function in (compiled, rk.edit_add_rms_norm):
            results = function(x, residual, scale, bias, torch.ones(24))
            found.append([*results, *torch.autograd.grad(sum(t.sum() for t in results), [x, residual, scale, bias])])
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)
    assert len(code) == 1
    assert "red_kernels_emulated.edit_norm_forward" in code[0]
    assert "red_kernels_emulated.edit_norm_backward" in code[0]


@emulated_only
def test_info_tells_of_the_emulator() -> None:
    code = "from red_kernels import cli; cli.main(['info'])"
    shown = _run(code, RED_KERNELS_CUDA_EMULATED=os.environ["RED_KERNELS_CUDA_EMULATED"])
    assert "available; in an emulator, on CPU tensors" in shown


@emulated_only
def test_launches_can_be_skipped() -> None:
    """And are not skipped any more then."""
    x, scale = torch.randn(3, 5), torch.randn(5)
    with rk.backend("cuda"):
        cuda.skip_launches(True)
        try:
            rk.edit(x, scale)
        finally:
            cuda.skip_launches(False)
        assert torch.equal(rk.edit(x, scale), x * scale)
