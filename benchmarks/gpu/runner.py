"""Two calls of a few minutes each on a machine with a GPU; `benchmarks/gpu_suite.sh` starts them.

Each stage runs for at most its share and is stopped by `timeout`, even if this program dies. Its results are packed
before the next stage starts. A later call continues where the one before ended.

    benchmarks/gpu_suite.sh OUTPUT [PREVIOUS] [--kit FOLDER] [--seconds N] [--dry] [--rehearse]

OUTPUT    a folder for at most 8 files: summary.txt, state.json, logs.tar.gz and the results
PREVIOUS  the OUTPUT of an earlier call, possibly the same folder: no stage runs twice

Exit status: 0; 1 if a stage failed; 2 if no stage could start.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from . import contents, place, state, summary
from .plan import BUILDING, CALL, GRACE, LOAD, PACKING, STAGES, Machine, Stage, held, seconds_of, together
from .state import CUT, DONE, ENDED, FAILED, LEFT_OUT, WAITING, State

POLL = 0.05  # seconds between checks of the running processes
LEAST = 8  # the least seconds to start a stage
MOST_NAMED = 8  # failed tests
_SUMMARY = re.compile(r"^=*\s*((?:\d+ (?:passed|failed|errors?|skipped|deselected|warnings?)(?:, )?)+ in [\d.]+s)")
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?\.py(?:::\w+)*(?:\[.*?\](?= - |$))?)")
LOGS, SUMMARY = "logs.tar.gz", "summary.txt"


class Runner:
    """One call.

    Args:
        machine: the machine and folders.
        output: the returned folder.
        known: the state of earlier calls; it is changed.
        budget: seconds of the call, from `begun` on, a time of `time.monotonic`.
        stages: all stages.
        say: prints a line.
    """

    def __init__(
        self,
        machine: Machine,
        output: Path,
        known: State,
        budget: float = CALL,
        begun: float | None = None,
        stages: Sequence[Stage] = STAGES,
        say: Callable[[str], None] = print,
    ) -> None:
        self.machine, self.output, self.known, self.stages, self.say = machine, output, known, stages, say
        self.ends = (time.monotonic() if begun is None else begun) + budget - PACKING
        self.variables = dict(os.environ)
        self.seen: dict[str, int] = {}  # stage to the size of its log at its start
        self.sources = contents.sources(machine.root, "red_kernels") + contents.sources(machine.root)

    def pending(self) -> list[Stage]:
        """The work of this call: unfinished and failed stages of earlier ones, then its own stages."""
        return [stage for stage in self.stages if stage.name == LOAD or self._is_due(stage)]

    def _is_due(self, stage: Stage) -> bool:
        entry = self.known.of(stage.name)
        return stage.call <= self.known.calls and entry.status not in ENDED and not self._taken_over(stage)

    def _taken_over(self, stage: Stage) -> bool:
        """Whether another stage continues this one's tests, or has none left to continue, or the stage that it prepares
        has run."""
        if stage.serves and self.known.of(stage.serves).call:
            return True
        if stage.continues:
            before = self.known.of(stage.continues)
            return before.status in ENDED or before.call == 0
        later = [other for other in self.stages if other.continues == stage.name]
        return bool(later) and self.known.of(stage.name).call > 0

    def run(self) -> int:
        """Run all stages for which there is time; returns the exit status."""
        self.known.calls += 1
        pending = self.pending()
        # The time used by earlier stages is missing for these: they wait for another call.
        for group in together(pending):
            self._group(group)
            if group[0].name == LOAD and self.known.of(LOAD).status == FAILED:
                self.say("gpu_suite: no further stage starts: see the log above")
                return 2
        self._pack()
        self.say((self.output / SUMMARY).read_text())
        waiting = [stage.name for stage in self.stages if self._unfinished(stage)]
        if waiting:
            self.say(f"left to another call: {', '.join(waiting)}")
        return int(any(self.known.of(stage.name).status == FAILED for stage in self.stages))

    def _unfinished(self, stage: Stage) -> bool:
        entry = self.known.of(stage.name)
        if entry.status not in (WAITING, CUT) or (stage.serves and self.known.of(stage.serves).call):
            return False
        if stage.continues:
            return self.known.of(stage.continues).status not in (*ENDED, WAITING)
        return not any(other.continues == stage.name and entry.call for other in self.stages)

    def _group(self, group: Sequence[Stage]) -> None:
        ready = []
        for stage in group:
            entry = self.known.of(stage.name)
            reason = stage.left_out(self.machine)
            if reason is not None:
                entry.status, entry.note = LEFT_OUT, reason
            else:
                ready.append(stage)
        left = self.ends - time.monotonic()
        seconds = min(max((stage.share for stage in ready), default=0), left)
        if not ready or seconds < min(LEAST, max(stage.share for stage in ready)):
            return
        self.say(f"--- {', '.join(stage.name for stage in ready)}: at most {seconds:.0f} s")
        programs = place.programs_in(self.machine.work / "triton")
        begun = time.monotonic()
        running = [(stage, self._start(stage, seconds)) for stage in ready]
        while running:
            stuck = time.monotonic() - begun > seconds + 2 * GRACE  # `timeout` itself
            for stage, process in [one for one in running if stuck or one[1].poll() is not None]:
                self._end(stage, process, time.monotonic() - begun)
                running.remove((stage, process))
            time.sleep(POLL)
        new = place.programs_in(self.machine.work / "triton") - programs
        if new:
            self.say(f"{new} Triton programs were not in the cache and were compiled")
            self.known.said.append(
                f"call {self.known.calls}, {group[-1].beside or group[-1].name}: {new} compiled here"
            )
        self._pack()

    def _start(self, stage: Stage, seconds: float) -> subprocess.Popen[bytes]:
        """All commands of a stage in one shell, which `timeout` ends with all its children."""
        entry = self.known.of(stage.name)
        if stage.result and entry.sources not in ("", self.sources):
            held(self.machine, stage).unlink(missing_ok=True)  # two versions have no common result
        entry.sources, entry.call = self.sources, self.known.calls
        script = self.machine.work / f"{stage.name}.json"
        commands = stage.commands(self.machine, seconds)
        script.write_text(json.dumps([[list(one.arguments), one.variables] for one in commands]))
        log = self._log(stage).open("ab")
        self.seen[stage.name] = log.tell()
        command = [sys.executable, "-m", "benchmarks.gpu.commands", str(script)]
        limit = ["timeout", "--signal=INT", f"--kill-after={GRACE}", f"{max(1.0, seconds - GRACE):.1f}"]
        return subprocess.Popen(
            [*limit, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            cwd=self.machine.root, env=self.variables | {"PYTHONPATH": self._path()},
        )  # fmt: skip

    def _path(self) -> str:
        own = [str(self.machine.root), str(self.machine.root / "tests")]
        return os.pathsep.join([*own, *filter(None, [self.variables.get("PYTHONPATH")])])

    def _end(self, stage: Stage, process: subprocess.Popen[bytes], seconds: float) -> None:
        """Record the state of a stage that has ended, or must end."""
        if process.poll() is None:
            process.kill()
        code = process.wait()
        with contextlib.suppress(ProcessLookupError):  # children that the stage did not wait for
            os.killpg(process.pid, signal.SIGKILL)
        entry = self.known.of(stage.name)
        entry.exit, entry.seconds = code, round(entry.seconds + seconds, 1)
        entry.status = DONE if code == 0 else CUT if code in (124, 137, -9) else FAILED
        if entry.status == DONE and stage.result and not complete(held(self.machine, stage)):
            entry.status = CUT  # it ended by itself when its time was up
        said = self._log(stage).read_bytes()[self.seen[stage.name] :].decode(errors="replace").splitlines()
        entry.note = said_of_tests(said) or entry.note
        if entry.status == CUT and (passed := self._passed(stage)):
            entry.note = "; ".join([f"{passed} tests passed or skipped so far", *filter(None, [entry.note])])
        before = self.known.of(stage.continues) if stage.continues else None
        if before is not None and entry.status == DONE:
            before.status, before.note = DONE, f"the rest in call {self.known.calls}"
        self.say("\n".join([f"{stage.name}: {entry.status}", *(f"    {line[:200]}" for line in said[-4:])]))

    def _passed(self, stage: Stage) -> int:
        """The number of tests in a stage's file of test names; 0 for other stages."""
        commands = stage.commands(self.machine, stage.share)
        paths = {Path(one.variables["PASSED_TESTS"]) for one in commands if "PASSED_TESTS" in one.variables}
        return sum(len(path.read_text().splitlines()) for path in paths if path.is_file())

    def _log(self, stage: Stage) -> Path:
        return self.machine.kept / f"{stage.name}.log"

    def _pack(self) -> None:
        """The machine may disappear at any time: each file is replaced completely."""
        self.output.mkdir(parents=True, exist_ok=True)
        with_results = [stage for stage in self.stages if stage.result and held(self.machine, stage).is_file()]
        for stage in with_results:
            source = held(self.machine, stage)
            _replace(self.output / stage.result, lambda path, source=source: shutil.copy(source, path))  # type: ignore[misc]
        found = summary.results(self.output)
        texts = {SUMMARY: summary.text(self.known, found), state.FILE: json.dumps(self.known.json(), indent=1) + "\n"}
        for name, text in texts.items():
            _replace(self.output / name, lambda path, text=text: path.write_text(text))  # type: ignore[misc]
        _replace(self.output / LOGS, self._pack_logs)

    def _pack_logs(self, path: Path) -> None:
        with tarfile.open(path, "w:gz", compresslevel=3) as packed:
            for one in sorted(self.machine.kept.rglob("*")):
                if one.is_file():
                    packed.add(one, str(one.relative_to(self.machine.kept)))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    temporary.replace(path)


