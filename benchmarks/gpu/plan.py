"""The two calls on a GPU: the stages in the order of their value, each with its share of a call's time.

Stages with the same `beside` run at once; none of them is timed. A rehearsal runs the same stages on a CPU. It imports
no torch, so a call starts fast.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .sizes import ELEMENTS, NORMS, OPERATION_TESTS, WIDTHS

CALL = 330  # seconds
PACKING = 10  # of them, for the work between the stages and after the last one
LOAD = "load"  # runs in each call, as each has another machine
BUILD = "build"  # runs without a kit of these sources, and takes its time from later stages
GRACE = 5  # seconds from the interrupt of a stage to its kill
MAX_FAILURES = 25  # of one run of tests
WORKERS = {"cuda": 7, "triton": 5, "gpu": 2}
STEP = {
    "cases": [["Llama-2-7B", "auto", 2, 2048]],
    "methods": ["frozen", "frozen-fused", "red", "naive", "lora-qv", "lora-all"],
    "seconds": 5.0,
    "rounds": 7,
}
# Of tests/backends/test_sanitized.py: each distribution of rows, with and without clusters, sorted, wide, mixed.
SANITIZED = (
    "test_every_kernel[edit_forward, slab_backward, add_lines]",
    "test_every_kernel[slab_backward sorted, add_edits]",
    "test_every_kernel[plain, several warps]",
    "test_every_kernel[full, several warps]",
    "test_every_kernel[sorted]",
    "test_every_kernel[wide, sorted, z made again]",
    "test_every_kernel[clusters of 4, full]",
    "test_every_kernel_of_mixes[reflections of several warps]",
)
LARGE = "more_elements or graphs or stream or same_bits or (every_width and (16385 or 32768 or 65536))"


@dataclass(frozen=True)
class Machine:
    """The machine and folders of the stages.

    Attributes:
        root: of the repository.
        work: a folder for temporary files.
        kept: a folder that is returned packed: logs, names of passed tests, profiles.
        results: a folder for files of results.
        python: the Python with torch.
        kit: the folder that `make gpu-kit` made.
        rehearsal: whether a CPU replaces the GPU.
        sanitizer, profiler: compute-sanitizer and ncu, if found.
    """

    root: Path
    work: Path
    kept: Path
    results: Path
    python: str
    kit: Path
    rehearsal: bool = False
    sanitizer: str | None = None
    profiler: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and variables in addition to those of all stages."""

    arguments: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


Commands = Callable[[Machine, float], Sequence[Command]]
Reason = Callable[[Machine], str | None]


def held(machine: Machine, stage: Stage) -> Path:
    """The folder of a stage's unfinished results."""
    return machine.results / (stage.held or stage.result)


def always(machine: Machine) -> str | None:
    """For stages that can always run."""
    return None


@dataclass(frozen=True)
class Stage:
    """A part of a call.

    Attributes:
        name: in the summary and of its log.
        call: the first call that it runs in.
        share: seconds, after which it is ended.
        commands: from a machine and a number of seconds, run one after the other; all run, and a failed one fails it.
        beside: the name of the stages that run at once.
        result: its file of results, by its returned name.
        held: the unfinished file, under the folder of results, if it is another.
        continues: the stage whose unfinished tests it takes over: it runs only if that one did not end well.
        serves: the stage that it prepares: it is not repeated once that one has run.
        left_out: why it cannot run on a machine, or None.
    """

    name: str
    call: int
    share: int
    commands: Commands
    beside: str = ""
    result: str = ""
    held: str = ""
    continues: str = ""
    serves: str = ""
    left_out: Reason = always


def module(machine: Machine, name: str, *arguments: object) -> Command:
    """A part of the benchmarks."""
    return Command((machine.python, "-m", f"benchmarks.gpu.{name}", *map(str, arguments)))


def _load(machine: Machine, seconds: float) -> Sequence[Command]:
    return [module(machine, "first", "--device", machine.device)]


def _build(machine: Machine, seconds: float) -> Sequence[Command]:
    kinds = ("cpu",) if machine.rehearsal else ("cuda", "cpu")
    return [Command((machine.python, "csrc/build.py", kind)) for kind in kinds]


