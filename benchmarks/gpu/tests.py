"""pytest for a stage that may be interrupted: `python -m benchmarks.gpu.tests ARGUMENTS`, with PASSED_TESTS=FILE.

Tests that passed before are skipped; no remaining test is no failure.
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys

NONE_LEFT = 5  # pytest's exit status


def main(arguments: list[str]) -> int:
    if importlib.util.find_spec("xdist") is None and "-n" in arguments:
        place = arguments.index("-n")
        arguments = arguments[:place] + arguments[place + 2 :]
        print("without pytest-xdist: one process")
    plugins = ("benchmarks.tools.passed_tests", "no:cacheprovider")
    more = [word for plugin in plugins for word in ("-p", plugin)]
    command = [sys.executable, "-m", "pytest", *more, "--continue-on-collection-errors", *arguments]
    before = signal.signal(signal.SIGINT, lambda *given: None)  # pytest's handler, which then prints the results so far
    try:
        code = subprocess.run(command).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    return 0 if code == NONE_LEFT else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
