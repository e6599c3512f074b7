"""Every architecture at every position, held to plain hooks: the results as lines of JSON, and docs/architectures.md.

`python tests/patching/architecture_runs.py` runs what it has no result of yet, and writes the page from all results.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from architecture_compare import Run

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architectures.md"
NOT_BUILT = "cannot be built here: "
NOT_CALLED = "not called"


@dataclass(frozen=True)
class Group:
    """Sites that differ in their layer's number only.

    Attributes:
        site: the name, `*` for each number in it.
        place: what it is in its layer.
        fused: as in the report.
        reason: as in the report.
        count: how many they are.
    """

    site: str
    place: str
    fused: str | None
    reason: str
    count: int


@dataclass(frozen=True)
class Result:
    """One architecture at one position; `architecture_compare.Run` says what the other fields are."""

    task: str
    model_type: str
    class_name: str
    position: str
    reason: str
    wrong: tuple[str, ...]
    groups: tuple[Group, ...]

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.task, self.model_type, self.class_name, self.position


@dataclass(frozen=True)
class Release:
    """The results of one release of transformers."""

    version: str
    results: tuple[Result, ...]


def with_addition(fused: str | None) -> bool:
    """Whether a site shares its pass with the addition that its value goes to, by way of its own norm or not."""
    return "add" in (fused or "")


def with_norm(fused: str | None) -> bool:
    """Whether it shares its pass with a norm: one that its value goes through before it is added, or the next one."""
    return "Norm" in (fused or "")


def source() -> str:
    """What the results depend on besides the libraries, in short."""
    names = sorted(
        [*(ROOT / "red_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]
        + [ROOT / "tests" / "patching" / f"{name}.py" for name in _TESTS]
    )
    total = hashlib.sha256()
    for name in names:
        total.update(str(name.relative_to(ROOT)).encode() + b"\0" + name.read_bytes() + b"\0")
    return total.hexdigest()[:16]


_TESTS = ("architectures", "architecture_sizes", "architecture_compare", "hooked")


def read(path: Path, of: str = "") -> tuple[dict[str, str], list[Result]]:
    """The head of a file of results, and the results; none where its head names another `source`."""
    if not path.exists():
        return {}, []
    lines = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one, of a run that was interrupted
            lines.append(json.loads(line))
    if not lines or (of and lines[0].get("source") != of):
        return {}, []
    return lines[0], [
        Result(**one | {"wrong": tuple(one["wrong"]), "groups": tuple(Group(**each) for each in one["groups"])})
        for one in lines[1:]
    ]


def collect(path: Path, positions: Sequence[str]) -> None:
    """Add to a file the results that it lacks. Until all are there, they are in a file beside it."""
    import architecture_compare as compare
    import architectures as zoo
    import transformers

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    head = {"transformers": transformers.__version__, "source": source()}
    part = path.with_name(f"{path.name}.part")
    known = {}
    for each in (path, part):
        former, results = read(each, of=head["source"])
        if former.get("transformers") == head["transformers"]:
            known |= {result.key: result for result in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    every = zoo.architectures()
    _write(part, head, known.values())
    with part.open("a") as file:
        for at, one in enumerate(every):
            began = time.monotonic()
            missing = [each for each in positions if (one.task, one.model_type, one.class_name, each) not in known]
            subject = compare.Subject(one) if missing else None
            for position in missing:
                assert subject is not None
                found = _of(subject.run(position))
                result = Result(one.task, one.model_type, one.class_name, position, *found)
                known[result.key] = result
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                if result.wrong:
                    print(f"{one} {position}: WRONG: {'; '.join(result.wrong)}", flush=True)
            if missing:
                print(f"{at + 1} of {len(every)}: {one}, {time.monotonic() - began:.1f} s", flush=True)
    keys = [(one.task, one.model_type, one.class_name, each) for one in every for each in compare.POSITIONS]
    _write(path, head, [known[key] for key in dict.fromkeys(keys) if key in known])
    part.unlink()


def _write(path: Path, head: dict[str, str], results: Iterable[Result]) -> None:
    new = path.with_name(f"{path.name}.tmp")
    new.write_text("".join(json.dumps(line) + "\n" for line in (head, *map(asdict, results))))
    os.replace(new, path)


def _of(run: Run) -> tuple[str, tuple[str, ...], tuple[Group, ...]]:
    counts: Counter[tuple[str, str, str | None, str]] = Counter()
    for site in run.sites:
        name = re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", site.site)
        fused, reason = (site.fused, site.reason) if site.site in run.called else (None, NOT_CALLED)
        counts[name, run.places[site.site], fused, reason] += 1
    groups = tuple(Group(*which, count) for which, count in counts.items())
    return run.reason, tuple(run.wrong), groups


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", default="ffn,attn,more,res", help="those to run, with commas between them")
    parser.add_argument("--json", type=Path, help="the results; build/architectures-VERSION.jsonl if not given")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write; docs/architectures.md if not given")
    parser.add_argument("--no-page", action="store_true", help="run only")
    parser.add_argument("--beside", type=Path, action="append", default=[], help="results of another transformers")
    options = parser.parse_args(arguments)
    path = options.json or ROOT / "build" / f"architectures-{importlib.metadata.version('transformers')}.jsonl"
    collect(path, options.positions.split(","))
    if options.no_page:
        return
    from architecture_page import page

    releases = []
    for each in (path, *options.beside):
        head, results = read(each, of=source())
        if not head:
            parser.error(f"{each}: no results of these sources; run it again")
        releases.append(Release(head["transformers"], tuple(results)))
    new = options.page.with_name(f"{options.page.name}.tmp")
    new.write_text(page(releases))
    os.replace(new, options.page)


if __name__ == "__main__":
    main(sys.argv[1:])
