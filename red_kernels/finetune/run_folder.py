"""The output folder of a job: what is in it, and whether a new run may use it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.folder import remove_saved
from ..integrations.trainer import checkpoints
from ..support.files import write_files
from ..support.parse import read_json
from ..support.text import listed
from .measure import HeldOut

RUN_NAME = "run.json"
EDITS_NAME = "edits"
CURVE_NAME = "loss.png"

STATES = ("running", "interrupted", "finished")
_SETTINGS = {"task", "model", "data", "steps"}  # among those of every run
_OF_A_CHECKPOINT = re.compile(
    r"red_edits\.safetensors|red_head\.([0-9a-f]{32}\.)?safetensors|red_config\.json|trainer_state\.json|optimizer\.pt|"
    r"scheduler\.pt|scaler\.pt|rng_state(_[0-9]+)?\.pth|training_args\.bin"
)


@dataclass
class RunFolder:
    """`run.json` (settings, state, results), `edits/`, `loss.png` and `checkpoint-*/` in one folder."""

    path: Path
    settings: dict[str, Any]
    results: dict[str, Any]
    checkpoint: Path | None = None

    @property
    def edits(self) -> Path:
        """Where the trained edits are saved."""
        return self.path / EDITS_NAME

    @property
    def curve(self) -> Path:
        """Where the loss curve is drawn."""
        return self.path / CURVE_NAME

    def begin(self) -> None:
        """Remove the files of a run that is not gone on with, and record the new one.

        Raises:
            OSError: the folder cannot be written to; found out here, before anything is trained.
        """
        if self.checkpoint is None:
            for folder in checkpoints(self.path):
                for path in filter(_of_a_run, folder.iterdir()):
                    path.unlink()
                with contextlib.suppress(OSError):
                    folder.rmdir()  # something was put into it while model and data were loaded
            remove_saved(self.edits)
            if self.curve.exists():
                self.curve.unlink()
        self.write("running")

    def write(self, state: str, **results: Any) -> None:
        """Record the state of the run (`running`, `interrupted`, `finished`) and add results."""
        self.results.update(results)
        content = {"state": state, "settings": self.settings, "results": self.results}
        write_files(self.path, {RUN_NAME: (json.dumps(content, indent=2) + "\n").encode()})


def open_run(path: Path, settings: Mapping[str, Any], resume: bool, overwrite: bool) -> RunFolder:
    """Look at an output folder for a new run, or find the checkpoint to resume from; `begin` changes it.

    Args:
        path: the folder.
        settings: what decides the course of the run; a resumed run must have the same.
        resume: go on from the newest checkpoint; from the start if the run was killed before its first.
        overwrite: remove the files of an earlier run. Other files in the folder are never touched; among those of a
            checkpoint they are refused.

    Raises:
        ValueError: the folder holds a run and neither was asked for; or a run to resume is missing, finished, damaged,
            or was started with other settings; or what there is to overwrite was not written by a run.
    """
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: got both, expected one at most")
    settings = json.loads(json.dumps(settings))  # as they will be read back
    exists = (path / RUN_NAME).exists()
    if resume:
        former = _read(path, "--resume")
        if former["state"] == "finished":
            raise ValueError(f"--resume: the run in {str(path)!r} is finished; --overwrite starts it anew")
        changed = [name for name in settings if former["settings"].get(name) != settings[name]]
        if changed:
            differences = ", ".join(
                f"{name} was {former['settings'].get(name)!r}, is {settings[name]!r}" for name in changed
            )
            raise ValueError(f"--resume: the run in {str(path)!r} was started with other settings: {differences}")
        saved = checkpoints(path)
        run = RunFolder(path, dict(settings), former["results"], saved[-1] if saved else None)
    else:
        if exists and not overwrite:
            raise ValueError(
                f"--output: {str(path)!r} already holds a run; go on with it by --resume, or start anew by --overwrite"
            )
        if not exists and (checkpoints(path) or any((path / name).exists() for name in (EDITS_NAME, CURVE_NAME))):
            raise ValueError(
                f"--output: {str(path)!r} holds checkpoints, edits or a {CURVE_NAME} of another program; choose "
                "another folder"
            )
        if exists:
            _read(path, "--overwrite")
            for folder in checkpoints(path):
                foreign = [entry.name for entry in sorted(folder.iterdir()) if not _of_a_run(entry)]
                if foreign or folder.is_symlink():
                    what = f"has {listed(foreign)}, which no run wrote" if foreign else "is a link"
                    raise ValueError(f"--overwrite: {str(folder)!r} {what}; move away what is to be kept")
        run = RunFolder(path, dict(settings), {})
    return run


def _of_a_run(path: Path) -> bool:
    """Whether something in a checkpoint is a file that a run writes there."""
    return _OF_A_CHECKPOINT.fullmatch(path.name) is not None and (path.is_symlink() or path.is_file())


def former_setting(path: Path, name: str) -> Any:
    """A setting of the run that a folder holds; None where that run has no such setting.

    Raises:
        ValueError: the folder holds no run, or a damaged one.
    """
    return _read(path, "--resume")["settings"].get(name)


def _read(path: Path, option: str) -> dict[str, Any]:
    file = path / RUN_NAME
    if not file.exists():
        raise ValueError(f"{option}: {str(path)!r} holds no run ({RUN_NAME} is missing)")
    try:
        content = read_json(file)
        if not all(isinstance(content.get(key), dict) for key in ("settings", "results")):
            raise ValueError("settings or results are missing")
        if not content["settings"].keys() >= _SETTINGS or content.get("state") not in STATES:
            raise ValueError(f"it has no settings of a run, or none of the states {listed(list(STATES))}")
        if "before" in content["results"]:
            HeldOut.of(content["results"]["before"])
        return {"state": content["state"], "settings": content["settings"], "results": content["results"]}
    except ValueError as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ValueError(
            f"{option}: {file} is damaged or of another program: {reason}; choose another folder, or remove it by hand"
        ) from error
