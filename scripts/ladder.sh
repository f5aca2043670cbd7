#!/usr/bin/env bash
# Climb the tests rung by rung, cheapest first; stop at the first that breaks.
#
#   scripts/ladder.sh [unit] [process] [gpu] [faults] [slurm] [serving]     default: all of them
set -euo pipefail
cd "$(dirname "$0")/.."

python=${VENV:-.venv}/bin/python
# Models are made on the spot; nothing may be downloaded, and the KV cache of a tiny model needs no more.
export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false

[[ $# -gt 0 ]] || set -- unit process gpu faults slurm serving
summary=()
for rung in "$@"; do
    printf '\n=== %s ===\n' "$rung"
    started=$SECONDS
    lanes=() # a vLLM has the machine for itself
    [[ $rung != unit && $rung != process ]] || lanes=(-n 2 --dist loadfile)
    if ! "$python" -m pytest "tests/$rung" "${lanes[@]}" --durations=5; then
        printf '\nladder: %s broke after %d s\n' "$rung" "$((SECONDS - started))" >&2
        exit 1
    fi
    summary+=("$(printf '%-8s %4d s' "$rung" "$((SECONDS - started))")")
done
printf '\nladder:\n'
printf '  %s\n' "${summary[@]}"
