#!/usr/bin/env bash
# Climb the tests rung by rung, cheapest first; stop at the first that breaks.
#
#   scripts/ladder.sh [unit] [process] [gpu] [faults] [slurm] [serving]
#
# By default all of them, and "faults" and "slurm" beside "serving": all of these mostly wait for one thread that
# imports vLLM.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${VENV:-.venv}/bin/python
# Models are made on the spot; nothing may be downloaded, and the KV cache of a tiny model needs no more.
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false

summary=$(mktemp) beside=$(mktemp)
trap 'rm -f "$summary" "$beside"' EXIT

climb() {
    local rung started
    for rung in "$@"; do
        printf '\n=== %s ===\n' "$rung"
        started=$SECONDS
        if ! "$python" -m pytest "tests/$rung" --durations=5; then
            printf '\nladder: %s broke after %d s\n' "$rung" "$((SECONDS - started))" >&2
            return 1
        fi
        printf '  %-8s %4d s\n' "$rung" "$((SECONDS - started))" >>"$summary"
    done
}

if (($# > 0)); then
    climb "$@" || exit 1
else
    climb unit process gpu || exit 1
    set -m # each lane a process group of its own, to be ended as one
    # A function in a condition ignores "set -e"; climb returns by itself at the first that breaks.
    (climb faults slurm) >"$beside" 2>&1 &
    others=$!
    (climb serving) &
    served=$!
    # Asked to end: by SIGINT, for which pytest takes its fixtures down.
    trap 'kill -INT -- -"$others" -"$served" 2>/dev/null; wait; cat "$beside"; exit 143' TERM INT HUP
    broke=0
    wait "$served" || broke=$?
    wait "$others" || broke=$?
    cat "$beside"
    ((broke == 0)) || exit 1
fi
printf '\nladder:\n'
cat "$summary"
