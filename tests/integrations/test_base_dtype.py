"""`--dtype auto`: what torch tells, what is measured, what a resumed run keeps, what is warned of, who says it."""

from __future__ import annotations

import io
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_folders
import torch
from rich.console import Console

from benchmarks import runs, suite
from benchmarks.quality import job as quality
from benchmarks.step import growth
from benchmarks.step import job as step
from red_kernels import cli, info
from red_kernels.finetune import base_dtype
from red_kernels.finetune.base_dtype import choose_dtype, resolve_dtype, slowdown, told
from red_kernels.finetune.job import Settings

CPU = torch.device("cpu")
ABSENT = "absent"  # torch has no such function


def answers(value: Any) -> Any:
    """A function that answers so; ABSENT raises what a missing function raises, and an exception is raised itself."""

    def answer(*arguments: Any, **options: Any) -> Any:
        if value is ABSENT:
            raise AttributeError("no such function")
        if isinstance(value, Exception):
            raise value
        return value

    return answer


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make torch tell of another processor."""

    def tell(
        onednn: Any, avx512_bf16: Any, name: str = "x86_64", *, limit: str = "", there: bool = True, on: bool = True
    ) -> None:
        for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(variable, raising=False)
        if limit:
            monkeypatch.setenv(*limit.split("="))
        real = torch.backends.mkldnn

        class Backend:
            enabled = on

            def __getattr__(self, name: str) -> Any:
                return (lambda: there) if name == "is_available" else getattr(real, name)

        monkeypatch.setattr(torch.backends, "mkldnn", Backend())
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", answers(onednn))
        capabilities = {} if avx512_bf16 is ABSENT else {"avx512_bf16": avx512_bf16}
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", answers(avx512_bf16))
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        monkeypatch.setattr(base_dtype.platform, "machine", lambda: name)

    return tell


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the product of a half precision take so many times as long as fp32's, without a clock of the machine."""

    def take(factor: float, seconds: float = 1e-3) -> list[torch.dtype]:
        now, calls = [0.0], []

        def product(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor) -> None:
            assert x.dtype == weight.dtype == upstream.dtype
            calls.append(x.dtype)
            now[0] += seconds * (1.0 if x.dtype == torch.float32 else factor)

        monkeypatch.setattr(base_dtype, "_product", product)
        monkeypatch.setattr(base_dtype, "time", SimpleNamespace(perf_counter=lambda: now[0]))
        return calls

    return take


# ---- what torch tells


KNOWN = {
    # oneDNN's answer, AVX512_BF16, machine -> native
    (True, True, "x86_64"): True,
    (True, True, "AMD64"): True,
    (True, False, "x86_64"): False,  # oneDNN emulates it with AVX-512
    (False, True, "x86_64"): False,  # oneDNN was built or limited otherwise: it multiplies, so it decides
    (False, False, "x86_64"): False,
    (False, ABSENT, "x86_64"): False,
    (True, ABSENT, "x86_64"): None,
    (ABSENT, True, "x86_64"): None,
    (True, False, "aarch64"): True,
    (True, ABSENT, "arm64"): True,
    (False, False, "aarch64"): False,
    (ABSENT, ABSENT, "aarch64"): None,
    (True, ABSENT, "ppc64le"): None,
    (False, ABSENT, "ppc64le"): False,
    (True, ABSENT, ""): None,
    ("yes", True, "x86_64"): None,  # an answer of another kind is none
    (RuntimeError("broken"), True, "x86_64"): None,
}


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_what_torch_tells_of_a_processor(case: tuple[Any, Any, str], machine: Any) -> None:
    machine(*case)
    native, reason = told(CPU)
    assert native is KNOWN[case]
    assert reason


@pytest.mark.parametrize(("there", "on"), [(False, True), (True, False), (False, False)])
def test_without_onednn_nothing_is_told(machine: Any, there: bool, on: bool) -> None:
    machine(True, True, there=there, on=on)
    native, reason = told(CPU)
    assert native is None
    assert "no oneDNN" in reason


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_within_a_limit_of_onednn_only_its_no_is_believed(machine: Any, variable: str) -> None:
    """oneDNN says that it takes bf16 where it emulates it, and torch's other answers do not heed the limit."""
    machine(True, True, limit=f"{variable}=AVX512_CORE")
    native, reason = told(CPU)
    assert native is None
    assert f"{variable}=AVX512_CORE" in reason
    machine(False, True, limit=f"{variable}=AVX2")
    native, reason = told(CPU)
    assert native is False
    assert f"{variable}=AVX2" in reason


