"""Backends are records: all that takes a backend takes that of `toy_backend.py`, which the package does not know."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import model_zoo as zoo
import pytest
import tiny_folders
import torch
import toy_backend
from op_cases import (
    EPS,
    OPERATIONS,
    Implementation,
    arguments,
    fused,
    implementations,
    run,
    same_bits,
    upstream,
)
from rich.console import Console

import red_kernels as rk
from benchmarks.ops.implementations import ours
from red_kernels import backends
from red_kernels.backends import Backend, cpu, reference
from red_kernels.cli import main
from red_kernels.info import show_info

pytestmark = pytest.mark.usefixtures("toy")


@pytest.fixture
def toy(known_backends: None) -> None:
    toy_backend.register()


def test_it_is_listed_and_shown() -> None:
    assert rk.available_backends()["toy"] is None
    assert [record.name for record in backends.records()] == ["triton", "cuda", "cpu", "reference", "toy"]
    shown = io.StringIO()
    show_info(Console(file=shown, width=200))
    assert "available; for playing" in shown.getvalue()
    if cpu.load_error() is None:
        assert re.search(r"toy: float32\W+cpu: bfloat16, float16", shown.getvalue())
    assert implementations(backends.by_name("toy")) == (Implementation("toy"),)


def test_tensors_on_its_device_go_to_it() -> None:
    """Before those that were there, but for what it cannot take."""
    for dtype, expected in ((torch.float32, "toy"), (torch.float64, "reference")):
        assert backends.choose(torch.ones(2, 3, dtype=dtype), "edit").name == expected
    half = backends.choose(torch.ones(2, 3, dtype=torch.bfloat16), "edit").name
    assert half == ("reference" if cpu.load_error() else "cpu")
    with rk.backend("reference"):
        assert backends.choose(torch.ones(2, 3), "edit") is backends.REFERENCE
    with (
        rk.backend("toy"),
        pytest.raises(ValueError, match=r"the backend 'toy' was asked for, but x has dtype torch\.bfloat16"),
    ):
        rk.edit(torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("edits", [None, 3])
def test_every_operation_runs_on_it(operation: str, edits: int | None) -> None:
    """Forward and backward: to the last bit what the functions behind it give."""
    tensors, grads = arguments(operation, (5, 8), edits=edits), upstream((5, 8), torch.float32)
    options: dict[str, Any] = {} if edits is None else {"edit_ids": torch.tensor([2, 0, 1, 1, 0])}
    found = run(fused, operation, tensors, grads, **options)
    kind = "edit_norm" if "norm" in operation and operation.startswith("edit") else "edit"
    kind = "norm_edit" if operation.endswith("norm_edit") else kind
    assert toy_backend.runs == {f"{kind}_forward": 1, f"{kind}_backward": 1}
    with rk.backend("reference"):
        assert same_bits(found, run(fused, operation, tensors, grads, **options))


def test_a_linear_layer_runs_on_it() -> None:
    x, weight, scale = torch.randn(4, 6), torch.randn(3, 6), torch.randn(3)
    assert torch.equal(rk.linear_edit(x, weight, None, scale, None), (x @ weight.T) * scale)
    assert toy_backend.runs == {"edit_forward": 1}


def test_a_patched_model_trains_on_it() -> None:
    model = zoo.tiny("llama")
    report = rk.patch(model)
    assert all(site.fused for site in report.sites)
    model(**zoo.inputs("llama")).loss.backward()
    assert toy_backend.runs["edit_norm_forward"] >= toy_backend.runs["edit_norm_backward"] >= len(report.sites)
    assert all(v.grad is not None for parts in rk.edit_parameters(model).values() for v in parts.values())


def test_an_adapter_of_peft_trains_on_it() -> None:
    pytest.importorskip("peft")
    from peft import get_peft_model

    from red_kernels.integrations.peft import RedPeftConfig

    model = get_peft_model(zoo.tiny("llama"), RedPeftConfig())
    model(**zoo.inputs("llama")).loss.backward()
    assert toy_backend.runs["edit_norm_forward"] >= toy_backend.runs["edit_norm_backward"] > 0


def test_the_command_trains_and_saves_on_it(tmp_path: Path) -> None:
    made = tiny_folders.llama_and_text(tmp_path)
    arguments = ["finetune", "--model", str(made["llama"]), "--data", str(made["text"]), "--dtype", "fp32"]
    arguments += ["--steps", "2", "--length", "16", "--batch-size", "2", "--output", str(tmp_path / "out")]
    with rk.backend("toy"):
        assert main(arguments) == 0
    assert toy_backend.runs["edit_norm_backward"] > 0
    assert rk.saved_config(tmp_path / "out" / "edits") == rk.RedConfig()


def test_compiled_code_runs_on_it() -> None:
    torch._dynamo.reset()
    (x, residual), scale = torch.randn(2, 4, 6), torch.randn(6, requires_grad=True)
    compiled = torch.compile(rk.edit_add_rms_norm, fullgraph=True, backend="aot_eager")
    found = compiled(x, residual, scale, None, None, EPS)
    expected = rk.edit_add_rms_norm(x, residual, scale, None, None, EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))  # type: ignore[arg-type]


def test_the_benchmarks_measure_it() -> None:
    assert [one.name for one in ours.implementations(torch.device("cpu"))][-1] == "toy"


def test_a_backend_that_is_missing_says_why() -> None:
    backends.register_backend(Backend("none", None, lambda: "it is not built; remedy: build it", lambda x: "no"))
    assert rk.available_backends()["none"] == "it is not built; remedy: build it"
    with pytest.raises(RuntimeError, match=r"rk\.backend: the backend 'none' is missing: it is not built; remedy"):
        rk.backend("none").__enter__()
    assert implementations(backends.by_name("none")) == ()
    backends.register_backend(Backend("gone", reference, lambda: "not here", lambda x: None, "cpu"))
    assert backends.choose(torch.ones(2, 3), "edit").name == "toy"


@pytest.mark.parametrize(
    ("record", "error", "said"),
    [
        ("toy", TypeError, r"record: got str, expected a red_kernels\.backends\.Backend"),
        (
            {"name": "cpu"},
            ValueError,
            r"record: got the name 'cpu', expected a name that is not taken; taken: 'triton', ",
        ),
        ({"name": ""}, ValueError, "record: got the name ''"),
        ({"device": "cpu:0"}, ValueError, "record: 'new' has the device 'cpu:0', expected a type such as 'cpu'"),
        ({"name": 5}, TypeError, "record: got the name 5, expected a string"),
        ({"operations": None}, ValueError, "record: 'new' has no operations, and `missing` gives no reason"),
        ({"missing": None}, TypeError, "record: missing of 'new' is None, expected a function"),
        ({"device": None}, ValueError, "record: 'new' is automatic for no device, expected a device such as 'cpu'"),
        (
            {"operations": SimpleNamespace(edit_forward=reference.edit_forward)},
            ValueError,
            "record: the operations of 'new' lack edit_backward, edit_norm_forward, ",
        ),
    ],
)
def test_what_is_no_backend_is_refused(record: Any, error: type[Exception], said: str) -> None:
    before = backends.records()
    if isinstance(record, dict):
        given = {"name": "new", "operations": reference, "device": "cpu"} | record
        record = Backend(**{"missing": lambda: None, "unsupported": lambda x: None} | given)
    with pytest.raises(error, match=said):
        rk.register_backend(record)
    assert backends.records() == before


def test_a_backend_is_one_file_and_one_line() -> None:
    """No file of the package but a backend's own and the table has its name in code."""
    package = Path(rk.__file__).parent
    named = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[:2] != ("backends", "triton")
        and re.search(r"\b(cpu|cuda|find_triton)\.BACKEND|by_name\(.(cpu|cuda|triton)", path.read_text())
    }
    assert named == {"backends/__init__.py"}
