"""The common part of every job of the suite: its cases, its file of results, its progress, its end.

A case is a dictionary of its distinguishing fields. A job lists its cases in the order of their value, and measures one
at a time. Each result is on the disk before the next case starts, so a run that ends early loses nothing and can be
resumed. The form of the file: docs/benchmarks.md.
"""

from __future__ import annotations

import functools
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from red_kernels.finetune.base_dtype import AUTO, DTYPES, BaseDtype, choose_dtype
from red_kernels.support.files import json_by_line, write_files
from red_kernels.support.parse import read_json, shown
from red_kernels.support.progress import Stage

from .failure import let_go
from .harness import clocks, environment

SCHEMA = 1
SAME = ("device", "threads", "instruction_set", "torch", "versions", "sources")  # of the environment, to resume
Case = dict[str, Any]
_FORM: dict[str, type] = {
    "job": str,
    "quick": bool,
    "environment": dict,
    "settings": dict,
    "missing": dict,
    "failed": list,
    "cases": list,
}


@dataclass(frozen=True)
class Run:
    """The options of a job's run.

    Attributes:
        device: the device.
        console: for the tables; progress goes to its own, on the standard error.
        quick: a run of a minute or two: few and small cases, few rounds. The file records it.
        deadline: no case starts after this time of `time.monotonic`; None for no limit.
        progress: the console of the progress bar.
        chosen: the dtype of base models if a job has `auto`; None for the device's default.
    """

    device: torch.device
    console: Console
    quick: bool = False
    deadline: float | None = None
    progress: Console = field(default_factory=lambda: Console(stderr=True))
    chosen: BaseDtype | None = None

    @functools.cached_property
    def base_dtype(self) -> BaseDtype:
        """The dtype of base models if a job has `auto`, and the reason for it."""
        return self.chosen or choose_dtype(self.device)

    def resolved(self, dtype: str) -> str:
        """A dtype's name, that of `base_dtype` for `auto`."""
        return self.base_dtype.name if dtype == AUTO else dtype

    def in_time(self) -> bool:
        """Whether another case may start."""
        return self.deadline is None or time.monotonic() < self.deadline


class ResultFile:
    """The results of one job: a JSON file that is rewritten completely after each case.

    Args:
        path: the file.
        job: its name.
        run: with its device.
        settings: the job's settings.
        missing: implementation or method to the reason why it is not measured at all.
        resume: keep the file's results.
        base_dtype: that of the job's base models, if it has any; a resumed file keeps its own.

    Raises:
        ValueError: the file to resume is of another job, schema, device, environment, sources, settings or dtype, or
            was quick and this is not.
    """

    def __init__(
        self,
        path: Path,
        job: str,
        run: Run,
        settings: Mapping[str, Any],
        missing: Mapping[str, str],
        *,
        resume: bool = False,
        base_dtype: BaseDtype | None = None,
    ) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "schema": SCHEMA,
            "job": job,
            "quick": run.quick,
            "environment": environment(run.device),
            "settings": dict(settings),
            "missing": dict(missing),
            **({} if base_dtype is None else {"base_dtype": base_dtype.json()}),
            "complete": False,
            "failed": [],
            "cases": [],
        }
        if resume and path.is_file():
            before = read(path)
            for name in ("job", "quick"):
                if before[name] != self.content[name]:
                    raise ValueError(
                        f"--resume: {path} has {name} {before[name]!r}, this run has {self.content[name]!r}"
                    )
            for name in SAME:
                old, new = before["environment"].get(name), self.content["environment"][name]
                if old != new:
                    raise ValueError(f"--resume: {path} was measured with {name} {old!r}, this is {new!r}")
            if base_dtype is not None:
                kept = kept_dtype(before)
                if kept is not None and kept != base_dtype.name:
                    raise ValueError(f"--resume: {path} has the dtype {kept!r}, this run has {base_dtype.name!r}")
                self.content["base_dtype"] = before.get("base_dtype", base_dtype.json())
            wanted = json.loads(json.dumps(self.content["settings"]))
            if before["settings"] != wanted:
                raise ValueError(f"--resume: {path} has the settings {before['settings']}, this run has {wanted}")
            self.content |= {name: value for name, value in before.items() if name not in self.content}
            self.content["cases"], self.content["failed"] = before["cases"], before["failed"]

    @property
    def cases(self) -> list[Case]:
        """All measured cases."""
        found: list[Case] = self.content["cases"]
        return found

    def has(self, case: Case) -> bool:
        """Whether this case is among the results."""
        return any(all(done.get(name) == value for name, value in case.items()) for done in self.cases)

    def failed(self, case: Case) -> bool:
        """Whether the measurement of this case failed."""
        return any(all(one.get(name) == value for name, value in case.items()) for one in self.content["failed"])

    def _forget_failure(self, case: Case) -> None:
        rest = [one for one in self.content["failed"] if any(one.get(name) != value for name, value in case.items())]
        self.content["failed"] = rest

    def add(self, case: Case, found: Mapping[str, Any]) -> None:
        """Add a result and write the file."""
        self._forget_failure(case)
        self.cases.append({**case, **found})
        self.write()

    def fail(self, case: Case, error: BaseException) -> None:
        """Record in the file that the measurement of a case failed."""
        self._forget_failure(case)
        self.content["failed"].append({**case, "error": f"{type(error).__name__}: {str(error)[:500]}"})
        self.write()

    def write(self) -> None:
        """Write the file, one line for each case."""
        write_files(self.path.parent, {self.path.name: json_by_line(self.content).encode()})


