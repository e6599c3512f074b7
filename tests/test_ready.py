"""A ready process is what a new interpreter is, but for the packages that it has imported."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import ready
from places import TESTS

SHOW = """
import os, sys
here = [name for name in sys.modules if name.partition(".")[0] in ("red_kernels", "pytest", "ready")]
print(sys.argv, os.getcwd(), os.environ.get("RED_KERNELS_X"), "torch" in sys.modules, here, sys.path[0], sep="|")
print("said", file=sys.stderr)
sys.exit(7)
"""


def test_it_is_as_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SHOW)
    (tmp_path / "module.py").write_text(SHOW)
    script = str(tmp_path / "script.py")
    for words, argument, first in (
        ([script, "a b", "c"], script, str(tmp_path)),
        (["-m", "module", "a b", "c"], str(tmp_path / "module.py"), str(tmp_path)),
        (["-c", SHOW, "a b", "c"], "-c", ""),
    ):
        done = ready.run(words, folder=tmp_path, RED_KERNELS_X="y")
        expected = ([argument, "a b", "c"], tmp_path, "y", True, [], first)
        assert done.stdout == "|".join(map(str, expected)) + "\n"
        assert (done.stderr, done.returncode) == ("said\n", 7)
    code = "import red_kernels; print(red_kernels.__file__)"
    assert ready.run(["-c", code]).stdout == f"{TESTS.parent / 'red_kernels/__init__.py'}\n"


def test_how_it_ends() -> None:
    assert ready.run(["-c", "pass"]).returncode == 0
    failed = ready.run(["-c", "raise LookupError('no')"])
    assert failed.returncode == 1
    assert failed.stderr.endswith("LookupError: no\n")
    waiting = ready.Process(["-c", "import signal; print('there', flush=True); signal.pause()"])
    assert waiting.poll() is None
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait() == -signal.SIGTERM
    waiting.kill()  # is nothing any more
    assert waiting.returncode == -signal.SIGTERM


def test_one_that_fails_ends_its_group() -> None:
    code = "import os, signal; os.environ['RANK'] == '1' and exit(5); signal.pause()"
    assert ready.run_group(["-c", code], 3).returncode == 5


def test_the_processes_of_a_group_order_sets_in_two_ways() -> None:
    code = "print({*map(str, range(100))})"
    one, other = (ready.Process(["-c", code], number=number).communicate()[0] for number in (0, 1))
    assert one != other
    assert eval(one) == eval(other)


def test_variables_that_packages_read() -> None:
    with pytest.raises(ValueError, match="changes: got HF_HOME, which packages may read when they are imported"):
        ready.run(["-c", "pass"], HF_HOME="x")