@pytest.mark.parametrize(
    ("answer", "native"), [(True, True), (False, False), (TypeError("an unknown argument"), None), (ABSENT, None)]
)
def test_what_torch_tells_of_a_gpu(monkeypatch: pytest.MonkeyPatch, answer: Any, native: bool | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    asked = []

    class Of:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            asked.append(self.device)

        def __exit__(self, *error: object) -> None:
            pass

    def supported(*, including_emulation: bool) -> bool:
        assert not including_emulation
        return answers(answer)()

    monkeypatch.setattr(torch.cuda, "device", Of)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(base_dtype, "slowdown", lambda name, device: 3.0)
    device = torch.device("cuda:1")
    found, reason = told(device)
    assert found is native
    assert "a GPU" in reason
    assert asked == [device]  # which need not be the current one
    assert choose_dtype(device).name == ("bf16" if native else "fp32")


@pytest.mark.parametrize("call", [told, choose_dtype, lambda device: slowdown("bf16", device)])
def test_another_kind_of_device_is_refused(call: Any) -> None:
    with pytest.raises(ValueError, match="device: got 'meta', expected one of type 'cpu' or 'cuda'"):
        call(torch.device("meta"))


def test_this_torch_has_the_functions_that_are_asked() -> None:
    """Where torch renames one, `auto` would measure instead, in silence."""
    assert isinstance(torch.ops.mkldnn._is_mkldnn_bf16_supported(), bool)
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)


# ---- the choice


@pytest.mark.parametrize("native", [True, False])
def test_auto_is_what_torch_tells(machine: Any, measured: Any, native: bool) -> None:
    calls = measured(1.0)
    machine(True, native)
    chosen = choose_dtype(CPU)
    assert (chosen.name, chosen.asked) == ("bf16" if native else "fp32", "auto")
    assert chosen.reason == told(CPU)[1]
    assert chosen.warning is None
    assert calls == []  # nothing is measured where torch tells


@pytest.mark.parametrize(("factor", "name"), [(0.5, "bf16"), (1.0, "bf16"), (1.3, "fp32"), (60.0, "fp32")])
def test_auto_is_measured_where_torch_does_not_tell(machine: Any, measured: Any, factor: float, name: str) -> None:
    measured(factor)
    machine(ABSENT, ABSENT)
    chosen = choose_dtype(CPU)
    assert chosen.name == name
    assert f"measured, a product in bf16 takes {factor:.2g} times as long as in fp32" in chosen.reason


def test_an_unknown_dtype_is_refused() -> None:
    for name, arguments in {"dtype: got 'fp8'": ("fp8", CPU), "kept: got 'fp16'": ("auto", CPU, "fp16")}.items():
        with pytest.raises(ValueError, match=name):
            resolve_dtype(*arguments)
    with pytest.raises(ValueError, match="name: got 'fp32', expected one of 'bf16', 'fp16'"):
        slowdown("fp32", CPU)
    with pytest.raises(ValueError, match="dtype: got 'fp16', expected one of 'auto', 'fp32', 'bf16'"):
        Settings(dtype="fp16").filled()


# ---- the measurement and the warning