def said_of_tests(lines: Sequence[str]) -> str:
    """pytest's last line in a log, and the failed tests; empty if it did not run."""
    last = [found[1] for line in lines if (found := _SUMMARY.search(line))]
    failed = list(dict.fromkeys(found[1] for line in lines if (found := _FAILED.match(line))))
    shown = [*failed[:MOST_NAMED], *([f"and {len(failed) - MOST_NAMED} more"] if len(failed) > MOST_NAMED else [])]
    return "; ".join([*last[-2:], *shown])


def complete(path: Path) -> bool:
    """Whether a file of results has all of its cases; one without the entry is complete."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return bool(found.get("complete", True))


def fetch(machine: Machine, previous: Path, stages: Sequence[Stage] = STAGES) -> State:
    """Copy the results of an earlier call to the place where this one continues them. Raises ValueError if damaged."""
    known = state.read(previous)
    if known.calls and known.rehearsal != machine.rehearsal:
        raise ValueError(f"PREVIOUS is {previous}, of a {'rehearsal' if known.rehearsal else 'GPU'}, but this is not")
    if known.calls:
        contents.unpack(previous / LOGS, machine.kept)
        for stage in stages:
            if stage.result and (previous / stage.result).is_file():
                held(machine, stage).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(previous / stage.result, held(machine, stage))
    known.rehearsal = machine.rehearsal
    return known


def dry(runner: Runner) -> str:
    """The stages of the next call with their shares."""
    runner.known.calls += 1
    lines = [f"call {runner.known.calls}: at most {seconds_of(min(2, runner.known.calls), runner.stages)} s by plan"]
    for group in together(runner.pending()):
        for stage in group:
            reason = stage.left_out(runner.machine)
            beside = f", beside the others of '{stage.beside}'" if stage.beside else ""
            why = f"; left out: {reason}" if reason else ""
            lines.append(f"{stage.name:14} {stage.share:4d} s{beside}{why}")
    return "\n".join(lines)


def _machine(given: argparse.Namespace, work: Path) -> Machine:
    kept, results = work / "kept", work / "results"
    for folder in (kept, results):
        folder.mkdir(parents=True, exist_ok=True)
    home = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    tools = {name: shutil.which(name) or shutil.which(str(home / name)) for name in ("compute-sanitizer", "ncu")}
    if given.rehearse:
        tools = dict.fromkeys(tools)
    return Machine(
        contents.ROOT,
        work,
        kept,
        results,
        given.python,
        given.kit,
        given.rehearse,
        tools["compute-sanitizer"],
        tools["ncu"],
    )


def main(arguments: Sequence[str] | None = None, begun: float | None = None) -> int:
    begun = time.monotonic() if begun is None else begun
    # A shell makes background processes ignore interrupts, and the stages would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_suite.sh", description=str(__doc__).split("\n")[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder for at most 8 files")
    parser.add_argument("previous", type=Path, nargs="?", metavar="PREVIOUS", help="the OUTPUT of an earlier call")
    parser.add_argument("--kit", type=Path, default=contents.ROOT / "gpu-kit", help="the kit, from make gpu-kit")
    parser.add_argument("--seconds", type=float, default=float(CALL), help=f"time of this call (default: {CALL})")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all shares, to rehearse on a slow machine")
    parser.add_argument("--python", default=sys.executable, help="which has torch")
    parser.add_argument("--dry", action="store_true", help="print the stages and their shares, but run none")
    parser.add_argument("--rehearse", action="store_true", help="run all of it on the CPU, with tiny sizes")
    given = parser.parse_args(arguments)
    try:
        return _call(given, begun)
    except (ValueError, OSError, contents.KitError) as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        return 2


def _call(given: argparse.Namespace, begun: float) -> int:
    for name in ("seconds", "scale"):
        if not 0 < getattr(given, name) < float("inf"):
            raise ValueError(f"--{name}: got {getattr(given, name)}, expected a number above 0")
    output, previous = given.output.resolve(), (given.previous or given.output).resolve()
    if given.previous is not None and not (previous / state.FILE).is_file():
        raise ValueError(f"PREVIOUS is {previous}, which has no {state.FILE} of an earlier call")
    if output.exists() and not output.is_dir():
        raise ValueError(f"OUTPUT is {output}, which is no folder")
    if shutil.which("timeout") is None:
        raise ValueError("timeout was not found; remedy: install GNU coreutils")
    given.kit = given.kit.resolve()
    stages = [replace(stage, share=max(1, round(stage.share * given.scale))) for stage in STAGES]
    # The same place in all calls: compiled code names its own files.
    work = Path(os.environ.get("TMPDIR") or "/tmp") / f"red-kernels-gpu-{os.getuid()}"
    shutil.rmtree(work, ignore_errors=True)
    machine = _machine(given, work)
    runner = Runner(machine, output, fetch(machine, previous), given.seconds * given.scale, begun, stages)
    if given.dry:
        print(dry(runner))
        return 0
    placed = place.place(machine.kit, machine.work, machine.python, rehearsal=machine.rehearsal)
    for line in placed.said:
        print(line, flush=True)
    runner.known.said = [*runner.known.said, *(f"call {runner.known.calls + 1}: {line}" for line in placed.said)]
    paths = filter(None, (placed.variables.pop("PYTHONPATH", None), os.environ.get("PYTHONPATH")))
    runner.variables |= {
        **placed.variables,
        "PYTHONPATH": os.pathsep.join(paths),
        **dict.fromkeys(("PYTHONUNBUFFERED", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"),
    }
    if placed.build:
        runner.stages = [replace(BUILDING, share=round(BUILDING.share * given.scale)), *stages]
        runner.known.stages.pop(BUILDING.name, None)
    return runner.run()


if __name__ == "__main__":
    sys.exit(main())
