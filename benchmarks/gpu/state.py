"""The state of earlier calls: a file next to the results, from which a later call continues."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "state.json"
SCHEMA = 1
WAITING, DONE, CUT, FAILED, LEFT_OUT = "waiting", "done", "cut", "failed", "left out"
ENDED = (DONE, LEFT_OUT)


@dataclass
class Entry:
    """The state of a stage.

    Attributes:
        status: `waiting`, `done`, `cut` off by its time, `failed` or `left out`.
        seconds: in all calls.
        exit: of the last run.
        call: the number of the call that ran it last; 0 for none.
        sources: a hash of its sources.
        note: why it was left out, or a remark for the user.
    """

    status: str = WAITING
    seconds: float = 0.0
    exit: int | None = None
    call: int = 0
    sources: str = ""
    note: str = ""


@dataclass
class State:
    """Stages by their names, and the number of calls."""

    calls: int = 0
    stages: dict[str, Entry] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    rehearsal: bool = False

    def of(self, name: str) -> Entry:
        """The state of a stage, possibly empty."""
        return self.stages.setdefault(name, Entry())

    def json(self) -> dict[str, Any]:
        """The file's content."""
        return {"schema": SCHEMA, **asdict(self)}


def read(folder: Path) -> State:
    """The state in a folder; a new one if it has none.

    Raises ValueError for a damaged file or one of another form.
    """
    path = folder / FILE
    if not path.exists():
        return State()
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}, expected {SCHEMA}")
        entries = {name: Entry(**entry) for name, entry in found["stages"].items()}
        return State(found["calls"], entries, found["said"], found["rehearsal"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); remedy: another folder, or remove it") from error
