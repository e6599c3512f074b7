"""The output folder of a job: its content, and whether a new run may use it."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.folder import remove_saved
from ..integrations.trainer import checkpoints
from ..support.files import write_files
from ..support.parse import read_json
from ..support.text import listed
from .measure import HeldOut
from .settings import Settings

RUN_NAME = "run.json"
EDITS_NAME = "edits"
CURVE_NAME = "loss.png"
CONFIG_NAME = "config.yaml"

STATES = ("running", "interrupted", "finished")
_SETTINGS = {"task", "model", "data", "steps"}  # among the settings of every run
_OF_A_CHECKPOINT = re.compile(
    r"red_edits\.safetensors|red_head\.([0-9a-f]{32}\.)?safetensors|red_config\.json|trainer_state\.json|optimizer\.pt|"
    r"scheduler\.pt|scaler\.pt|rng_state(_[0-9]+)?\.pth|training_args\.bin"
)


@dataclass
class RunFolder:
    """`run.json` (settings, state, results), `config.yaml`, `edits/`, `loss.png` and `checkpoint-*/` in one folder."""

    path: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    checkpoint: Path | None = None
    state: str = "running"  # of the former run, then of this one
    writes: bool = True  # whether this process changes the folder

    @property
    def edits(self) -> Path:
        """Where the trained edits are saved."""
        return self.path / EDITS_NAME

    @property
    def curve(self) -> Path:
        """The file of the loss curve."""
        return self.path / CURVE_NAME

    @property
    def step(self) -> int:
        """The step of the checkpoint; 0 without one."""
        return int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0

    def begin(self) -> None:
        """Remove the files of a run that is not continued, and record the new one.

        Raises:
            OSError: the folder cannot be written to; checked before any training.
        """
        if self.checkpoint is None and self.writes:
            for folder in checkpoints(self.path):
                for path in filter(_of_a_run, folder.iterdir()):
                    path.unlink()
                with contextlib.suppress(OSError):
                    folder.rmdir()  # a file was added while model and data were loaded
            remove_saved(self.edits)
            if self.curve.exists():
                self.curve.unlink()
        finished = self.state == "finished"
        self.write("running")
        self.state = "finished" if finished else "running"  # the former state, until the next write

    @property
    def config(self) -> Path:
        """The settings in the form of `--config`."""
        return self.path / CONFIG_NAME

    def write(self, state: str, **results: Any) -> None:
        """Record the state of the run (`running`, `interrupted`, `finished`), and add results."""
        self.results.update(results)
        self.state = state
        if not self.writes:
            return
        content = {"state": state, "settings": self.settings, "results": self.results}
        write_files(self.path, {RUN_NAME: (json.dumps(content, indent=2) + "\n").encode()})


def open_run(path: Path, settings: Settings) -> RunFolder:
    """Check an output folder for a new run, or find the checkpoint to resume from; `begin` changes it.

    Args:
        path: the folder.
        settings: of the run. With `resume` it continues from the newest checkpoint, or from the start if the run was
            killed before its first. The settings that decide its course must be equal, and a finished run must have
            more steps. With `overwrite` the files of an earlier run are removed. Other files in the folder are kept;
            among those of a checkpoint they are refused.

    Raises:
        ValueError: the folder has a run but neither option is set; or a run to resume is missing, finished, damaged, or
            was started with other settings; or the files to overwrite are not of a run.
    """
    if settings.resume and settings.overwrite:
        raise ValueError("--resume and --overwrite: got both, expected one at most")
    recorded = json.loads(json.dumps(settings.recorded()))  # as they will be read back
    if settings.resume:
        former = _read(path, "--resume")
        _check_resumable(path, former, recorded, set(settings.deciding()))
        saved = checkpoints(path)
        return RunFolder(path, recorded, former["results"], saved[-1] if saved else None, former["state"])
    exists = (path / RUN_NAME).exists()
    if exists and not settings.overwrite:
        raise ValueError(
            f"--output: {str(path)!r} already holds a run; continue it by --resume, or start over by --overwrite"
        )
    if not exists and (checkpoints(path) or any((path / name).exists() for name in (EDITS_NAME, CURVE_NAME))):
        raise ValueError(
            f"--output: {str(path)!r} holds checkpoints, edits or a {CURVE_NAME} of another program; choose another "
            "folder"
        )
    if exists:
        _read(path, "--overwrite")
        for folder in checkpoints(path):
            foreign = [entry.name for entry in sorted(folder.iterdir()) if not _of_a_run(entry)]
            if foreign or folder.is_symlink():
                what = f"has {listed(foreign)}, which no run wrote" if foreign else "is a link"
                raise ValueError(f"--overwrite: {str(folder)!r} {what}; move away the files to keep")
    return RunFolder(path, recorded, {})


def _check_resumable(path: Path, former: dict[str, Any], settings: dict[str, Any], deciding: set[str]) -> None:
    defaults = json.loads(json.dumps(Settings().recorded()))  # settings that an older version lacks
    before = {name: former["settings"].get(name, defaults[name]) for name in settings}
    if isinstance(before["data"], str):
        before["data"] = [before["data"]]
    if before["validation"] is not None:
        before["held_out"] = None
    if former["state"] == "finished" and all(before[name] == settings[name] for name in ("steps", "epochs")):
        raise ValueError(
            f"--resume: the run in {str(path)!r} is finished; --steps N or --epochs N with a larger N continues it, "
            "--overwrite starts it over"
        )
    changed = [name for name in settings if name in deciding and before[name] != settings[name]]
    if changed:
        differences = ", ".join(f"{name} was {before[name]!r}, is {settings[name]!r}" for name in changed)
        raise ValueError(f"--resume: the run in {str(path)!r} was started with other settings: {differences}")


def _of_a_run(path: Path) -> bool:
    """Whether a path in a checkpoint is a file that a run writes there."""
    return _OF_A_CHECKPOINT.fullmatch(path.name) is not None and (path.is_symlink() or path.is_file())


def former_run(path: Path, option: str = "--resume") -> dict[str, Any]:
    """State, settings and results of a folder's run.

    Raises:
        ValueError: the folder has no run, or a damaged one; the message starts with the option.
    """
    return _read(path, option)


def former_settings(path: Path) -> dict[str, Any]:
    """The settings of a folder's run. Raises as `former_run`."""
    settings: dict[str, Any] = _read(path, "--resume")["settings"]
    return settings


def _read(path: Path, option: str) -> dict[str, Any]:
    file = path / RUN_NAME
    if not file.exists():
        raise ValueError(f"{option}: {str(path)!r} holds no run ({RUN_NAME} is missing)")
    try:
        content = read_json(file)
        if not all(isinstance(content.get(key), dict) for key in ("settings", "results")):
            raise ValueError("settings or results are missing")
        if not content["settings"].keys() >= _SETTINGS or content.get("state") not in STATES:
            raise ValueError(f"it has no settings, or none of the states {listed(list(STATES))}")
        if "before" in content["results"]:
            HeldOut.of(content["results"]["before"])
        return {"state": content["state"], "settings": content["settings"], "results": content["results"]}
    except ValueError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ValueError(
            f"{option}: {file} is damaged or of another program: {reason}; choose another folder, or remove it by hand"
        ) from error
