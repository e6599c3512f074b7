#!/usr/bin/env bash
# Builds, tests and measures on a machine with a GPU, in parts of a few minutes and without a network.
#
#   benchmarks/gpu_suite.sh OUTPUT [PREVIOUS]
#
# OUTPUT    folder for the results, at most 8 small files: summary.txt, logs.tar.gz (logs, state, names of passed tests)
#           and one file of results for each kind of measurement
# PREVIOUS  the OUTPUT of an earlier call (may be the same folder): what it finished is not done again, as long as the
#           sources that it depends on are the same
#
# Stages run in the order of their worth, each for its share of the time at most; then those that their share cut off
# go on, in the same order, with the time that is left. A stage that fails is named and the others go on.
#
# Variables: MINUTES of one call (9); PYTHON (python3, which has to have torch; the package is taken from these sources,
# nothing is installed); WORKERS, processes of a run of tests (6, where pytest-xdist is there); GPU_SUITE_RETRY=1, stages
# that failed before are tried again; GPU_SUITE_DRY=1, only print what would be done.
# Exit status: 0; 1 if a stage failed; 2 if nothing could be begun.
set -uo pipefail

say() { printf '%s\n' "$*"; }
die() {
    printf 'gpu_suite.sh: %s\n' "$*" >&2
    exit 2
}

