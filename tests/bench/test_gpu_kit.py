"""What travels to a machine with a GPU: made as a whole or not at all, and what does not fit there is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from op_cases import INTERPRETED
from patience import HANGS
from places import ROOT, python_path

from benchmarks.gpu import contents, kit, place, triton_cache
from benchmarks.gpu.contents import KitError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a kit is made and used on Linux")


def manifest(**changes: Any) -> dict[str, Any]:
    made = {"python": "3.12.1", "triton": "3.6.0", "programs": 2, "left": 3}
    return {"schema": contents.SCHEMA, "sources": contents.sources(), "architecture": "sm_90", "triton": made} | changes


def described(folder: Path, **changes: Any) -> None:
    """Have a kit say what is in it."""
    text = json.dumps(manifest(files=contents.digests(folder)) | changes)
    (folder / contents.MANIFEST).write_text(text)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A kit with two files for libraries and one program."""
    folder = tmp_path / "kit"
    libraries, cache = tmp_path / "libraries", tmp_path / "cache"
    for name in contents.LIBRARIES:
        libraries.mkdir(exist_ok=True)
        (libraries / name).write_text(f"new {name}")
    program(cache)
    folder.mkdir()
    contents.leave_sources(cache)
    contents.pack(libraries, folder / contents.PACKED_LIBRARIES)
    contents.pack(cache, folder / contents.PACKED_CACHE)
    described(folder)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the sources of this one, and an old library."""
    folder = tmp_path / "root"
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "red_kernels/lib").mkdir(parents=True)
    (folder / "red_kernels/lib" / contents.LIBRARIES[0]).write_text("old")
    return folder


def program(cache: Path, name: str = "PROGRAM") -> None:
    """As Triton keeps one: its files, and a file that names them where they are."""
    folder = cache / name
    folder.mkdir(parents=True)
    files = [f"edit.{end}" for end in ("source", "cubin", "json")]
    for file in files:
        (folder / file).write_text(file)
    group = {"child_paths": {file: str(folder / file) for file in files}}
    (folder / f"{contents.GROUP}edit.json").write_text(json.dumps(group))


def versions(monkeypatch: pytest.MonkeyPatch, python: str = "3.12.3", triton: str = "3.6.0") -> None:
    monkeypatch.setattr(place, "versions", lambda given: {"python": python, "torch": "2.11.0", "triton": triton})


def test_a_kit_is_put_in_place(made: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch)
    work = tmp_path / "work"
    placed = place.place(made, work, sys.executable, root)
    assert not placed.build
    for name in contents.LIBRARIES:
        assert (root / "red_kernels/lib" / name).read_text() == f"new {name}"
    assert sorted(path.name for path in (root / "red_kernels/lib").iterdir()) == sorted(contents.LIBRARIES)
    cache = Path(placed.variables["TRITON_CACHE_DIR"])
    group = json.loads((cache / "PROGRAM" / f"{contents.GROUP}edit.json").read_text())["child_paths"]
    assert sorted(group) == ["edit.cubin", "edit.json"]
    assert all(Path(path).read_text() == name for name, path in group.items())
    assert place.programs_in(cache) == 1
    assert placed.said == ["libraries of the kit, for sm_90", "1 Triton programs of the kit; 3 are left"]


def test_a_rehearsal_leaves_the_libraries_alone(
    made: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch)
    placed = place.place(made, tmp_path / "work", sys.executable, root, rehearsal=True)
    assert "libraries of the kit, for sm_90, not used" in placed.said
    (root / "csrc/cuda/more.cuh").write_text("// another version\n")
    assert not place.place(made, tmp_path / "work", sys.executable, root, rehearsal=True).build
    assert not place.place(tmp_path / "none", tmp_path / "work", sys.executable, root, rehearsal=True).build
    assert [path.name for path in (root / "red_kernels/lib").iterdir()] == [contents.LIBRARIES[0]]
    assert (root / "red_kernels/lib" / contents.LIBRARIES[0]).read_text() == "old"


def test_what_does_not_fit_is_made_there_and_said(
    made: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions(monkeypatch, python="3.11.7")
    (root / "csrc/cuda/more.cuh").write_text("// another version\n")
    placed = place.place(made, tmp_path / "work", sys.executable, root)
    assert placed.build
    assert (root / "red_kernels/lib" / contents.LIBRARIES[0]).read_text() == "old"
    assert place.programs_in(Path(placed.variables["TRITON_CACHE_DIR"])) == 0
    assert "the kit's libraries are of other sources" in placed.said[0]
    assert "for Python 3.12 and Triton 3.6.0, but this is Python 3.11.7 and Triton 3.6.0" in placed.said[1]
    versions(monkeypatch, triton="3.7.0")
    newer = place.place(made, tmp_path / "b", sys.executable, root)
    assert "but this is Python 3.12.3 and Triton 3.7.0" in newer.said[1]
    nothing = place.place(tmp_path / "none", tmp_path / "c", sys.executable, root)
    assert nothing.build
    assert "remedy: make gpu-kit first" in nothing.said[0]


def test_a_damaged_kit_changes_nothing(made: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch)
    archive = made / contents.PACKED_LIBRARIES
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(KitError, match=r"libraries.tar.xz is missing or damaged; remedy: copy the kit again"):
        place.place(made, tmp_path / "work", sys.executable, root)
    archive.write_text("no archive")
    described(made)
    with pytest.raises(KitError, match=r"cannot be unpacked .*; remedy: copy the kit again"):
        place.place(made, tmp_path / "work", sys.executable, root)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / contents.LIBRARIES[0]).touch()
    contents.pack(tmp_path / "one", archive)
    described(made)
    with pytest.raises(KitError, match=f"lacks {contents.LIBRARIES[1]}; remedy: make gpu-kit again"):
        place.place(made, tmp_path / "work", sys.executable, root)
    assert (root / "red_kernels/lib" / contents.LIBRARIES[0]).read_text() == "old"
    assert len(list((root / "red_kernels/lib").iterdir())) == 1
    described(made, schema=0)
    with pytest.raises(KitError, match="is of another form; remedy"):
        place.place(made, tmp_path / "work", sys.executable, root)


def test_a_python_that_does_not_run() -> None:
    with pytest.raises(KitError, match="PYTHON is 'no-python', which does not run"):
        place.versions("no-python")


def test_the_hash_is_of_sources_alone(root: Path) -> None:
    before = contents.sources(root)
    assert before == contents.sources()
    (root / "csrc/notes.txt").write_text("no source")
    assert contents.sources(root) == before
    (root / "csrc/build.py").write_text("FLAGS = []\n")
    assert contents.sources(root) != before


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything that takes minutes, by stand-ins."""
    called: dict[str, Any] = {}

    def library(root: Path, name: str, target: Path, objects: Path) -> None:
        called.setdefault("libraries", []).append(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(name)

    def cache(python: str, made: Path, wanted: kit.Wanted, say: Any) -> dict[str, Any]:
        (made / contents.PACKED_CACHE).write_text("programs")
        return manifest()["triton"]  # type: ignore[no-any-return]

    monkeypatch.setattr(kit, "_nvcc", lambda: "nvcc")
    monkeypatch.setattr(kit, "find_python", lambda given: "python3.12")
    monkeypatch.setattr(kit, "build_library", library)
    monkeypatch.setattr(kit, "add_cache", cache)
    monkeypatch.setattr(kit, "add_wheels", lambda made, say: [])
    return called


def test_a_kit_is_made_as_a_whole(parts: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "kit"
    for _ in range(2):  # the second takes the place of the first
        kit.make(kit.Wanted(folder), said.append)
    assert parts["libraries"] == 2 * list(contents.LIBRARIES)
    assert sorted(path.name for path in folder.iterdir()) == ["kit.json", "libraries.tar.xz", "triton.tar.xz"]
    assert contents.read_manifest(folder)["sources"] == contents.sources()
    with tarfile.open(folder / contents.PACKED_LIBRARIES) as archive:
        assert sorted(archive.getnames()) == sorted(contents.LIBRARIES)
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
    sizes = [line.split() for line in said if " MiB " in line][-5:]
    assert [size[-1] for size in sizes] == ["kit.json", "libraries.tar.xz", "triton.tar.xz", "repository", "together"]
    assert float(sizes[-1][0]) >= float(sizes[-2][0]) > 1


def test_a_kit_that_is_too_large_is_none(parts: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "kit"
    kit.make(kit.Wanted(folder), lambda line: None)
    before = (folder / contents.MANIFEST).stat().st_mtime_ns
    with pytest.raises(KitError, match=r"together .* MiB, above the 1 MiB that travel; remedy: fewer variants"):
        kit.make(kit.Wanted(folder, limit=1 << 20), lambda line: None)
    assert (folder / contents.MANIFEST).stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
    assert kit.LIMIT == 56 << 20


def test_a_part_that_fails_leaves_nothing(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> Any:
        raise KitError("Triton is another one")

    monkeypatch.setattr(kit, "add_cache", broken)
    with pytest.raises(KitError, match="Triton is another one"):
        kit.make(kit.Wanted(tmp_path / "kit"), lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_variants_are_of_other_revisions(parts: dict[str, Any], tmp_path: Path) -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("this is no checkout")
    folder = tmp_path / "kit"
    kit.make(kit.Wanted(folder, variants=(("old", "HEAD"),)), lambda line: None)
    assert contents.read_manifest(folder)["variants"] == {"old": head}
    contents.unpack(folder / contents.VARIANTS / "old.tar.xz", tmp_path / "found")
    assert (tmp_path / "found/red_kernels/__init__.py").is_file()
    assert (tmp_path / "found/red_kernels/lib" / contents.LIBRARIES[0]).is_file()
    with pytest.raises(KitError, match="VARIANTS: got the revision 'no-such', which git does not know"):
        kit.make(kit.Wanted(folder, variants=(("new", "no-such"),)), lambda line: None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--variant", "tma"], "VARIANTS: got 'tma', expected NAME=REVISION"),
        (["--variant", "a/b=HEAD"], "VARIANTS: got 'a/b=HEAD', expected NAME=REVISION"),
        (["--minutes", "0"], "--minutes: got 0.0, expected more than 0"),
        (["--python312", "/no/python"], "PYTHON312 is '/no/python', which is not Python 3.12"),
        (["--python312", "PYTHON"], "which is not Python 3.12"),
    ],
)
def test_wrong_calls_say_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kit, "PYTHON", "3.12" if sys.version_info[:2] != (3, 12) else "3.99")
    monkeypatch.setattr(kit, "_nvcc", lambda: "nvcc")
    words = [sys.executable if word == "PYTHON" else word for word in arguments]
    assert kit.main([str(tmp_path / "kit"), *words]) == 1
    error = capsys.readouterr().err
    assert said.replace("3.12", kit.PYTHON) in error
    assert error.startswith("gpu-kit: ")
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NVCC", "no-nvcc")
    assert kit.main([str(tmp_path / "kit")]) == 1
    assert "NVCC is 'no-nvcc', and that is no program; remedy: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_kit_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert kit.main([str(tmp_path)]) == 1
    assert "which exists and is no kit; remedy: another folder, or remove it" in capsys.readouterr().err
    assert (tmp_path / "mine").exists()


def test_another_triton_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs would be found by none."""
    from benchmarks.gpu import programs

    monkeypatch.setattr(programs, "of_benchmarks", lambda: ["{}"])
    monkeypatch.setattr(kit, "BUILD", tmp_path)
    (tmp_path / f"triton-{kit.TRITON}-{kit.PYTHON}/triton").mkdir(parents=True)
    answer = {"programs": 1, "failed": 0, "left": 0, "errors": [], "python": "3.12.1", "triton": "3.7.0"}
    monkeypatch.setattr(kit, "_run", lambda *given, **options: json.dumps(answer))
    wanted = kit.Wanted(tmp_path / "kit", tests=False)
    with pytest.raises(KitError, match=r"compiled by Python 3.12.1 and Triton 3.7.0, expected 3.12 and 3.6.0"):
        kit.add_cache("python3.12", tmp_path, wanted, print)
    answer |= {"triton": "3.6.0", "failed": 1, "errors": ["ValueError: no\nmore"]}
    said: list[str] = []
    assert kit.add_cache("python3.12", tmp_path, wanted, said.append)["failed"] == 1
    assert said == ["1 programs do not compile, here or there: ValueError: no more", "1 programs"]
    answer["programs"] = 0
    with pytest.raises(KitError, match=r"none of Triton's 1 programs compiles: ValueError: no more$"):
        kit.add_cache("python3.12", tmp_path, wanted, print)


LOOKED_UP = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu import triton_cache
from benchmarks.tools import ahead_of_time
triton_cache.use(sys.argv[1])
dtypes = {kind: dtype for dtype, kind in ahead_of_time._TYPES.items()}
before = set(Path(sys.argv[1]).glob("*"))
for one in ahead_of_time.programs(ahead_of_time.Case("edit_add_rms_norm", 256, edit_ids=True), "sm_90"):
    kernel = ahead_of_time._KERNELS[one.kernel]
    tensors = [None if kind is None else torch.empty(64, dtype=dtypes[kind]) for kind in one.types]
    numbers = [16 if p.annotation_type == "i64" else 0.5 for p in kernel.function.params if p.name in one.numbers]
    options = kernel.options(one.warps, one.stages, False)
    found = kernel.function.warmup(*tensors, *numbers, *one.constants, grid=(1,), **options)
    assert found.asm["cubin"]
print(len(before), len(set(Path(sys.argv[1]).glob("*")) - before))
"""


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: Triton does not compile")
def test_what_was_compiled_without_torch_is_found_from_another_folder(tmp_path: Path) -> None:
    """By real tensors, under whatever Triton is here: a cache that misses would be made again in the few minutes."""
    from benchmarks.gpu import programs
    from benchmarks.tools.ahead_of_time import Case

    lines = programs.of_cases([Case("edit_add_rms_norm", 256, edit_ids=True)])
    (tmp_path / "programs").write_text("".join(line + "\n" for line in lines))
    environment = os.environ | {"PYTHONPATH": python_path()}
    command = [sys.executable, "-m", "benchmarks.gpu.triton_cache", str(tmp_path / "programs"), str(tmp_path / "made")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["programs"], said["failed"], said["left"]) == (len(lines), 0, 0), done.stdout + done.stderr
    contents.leave_sources(tmp_path / "made")
    contents.pack(tmp_path / "made", tmp_path / "packed.tar.xz")
    shutil.rmtree(tmp_path / "made")
    contents.unpack(tmp_path / "packed.tar.xz", tmp_path / "there")
    assert contents.settle(tmp_path / "there") == len(lines)
    (tmp_path / "look.py").write_text(LOOKED_UP)
    command = [sys.executable, str(tmp_path / "look.py"), str(tmp_path / "there")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0"


def test_no_program_is_begun_after_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "programs").write_text("{}\n{}\n")
    assert triton_cache.main([str(tmp_path / "programs"), str(tmp_path / "cache"), "--seconds", "-1"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["programs"], said["failed"], said["left"]) == (0, 0, 2)


@pytest.mark.skipif(INTERPRETED, reason="it starts the interpreter itself")
def test_programs_of_tests_are_noted_without_a_launch() -> None:
    """As for a GPU: for 132 multiprocessors, in as many cases as run there."""
    from benchmarks.gpu import programs

    found = programs.of_tests(["tests/backends/test_triton_kernels.py"])
    assert len(found) == len(set(found)) > 20
    lines = [json.loads(line) for line in found]
    assert {"norm_forward", "norm_backward"} <= {line["kernel"] for line in lines}
    with pytest.raises(RuntimeError, match=r"no test of tests/test_sampling.py launched a kernel"):
        programs.of_tests(["tests/test_sampling.py"])
