"""The commands of a stage, one after the other: `python -m benchmarks.gpu.commands FILE`, FILE being a list of them.

All run, whatever the results of the others. The exit status is that of the first failure. An interrupt, which ends the
stage, goes to the running command: pytest then prints its results so far. No further command starts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def main(path: str) -> int:
    status = 0
    interrupted = []
    before = signal.signal(signal.SIGINT, lambda *given: interrupted.append(given))
    try:
        for arguments, variables in json.loads(Path(path).read_text()):
            if interrupted:
                break
            print("$", " ".join(arguments), flush=True)
            code = subprocess.run(arguments, env=os.environ | variables).returncode
            status = status or code
    finally:
        signal.signal(signal.SIGINT, before)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
