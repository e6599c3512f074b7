"""Writes the figures of README.md and of performance.md, kinds.md and quality.md in docs/ from the files of results.

`python -m benchmarks.report`, or `make report`. `--check` writes no file and fails if they differ from the files.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from red_kernels.support.files import write_files

from .documents import BEGIN, END, performance, put_block
from .kinds import kinds_block
from .quality import merged, quality_block
from .results import load
from .summary import summary

ROOT = Path(__file__).resolve().parent.parent.parent


def documents(results: Path, root: Path) -> dict[Path, tuple[str, str]]:
    """Each text's path, its present content and its correct content.

    Raises:
        ValueError: a file of results is invalid, or the README has not exactly one pair of marks. Without results it
            needs none.
        OSError: the README is missing.
    """
    devices = load(results)
    readme, page = root / "README.md", root / "docs" / "performance.md"
    text = readme.read_text(encoding="utf-8")
    found = {page: (page.read_text(encoding="utf-8") if page.is_file() else "", performance(devices, page.parent))}
    if devices or BEGIN in text or END in text:
        found[readme] = (text, put_block(text, summary(devices, merged(results)), readme.name))
    for name, block in {"kinds.md": kinds_block, "quality.md": quality_block}.items():
        path = root / "docs" / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if BEGIN in text:
            found[path] = (text, put_block(text, block(results), name))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write, or compare; returns 1 on a difference or an error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=str(__doc__).split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write no file; show and fail on differences")
    parser.add_argument("--results", type=Path, help="the folder of results, one folder for each device")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the folder of README.md and docs/ (default: the sources')"
    )
    chosen = parser.parse_args(arguments)
    results = chosen.results or chosen.root / "benchmarks" / "results"
    try:
        if not results.is_dir():
            raise ValueError(f"--results: {results} is no folder")
        found = documents(results, chosen.root)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    differing = {path: texts for path, texts in found.items() if texts[0] != texts[1]}
    for path, (old, new) in differing.items():
        if not chosen.check:
            write_files(path.parent, {path.name: new.encode()})
            print(f"{path} written")
            continue
        name = path.relative_to(chosen.root)
        lines = difflib.unified_diff(
            old.splitlines(), new.splitlines(), f"{name}", f"{name} by make report", lineterm=""
        )
        print("\n".join(lines))
    if not differing:
        print("README.md and the pages in docs/ agree with the results")
    return 1 if chosen.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