@pytest.mark.parametrize("half", ["bf16", "fp16"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.5, 60.0, 1000.0])
def test_the_factor_is_measured_and_bounded(measured: Any, half: str, factor: float) -> None:
    calls = measured(factor)
    assert slowdown(half, CPU) == pytest.approx(factor)
    spent = sum(1e-3 * (1.0 if dtype == torch.float32 else factor) for dtype in calls)
    assert len(calls) >= 4  # a first call of each, and a round
    assert spent <= base_dtype._SECONDS + 2 * 1e-3 * (1 + factor)  # no round begins when the time is over
    assert calls[::2] == [torch.float32] * (len(calls) // 2)  # in turn


def test_one_disturbance_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other work falls on some of the rounds, and on either of the two."""
    now, count = [0.0], itertools.count()

    def product(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor) -> None:
        now[0] += (1.0 if x.dtype == torch.float32 else 3.0) * 1e-4
        now[0] += 8e-3 if next(count) % 5 == 0 else 0.0

    monkeypatch.setattr(base_dtype, "_product", product)
    monkeypatch.setattr(base_dtype, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert slowdown("bf16", CPU) == pytest.approx(3.0)


def test_a_slow_product_is_measured_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real clock, the real product, and a delay in bf16 only."""
    product = base_dtype._product

    def slow(x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor) -> None:
        begun = time.perf_counter()
        product(x, weight, upstream)
        if x.dtype == torch.bfloat16:
            time.sleep(20 * (time.perf_counter() - begun) + 5e-3)

    monkeypatch.setattr(base_dtype, "_product", slow)
    chosen = resolve_dtype("bf16", CPU)
    assert chosen.slower is not None
    assert chosen.slower > base_dtype.CRAWLS
    assert chosen.warning is not None
    assert f"takes {chosen.slower:.2g} times as long as in fp32; remedy: --dtype fp32" in chosen.warning


def test_measuring_leaves_no_trace() -> None:
    threads, state, gradients = torch.get_num_threads(), torch.get_rng_state(), torch.is_grad_enabled()
    with torch.no_grad():
        assert slowdown("fp16", CPU) > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() == gradients


def test_threads_are_put_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(base_dtype, "_product", answers(RuntimeError("not implemented for 'Half'")))
    with pytest.raises(RuntimeError, match="not implemented"):
        slowdown("fp16", CPU)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("factor", [0.5, 1.9, 2.0, 31.0, float("nan")])
def test_an_explicit_choice_is_warned_of_where_it_crawls(measured: Any, factor: float) -> None:
    calls = measured(factor)
    assert resolve_dtype("fp32", CPU).warning is None
    assert calls == []  # the others are compared with it
    chosen = resolve_dtype("bf16", CPU)
    assert (chosen.name, chosen.asked, chosen.reason) == ("bf16", "bf16", "asked for")
    assert (chosen.warning is None) == (factor < 2)
    if factor == 31.0:
        assert chosen.warning == (
            "bf16 is slow here: a matrix product of 128 x 256 x 256, forward and backward, takes 31 times as long "
            "as in fp32; remedy: --dtype fp32, or --dtype auto, which selects a native dtype"
        )
        assert chosen.json()["slower"] == pytest.approx(31.0)
    json.dumps(chosen.json())


def test_what_is_resumed_keeps_its_dtype(machine: Any, measured: Any) -> None:
    calls = measured(40.0)
    machine(True, True)
    same = resolve_dtype("auto", CPU, "fp32")
    assert same.name == "fp32"
    assert "kept by --resume" in same.reason
    assert "a new run would take bf16 here" in same.reason
    assert same.warning is None
    assert calls == []
    machine(False, False)
    slow = resolve_dtype("auto", CPU, "bf16")
    assert slow.name == "bf16"
    assert "a new run would take fp32 here" in slow.reason
    assert slow.warning is not None
    assert "40 times" in slow.warning
    assert "--overwrite" in slow.warning  # another --dtype is refused with --resume


# ---- info


def test_info_shows_the_choice(machine: Any, measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(25.0)
    machine(False, False)
    monkeypatch.setattr(info, "_devices", lambda: [("cpu", "cpu (2 threads)")])
    text = io.StringIO()
    info.show_info(Console(file=text, width=200))
    line = next(line for line in text.getvalue().splitlines() if "oneDNN does not multiply bf16" in line)
    assert "fp32" in line
    assert "25, 25 times as long as in fp32" in line


def test_info_shows_that_a_product_failed(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(True, True)
    monkeypatch.setattr(base_dtype, "_product", answers(RuntimeError("not implemented [here]")))
    text = io.StringIO()
    info.show_info(Console(file=text, width=200))
    assert "a product failed: not implemented [here]" in text.getvalue()


# ---- finetune


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_folders.llama_and_text(tmp_path_factory.mktemp("tiny"))


def words(folders: dict[str, Path], output: Path, *more: str) -> list[str]:
    return [
        *("finetune", "--model", str(folders["llama"]), "--data", str(folders["text"]), "--output", str(output)),
        *("--length", "16", "--steps", "2", "--save-every", "1", "--no-compare", "--device", "cpu", *more),
    ]


@pytest.mark.parametrize("native", [True, False])
def test_finetune_chooses_says_and_keeps(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    machine: Any,
    measured: Any,
    native: bool,
) -> None:
    """A run that was stopped goes on, on another machine, in the dtype that it began with."""
    name = "bf16" if native else "fp32"
    measured(50.0)
    machine(True, native)
    output = tmp_path / "out"
    assert cli.main(words(folders, output)) == 0
    shown = capsys.readouterr().out
    assert f"Base model's dtype: {name} ({told(CPU)[1]})" in " ".join(shown.split())
    run = json.loads((output / "run.json").read_text())
    assert run["settings"]["dtype"] == name
    assert run["results"]["base_dtype"]["asked"] == "auto"
    assert run["results"]["base_dtype"]["reason"] == told(CPU)[1]

    (output / "run.json").write_text(json.dumps({**run, "state": "interrupted"}))
    machine(True, not native)
    assert cli.main(words(folders, output, "--resume")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Base model's dtype: {name} (kept by --resume" in shown
    assert ("bf16 is slow here" in shown) == native
    after = json.loads((output / "run.json").read_text())
    assert after["settings"] == run["settings"]
    assert after["results"]["base_dtype"] == run["results"]["base_dtype"]  # of the beginning
    assert after["results"]["after"] == run["results"]["after"]

    (output / "run.json").write_text(json.dumps({**run, "state": "interrupted"}))
    other = "fp32" if native else "bf16"
    assert cli.main(words(folders, output, "--resume", "--dtype", other)) == cli.EXIT_ERROR
    assert f"dtype was '{name}', is '{other}'" in capsys.readouterr().err


def test_finetune_goes_on_with_a_run_of_an_earlier_version(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], machine: Any
) -> None:
    """Which has the dtype among its settings and no reason; one without, or with another, is damaged."""
    machine(False, False)
    output = tmp_path / "out"
    assert cli.main(words(folders, output)) == 0
    run = json.loads((output / "run.json").read_text())
    del run["results"]["base_dtype"]
    (output / "run.json").write_text(json.dumps({**run, "state": "interrupted"}))
    assert cli.main(words(folders, output, "--resume")) == 0
    for dtype in (None, "fp8", ["fp32"]):
        settings = {**run["settings"], "dtype": dtype}
        (output / "run.json").write_text(json.dumps({**run, "settings": settings, "state": "interrupted"}))
        capsys.readouterr()
        assert cli.main(words(folders, output, "--resume")) == cli.EXIT_ERROR
        assert "is damaged: its dtype is" in capsys.readouterr().err


def test_finetune_warns_of_an_explicit_choice(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], machine: Any, measured: Any
) -> None:
    measured(33.0)
    machine(False, False)
    assert cli.main(words(folders, tmp_path / "out", "--dtype", "bf16", "--steps", "1")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Warning: bf16 is slow here" in shown
    assert "33 times as long as in fp32; remedy: --dtype fp32" in shown
    assert shown.index("Warning") < shown.index("Loading the model")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["results"]["base_dtype"]["slower"] == pytest.approx(
        33.0
    )


# ---- the benchmark suite


def quick(chosen: base_dtype.BaseDtype | None = None) -> runs.Run:
    return runs.Run(CPU, Console(file=io.StringIO()), quick=True, progress=Console(file=io.StringIO()), chosen=chosen)


@pytest.mark.parametrize("native", [True, False])
def test_the_suite_takes_what_is_native(machine: Any, native: bool) -> None:
    machine(True, native)
    name = "bf16" if native else "fp32"
    for run in (quick(), runs.Run(CPU, Console(file=io.StringIO()))):
        assert run.base_dtype.name == name
        assert {case["dtype"] for case in growth.cases(growth.Settings(), run)} == {name}
        dtypes = {case["model"]: case["dtype"] for case in step.cases(step.Settings(), run)}
        assert dtypes in ({"tiny-decoder": name, "tiny-encoder": "fp32"}, {"SmolLM2-135M": name, "MiniLM-L6": "fp32"})
        settings = quality.Settings().for_run(run)
        assert (settings.language.dtype, settings.sentiment.dtype) == (name, "fp32")
    explicit = growth.Settings(dtype="bf16")
    assert {case["dtype"] for case in growth.cases(explicit, quick())} == {"bf16"}


def test_the_suite_records_and_keeps_its_dtype(
    tmp_path: Path, machine: Any, measured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "measure", lambda case, settings, run: {"seconds": {}})
    monkeypatch.setattr(growth, "print_results", lambda content, console: None)
    monkeypatch.setattr(suite, "draw", lambda folder, console: [])
    measured(44.0)

    def run(**options: Any) -> tuple[dict[str, Any], str]:
        text = io.StringIO()
        suite.run_suite(suite.Request("growth", tmp_path, "cpu", quick=True, **options), Console(file=text, width=300))
        return json.loads((tmp_path / "growth.json").read_text()), text.getvalue()

    machine(True, True)
    content, text = run()
    assert content["base_dtype"]["name"] == content["settings"]["dtype"] == "bf16"
    assert content["base_dtype"]["reason"] == told(CPU)[1]
    assert f"Base models' dtype: bf16 ({told(CPU)[1]})" in text
    machine(False, False)
    again, text = run(resume=True)
    assert again["base_dtype"] == content["base_dtype"]
    assert "kept by --resume" in text
    assert "bf16 is slow here" in text
    with pytest.raises(ValueError, match="has the dtype 'bf16', this run has 'fp32'"):
        run(resume=True, dtype="fp32")
    assert run(overwrite=True)[0]["base_dtype"]["name"] == "fp32"
    content, text = run(overwrite=True, dtype="bf16")
    assert content["base_dtype"]["slower"] == pytest.approx(44.0)
    assert {case["dtype"] for case in content["cases"]} == {"bf16"}
    assert "44 times as long as in fp32" in text


def test_the_job_of_operations_has_no_base_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["bench", "ops", "--output", str(tmp_path / "x"), "--dtype", "bf16"]
    assert cli.main(words) == cli.EXIT_ERROR
    assert "--dtype: needs a job with base models, got the job ops" in capsys.readouterr().err
    assert cli.main(["bench", "--tune", "--dtype", "bf16"]) == cli.EXIT_ERROR
    assert "--dtype: not an option of the search for launch rules" in capsys.readouterr().err