def read(path: Path) -> dict[str, Any]:
    """A file of results. Raises ValueError for another file, or another schema."""
    content = read_json(path, None)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a file of results of schema {SCHEMA}")
    for name, kind in _FORM.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(
                f"{path} is not a file of results: its {name} is {shown(content.get(name))}, expected {kind.__name__}"
            )
    return content


def kept_dtype(content: Mapping[str, Any]) -> str | None:
    """The dtype of base models in a file of results; None if it has none."""
    found = content.get("base_dtype")
    name = found.get("name") if isinstance(found, dict) else None
    return name if isinstance(name, str) and name in DTYPES else None


def run_cases(
    file: ResultFile, cases: Sequence[Case], measure: Callable[[Case], Mapping[str, Any]], run: Run, title: str
) -> None:
    """Measure the cases that the file lacks, in order, and show the progress.

    A failed case is named, in the file too, and the others continue; if all fail, the last error is raised. A case that
    failed in an earlier run comes last. Cases without time are left; the file is `complete` only when every case was
    measured or has failed.
    """
    left = sorted((case for case in cases if not file.has(case)), key=file.failed)
    file.content["planned"] = len(cases)
    file.write()  # minutes of measuring must not end in results that cannot be written
    failure: Exception | None = None
    measured = 0
    before = len(cases) - len(left)
    with Stage(run.progress, title, len(cases), done=before, unit="case") as stage:
        for number, case in enumerate(left, start=before + 1):
            if not run.in_time():
                break
            stage.begins(name_of(case))
            try:
                file.add(case, {**measure(case), "clocks": clocks(run.device)})
                measured += 1
            except Exception as error:
                let_go(error)
                failure = error
                run.console.print(f"[red]{escape(name_of(case))} failed:[/] {escape(str(error)[:500])}")
                file.fail(case, error)
            gc.collect()  # models with reference cycles
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
            stage.reached(number)
    behind = sum(not (file.has(case) or file.failed(case)) for case in cases)
    file.content["complete"] = not behind
    file.write()
    if failure is not None and not measured and not file.cases:
        raise failure
    if behind > 0:
        run.console.print(f"[yellow]{title}: the time is up; {behind} of {len(cases)} cases are left to --resume[/]")


def name_of(case: Case) -> str:
    """A case in a line."""
    return ", ".join(str(value) for value in case.values() if value != "")