[ $# -ge 1 ] && [ $# -le 2 ] || die "got $# arguments, expected OUTPUT [PREVIOUS]"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
OUTPUT=$(realpath -m -- "$1") || exit 2
PREVIOUS=${2:+$(realpath -m -- "$2")}
PYTHON=${PYTHON:-python3}
MINUTES=${MINUTES:-9}
WORKERS=${WORKERS:-6}
DRY=${GPU_SUITE_DRY:-}
[[ $MINUTES =~ ^[0-9]+([.][0-9]+)?$ ]] || die "MINUTES is '$MINUTES', expected a number"
TOTAL=$(awk -v m="$MINUTES" 'BEGIN { printf "%d", m * 60 }')
[ "$TOTAL" -ge 1 ] || die "MINUTES is '$MINUTES', expected more than a second"
if [ -n "$PREVIOUS" ] && [ ! -f "$PREVIOUS/logs.tar.gz" ]; then
    die "PREVIOUS is '$PREVIOUS', which has no logs.tar.gz of an earlier call"
fi
command -v "$PYTHON" >/dev/null || die "PYTHON is '$PYTHON', and that is no program"
cd "$ROOT" || exit 2

[ -n "$DRY" ] || mkdir -p "$OUTPUT" || die "cannot make the folder '$OUTPUT'"
WORK=$(mktemp -d) || exit 2
trap 'rm -rf "$WORK"' EXIT
KEPT=$WORK/kept # goes into logs.tar.gz
FOUND=$WORK/results
STATE=$KEPT/state.tsv # stage, status, exit status, seconds, hash of the sources
mkdir -p "$KEPT" "$FOUND"
RESULTS=(host.json ops.json step.json growth.json quality.json tune.json)

# What a stage's result depends on: the sources, and for tests the tests.
hash_of() {
    find "$@" -type f \( -name '*.py' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h' -o -name '*.json' \) \
        -not -path '*/__pycache__/*' -not -path '*/results/*' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16
}
OF_TESTS=$(hash_of csrc red_kernels tests)
OF_MEASURING=$(hash_of csrc red_kernels benchmarks)
OF_TUNING=$(hash_of csrc red_kernels)

if [ -n "$PREVIOUS" ]; then
    tar -xzf "$PREVIOUS/logs.tar.gz" -C "$KEPT" || die "cannot read '$PREVIOUS/logs.tar.gz'"
fi
touch "$STATE"

# Everything runs from these sources; the tests and Triton keep what they compile in one place.
export PYTHONPATH=$ROOT:$ROOT/tests${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
SANITIZER=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" || true)
PARALLEL=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then PARALLEL=(-n "$WORKERS"); fi

# Stage, its share of the time in percent, and the hash that it depends on. Order is worth.
STAGES=(
    "environment 8 always"
    "build 40 always"
    "tests-cuda 24 $OF_TESTS"
    "tests-triton 24 $OF_TESTS"
    "tests-gpu 12 $OF_TESTS"
    "memcheck 12 $OF_TESTS"
    "racecheck 12 $OF_TESTS"
    "initcheck 12 $OF_TESTS"
    "host 12 $OF_MEASURING"
    "ops 34 $OF_MEASURING"
    "step 34 $OF_MEASURING"
    "tune 20 $OF_TUNING"
    "growth 20 $OF_MEASURING"
    "remaining 20 $OF_MEASURING"
)
# The file of results that a stage makes, if any.
file_of() {
    case $1 in
        host | ops | step | growth | tune) say "$1.json" ;;
        remaining) say quality.json ;;
        *) say "" ;;
    esac
}

# state STAGE FIELD: of what is known of a stage (2 status, 3 exit status, 4 seconds, 5 hash)
state() { awk -F '\t' -v stage="$1" -v field="$2" '$1 == stage { print $field }' "$STATE"; }
set_state() {
    awk -F '\t' -v stage="$1" '$1 != stage' "$STATE" >"$STATE.new"
    printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$STATE.new"
    mv "$STATE.new" "$STATE"
}
left() { say $((TOTAL - SECONDS)); }

# What is of other sources is begun anew; its results stay behind, for figures of two versions are no comparison.
for line in "${STAGES[@]}"; do
    read -r stage _ hash <<<"$line"
    file=$(file_of "$stage")
    if [ "$hash" = always ]; then
        set_state "$stage" waiting - 0 "$hash"
    elif [ "$(state "$stage" 5)" != "$hash" ]; then
        [ -z "$(state "$stage" 5)" ] || say "$stage: PREVIOUS is of other sources; begun anew"
        rm -f "$KEPT/$stage.passed" "$KEPT/$stage.log"
        set_state "$stage" waiting - 0 "$hash"
    else
        if [ -n "$file" ] && [ -f "$PREVIOUS/$file" ]; then cp "$PREVIOUS/$file" "$FOUND/"; fi
        if [ "$(state "$stage" 2)" = left-out ]; then set_state "$stage" waiting - 0 "$hash"; fi
        if [ "$(state "$stage" 2)" = failed ] && [ "${GPU_SUITE_RETRY:-}" = 1 ]; then
            set_state "$stage" waiting - "$(state "$stage" 4)" "$hash"
        fi
    fi
done

complete() { # whether a file of results has all of its cases
    "$PYTHON" -c 'import json, sys; sys.exit(not json.load(open(sys.argv[1])).get("complete"))' "$FOUND/$1" 2>/dev/null
}

# One run of a stage, for some seconds; measurements end by themselves a little earlier.
stage_environment() {
    "$PYTHON" -c 'import sys, torch; print(sys.version); print("torch", torch.__version__, "CUDA", torch.version.cuda)
if not torch.cuda.is_available(): sys.exit("torch sees no GPU here")
print(torch.cuda.get_device_properties(0))' || return 1
    "$PYTHON" -c 'import importlib.metadata as m, importlib.util
for name in ("transformers", "triton", "rich", "pytest", "pytest-xdist", "hypothesis", "peft", "liger-kernel", "quack-kernels",
             "flash-attn", "apex", "accelerate", "datasets", "trl", "bitsandbytes", "torchao", "matplotlib", "pandas"):
    try: print(name, m.version(name))
    except m.PackageNotFoundError: print(name, "is missing: what needs it is left out")'
    nvidia-smi || true
    nvidia-smi -q -d CLOCK,POWER,TEMPERATURE || true
}
stage_build() {
    local failed=0
    "$PYTHON" csrc/build.py cuda || failed=1
    "$PYTHON" csrc/build.py cpu || failed=1
    "$PYTHON" -m red_kernels info || failed=1
    return $failed
}
tests() { # STAGE ON ARGUMENTS...; pytest's own status 5, no tests left, is a success
    local stage=$1 on=$2
    shift 2
    [ -n "$on" ] && export RED_KERNELS_TEST_ON=$on
    PASSED_TESTS=$KEPT/$stage.passed "$PYTHON" -m pytest -p benchmarks.tools.passed_tests -p no:cacheprovider \
        --continue-on-collection-errors "$@"
    local status=$?
    [ $status = 5 ] && status=0
    return $status
}
stage_tests_cuda() { tests tests-cuda cuda "${PARALLEL[@]}" tests; }
stage_tests_triton() { tests tests-triton triton "${PARALLEL[@]}" tests; }
stage_tests_gpu() {
    tests tests-gpu "" tests/backends/test_gpu.py tests/backends/test_tune.py tests/integrations/test_stacks_liger.py tests/integrations/test_stacks_bases.py \
        tests/docs/test_docs_training.py
}
sanitize() {
    RED_KERNELS_TEST_ON=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool "$1" --target-processes all \
        --error-exitcode 99 "$PYTHON" -m pytest -p no:cacheprovider tests/backends/test_sanitized.py
}
stage_memcheck() { sanitize memcheck; }
stage_racecheck() { sanitize racecheck; }
stage_initcheck() { sanitize initcheck; }
bench() { # JOB SECONDS
    local minutes
    minutes=$(awk -v s="$2" 'BEGIN { printf "%.2f", (s > 40 ? s - 20 : s / 2) / 60 }')
    "$PYTHON" -m red_kernels bench "$1" --output "$FOUND" --resume --minutes "$minutes" --device cuda
}
stage_host() { "$PYTHON" -m benchmarks.tools.host_cost --seconds 3 --output "$FOUND/host.json"; }
stage_ops() { bench ops "$1"; }
stage_step() { bench step "$1"; }
stage_tune() { "$PYTHON" -m red_kernels bench --tune --output "$FOUND/tune.json"; }
stage_growth() { bench growth "$1"; }
stage_remaining() { bench quality "$1"; }

left_out() { # why a stage cannot be here at all, or nothing
    case $1 in
        memcheck | racecheck | initcheck)
            [ -n "$SANITIZER" ] || say "compute-sanitizer was not found"
            ;;
    esac
}

limit_of() { # SHARE of the time, but no more than is left
    local share=$((TOTAL * $1 / 100)) rest
    rest=$(left)
    [ "$share" -ge 1 ] || share=1
    say $((share < rest ? share : rest))
}

pack() { # after each stage: what comes next may be the end of the machine's time
    summary >"$OUTPUT/.summary.tmp" && mv "$OUTPUT/.summary.tmp" "$OUTPUT/summary.txt"
    tar -czf "$OUTPUT/.logs.tmp" -C "$KEPT" . && mv "$OUTPUT/.logs.tmp" "$OUTPUT/logs.tar.gz"
    local file
    for file in "${RESULTS[@]}"; do
        [ ! -f "$FOUND/$file" ] || { cp "$FOUND/$file" "$OUTPUT/.$file.tmp" && mv "$OUTPUT/.$file.tmp" "$OUTPUT/$file"; }
    done
}

summary() {
    local line stage note passed
    printf '%-14s %-10s %7s %9s  %s\n' stage status exit seconds note
    for line in "${STAGES[@]}"; do
        read -r stage _ _ <<<"$line"
        note=$(left_out "$stage")
        case $stage in
            tests-*)
                passed=0
                [ ! -f "$KEPT/$stage.passed" ] || passed=$(wc -l <"$KEPT/$stage.passed")
                note="$passed tests passed or skipped so far"
                ;;
        esac
        if [ "$(state "$stage" 2)" = failed ]; then note="$note; see $stage.log in logs.tar.gz"; fi
        printf '%-14s %-10s %7s %9s  %s\n' "$stage" "$(state "$stage" 2)" "$(state "$stage" 3)" "$(state "$stage" 4)" "${note#; }"
    done
}

run_stage() { # STAGE HASH SECONDS
    local stage=$1 hash=$2 limit=$3 begin=$SECONDS status file result log=$KEPT/$1.log
    say "--- $stage, at most $limit s"
    # The whole process group gets the signal: what is finished by then is in files already.
    export -f tests sanitize bench "stage_${stage//-/_}"
    export PYTHON FOUND KEPT SANITIZER
    timeout --kill-after=15 "$limit" bash -c "PARALLEL=(${PARALLEL[*]}); stage_${stage//-/_} $limit" \
        >"$log.part" 2>&1 </dev/null
    status=$?
    cat "$log.part" >>"$log"
    tail -n 6 "$log.part" | cut -c1-300
    rm -f "$log.part"
    file=$(file_of "$stage")
    result="done"
    if [ $status = 124 ] || [ $status = 137 ]; then
        result="cut"
    elif [ $status != 0 ]; then
        result=failed
    elif [[ $stage =~ ^(ops|step|growth|remaining)$ ]] && ! complete "$file"; then
        result="cut" # it ended by itself when its time was up
    fi
    set_state "$stage" $result $status $(($(state "$stage" 4) + SECONDS - begin)) "$hash"
    pack
}

if [ -n "$DRY" ]; then
    say "at most $TOTAL s in $ROOT, results into $OUTPUT"
    for line in "${STAGES[@]}"; do
        read -r stage share hash <<<"$line"
        why=$(left_out "$stage")
        printf '%-14s %-8s at most %4d s%s\n' "$stage" "$(state "$stage" 2)" "$(limit_of "$share")" "${why:+; left out: $why}"
    done
    exit 0
fi

part_of_rest() { # STAGE SHARE: its share of what is left, among the stages from it on that were cut off
    local line stage share hash found=0 total=0
    for line in "${STAGES[@]}"; do
        read -r stage share hash <<<"$line"
        [ "$stage" = "$1" ] && found=1
        if [ $found = 1 ] && [ "$(state "$stage" 2)" = cut ]; then total=$((total + share)); fi
    done
    # In percent of all the time, as limit_of takes it; rounded up, so that nothing is left by the last.
    say $(((100 * $2 * $(left) + total * TOTAL - 1) / (total * TOTAL)))
}

# First what was not begun, each within its share; then what was cut off, for as long as there is time.
for turn in waiting cut; do
    for line in "${STAGES[@]}"; do
        read -r stage share hash <<<"$line"
        [ "$(state "$stage" 2)" = $turn ] || continue
        if [ -n "$(left_out "$stage")" ]; then
            set_state "$stage" "left-out" - 0 "$hash"
            continue
        fi
        [ $turn = waiting ] || share=$(part_of_rest "$stage" "$share")
        limit=$(limit_of "$share")
        [ "$limit" -ge 1 ] || break
        run_stage "$stage" "$hash" "$limit"
        if [ "$stage" = environment ] && [ "$(state environment 2)" = failed ]; then
            pack
            die "no GPU that torch can use; see above"
        fi
    done
done
pack
say
cat "$OUTPUT/summary.txt"
if grep -qP '\t(waiting|cut)\t' "$STATE"; then
    say "Not all is done: call again with PREVIOUS=$OUTPUT as the second argument."
fi
! grep -qP '^[^\t]+\tfailed\t' "$STATE"
