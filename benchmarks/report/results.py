"""Reads the folders of results, one for each device: `results/<device>/{ops,step,growth,quality}.json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs import read

JOBS = ("ops", "step", "growth", "quality")
Content = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """The results of one device.

    Attributes:
        name: the folder's.
        folder: the folder of the files.
        files: job to the content of its file, for existing ones.
    """

    name: str
    folder: Path
    files: dict[str, Content]

    @property
    def environment(self) -> dict[str, Any]:
        """Of its first file."""
        found: dict[str, Any] = next(iter(self.files.values()))["environment"]
        return found

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU."""
        return any(bool(content["environment"].get("gpu")) for content in self.files.values())


def load_folder(folder: Path, *, quick: bool = False) -> Device | None:
    """The results in one folder, or None if it has none. ``quick``: accept results of quick runs as well.

    Raises:
        ValueError: a file is not a file of results, is of another job than its name, or is of a quick run.
    """
    files = {}
    for job in JOBS:
        path = folder / f"{job}.json"
        if not path.is_file():
            continue
        content = read(path)
        if content.get("job") != job:
            raise ValueError(f"{path} is of job {content.get('job')!r}, expected {job!r}")
        if content.get("quick") and not quick:
            raise ValueError(f"{path} is a quick run (quick: true), which no report uses; measure without --quick")
        files[job] = content
    return Device(folder.name, folder, files) if files else None


def load(results: Path) -> list[Device]:
    """The devices in the folder of all results, by name. Files directly in it have another form, and are skipped.

    Raises ValueError as :func:`load_folder`.
    """
    folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    return [device for device in map(load_folder, folders) if device is not None]