def _tests(machine: Machine, on: str, files: Sequence[str], *more: str) -> list[Command]:
    passed = machine.kept / f"tests-{on}.passed"
    variables = {"PASSED_TESTS": str(passed), "RED_KERNELS_TEST_PAIRS": "1"}
    if on != "gpu":
        variables["RED_KERNELS_TEST_ON"] = "cpu" if machine.rehearsal else on
    workers = 2 if machine.rehearsal else WORKERS[on]
    command = (machine.python, "-m", "benchmarks.gpu.tests", "-n", str(workers), "--maxfail", str(MAX_FAILURES))
    return [Command((*command, *more, *files), variables)]


def suite_on(on: str, chosen: str = "") -> Commands:
    """The tests of the operations with a backend, or `gpu`, which need a GPU; some of them by their names."""

    def commands(machine: Machine, seconds: float) -> Sequence[Command]:
        files = ["tests/backends/test_gpu.py"] if on == "gpu" else list(OPERATION_TESTS)
        if machine.rehearsal and on != "gpu":
            files = ["tests/ops/test_operations.py"]
        return _tests(machine, on, files, *(("-k", chosen) if chosen else ()))

    return commands


def _sanitizers(machine: Machine, seconds: float) -> Sequence[Command]:
    calls = [f"tests/backends/test_sanitized.py::{name}" for name in SANITIZED]
    test = (machine.python, "-m", "pytest", "-p", "no:cacheprovider", *calls)
    variables = {"RED_KERNELS_TEST_ON": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    around = ("--target-processes", "all", "--error-exitcode", "99")
    return [
        Command((str(machine.sanitizer), "--tool", tool, *around, *test), variables)
        for tool in ("memcheck", "racecheck")
    ]


def _without_sanitizer(machine: Machine) -> str | None:
    return "compute-sanitizer was not found" if machine.sanitizer is None else None


def _without_profiler(machine: Machine) -> str | None:
    return "ncu was not found" if machine.profiler is None and not machine.rehearsal else None


def _without_variants(machine: Machine) -> str | None:
    found = any((machine.kit / "variants").glob("*.tar.xz")) or machine.rehearsal
    return None if found else "the kit has no variants"


def _on_cpu(machine: Machine) -> str | None:
    return "it needs a GPU" if machine.rehearsal else None


def ops_settings(machine: Machine, implementations: Sequence[str], sizes: Sequence[int]) -> dict[str, object]:
    """Settings of the job `ops`: both norms with the edit in front, in bf16."""
    small = machine.rehearsal
    names = ["cpu", *(name for name in implementations if name not in ("cuda", "triton"))]
    return {
        "operations": NORMS[:1] if small else NORMS,
        "dtypes": ["bf16"],
        "inputs": ["fresh"],
        "widths": (64, 128) if small else WIDTHS,
        "elements": [4096 for _ in sizes[:1]] if small else list(sizes),
        "implementations": names if small else list(implementations),
        "peak_memory": False,
        "seconds": 0.0,
    }


def measured(machine: Machine, job: str, seconds: float, name: str, settings: dict[str, object]) -> Command:
    """A job of the suite, ending a little before its time, into a folder of results."""
    ends = max(seconds - 8, seconds / 2)
    quick = ("--quick",) if machine.rehearsal else ()
    return module(
        machine, "measure", job, "--output", machine.results / name, "--settings", json.dumps(settings),
        "--seconds", f"{ends:.0f}", "--device", machine.device, *quick,
    )  # fmt: skip


def _fill(machine: Machine, seconds: float) -> Sequence[Command]:
    settings = ops_settings(machine, ("compile",), ELEMENTS[:1])
    return [module(machine, "fill", "--settings", json.dumps(settings), "--device", machine.device)]


def _bandwidth(machine: Machine, seconds: float) -> Sequence[Command]:
    settings = ops_settings(machine, ("cuda", "triton"), ELEMENTS)
    return [measured(machine, "ops", seconds, "bandwidth", settings)]


def _peers(machine: Machine, seconds: float) -> Sequence[Command]:
    names = ("cuda", "triton", "eager-fused", "compile", "liger", "quack")
    settings = ops_settings(machine, names, ELEMENTS[:1]) | {"kernels": True}
    return [measured(machine, "ops", seconds, "peers", settings)]


def _host(machine: Machine, seconds: float) -> Sequence[Command]:
    output = machine.results / "host.json"
    more = ("--rows", "8", "--width", "64") if machine.rehearsal else ()
    length = "0.05" if machine.rehearsal else "0.7"
    arguments = ("--seconds", length, "--output", str(output), *more)
    return [Command((machine.python, "-m", "benchmarks.tools.host_cost", *arguments))]


def profiled(skipped: int) -> Commands:
    """The next two of the worst kernels, under ncu."""

    def commands(machine: Machine, seconds: float) -> Sequence[Command]:
        tool = ("--ncu", machine.profiler) if machine.profiler else ()
        return [
            module(
                machine, "profile", "--results", machine.results / "bandwidth/ops.json", "--output", machine.kept,
                "--skip", skipped, "--device", machine.device, *tool,
            )
        ]  # fmt: skip

    return commands


def _variants(machine: Machine, seconds: float) -> Sequence[Command]:
    settings = ops_settings(machine, ("cuda", "triton"), ELEMENTS[:1])
    if not machine.rehearsal:
        settings["widths"] = (768, 4096, 8192)
    return [
        module(
            machine, "variants", "--kit", machine.kit, "--work", machine.work / "variants", "--output",
            machine.results / "variants.json", "--settings", json.dumps(settings), "--seconds", f"{seconds - 5:.0f}",
            "--device", machine.device,
        )
    ]  # fmt: skip


def _step(machine: Machine, seconds: float) -> Sequence[Command]:
    tiny = {"cases": [["tiny-decoder", "auto", 2, 16]], "methods": STEP["methods"][:3], "seconds": 0.0, "rounds": 2}  # type: ignore[index]
    return [measured(machine, "step", seconds, "step", dict(tiny if machine.rehearsal else STEP))]


def _tiles(machine: Machine, seconds: float) -> Sequence[Command]:
    where = ("--widths", "5120", "8192", "--rows", "4096", "--dtypes", "bf16", "--operations", "edit_add_rms_norm")
    output = ("--output", str(machine.kept / "tiles.json"), "--overwrite")
    return [Command((machine.python, "-m", "red_kernels", "bench", "--tune", *where, *output))]


STAGES = (
    Stage(LOAD, 1, 20, _load),
    Stage("tests-cuda", 1, 75, suite_on("cuda"), beside="tests"),
    Stage("tests-triton", 1, 75, suite_on("triton"), beside="tests"),
    Stage("tests-gpu", 1, 75, suite_on("gpu", f"not ({LARGE})"), beside="tests"),
    Stage("sanitizers", 1, 75, _sanitizers, beside="tests", left_out=_without_sanitizer),
    Stage("compile", 1, 75, _fill, beside="tests", serves="peers"),
    Stage("large", 1, 20, suite_on("gpu", LARGE)),
    Stage("bandwidth", 1, 65, _bandwidth, result="bandwidth.json", held="bandwidth/ops.json"),
    Stage("peers", 1, 75, _peers, result="peers.json", held="peers/ops.json"),
    Stage("host", 1, 15, _host, result="host.json"),
    Stage("profile", 1, 50, profiled(0), left_out=_without_profiler),
    Stage("again-cuda", 2, 50, suite_on("cuda"), beside="again", continues="tests-cuda"),
    Stage("again-triton", 2, 50, suite_on("triton"), beside="again", continues="tests-triton"),
    Stage("again-gpu", 2, 50, suite_on("gpu"), beside="again", continues="tests-gpu"),
    Stage("variants", 2, 60, _variants, result="variants.json", left_out=_without_variants),
    Stage("step", 2, 95, _step, result="step.json", held="step/step.json"),
    Stage("tiles", 2, 45, _tiles, left_out=_on_cpu),
    Stage("profile-more", 2, 50, profiled(2), left_out=_without_profiler),
)
# A call without a kit of these sources.
BUILDING = Stage(BUILD, 1, 150, _build)


def together(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in groups: a group's stages run at once."""
    found: list[list[Stage]] = []
    for stage in stages:
        if found and stage.beside and found[-1][0].beside == stage.beside:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found


def seconds_of(call: int, stages: Sequence[Stage] = STAGES) -> int:
    """The longest time of a call, with the packing between the stages."""
    own = [stage for stage in stages if stage.call == call or stage.name == LOAD]
    return PACKING + sum(max(stage.share for stage in group) for group in together(own))
