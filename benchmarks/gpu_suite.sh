#!/usr/bin/env bash
# Tests and measures on a machine with a GPU for which there are few minutes: two calls of at most 330 s.
#
#   benchmarks/gpu_suite.sh OUTPUT              the first call, behind `make gpu-kit` on a machine without a GPU
#   benchmarks/gpu_suite.sh OUTPUT PREVIOUS     the second, with the OUTPUT of the first (may be the same folder)
#   benchmarks/gpu_suite.sh OUTPUT --dry        only what the next call would do
#   benchmarks/gpu_suite.sh OUTPUT --rehearse   the same stages on a CPU, with tiny sizes
#
# PYTHON is the program that has torch (python3). All options: --help. The stages: benchmarks/gpu/plan.py.
set -uo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
PYTHON=${PYTHON:-python3}
command -v "$PYTHON" >/dev/null || {
    printf "gpu_suite: PYTHON is '%s', and that is no program\n" "$PYTHON" >&2
    exit 2
}
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -m benchmarks.gpu.runner "$@"
