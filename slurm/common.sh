# Sourced by the batch scripts beside it: settings with defaults, the two functions that wait and end.
# shellcheck shell=bash

: "${REPO:=$SLURM_SUBMIT_DIR}"             # this checkout; sbatch runs a copy of the script from elsewhere
: "${PYTHON:=$REPO/.venv/bin/python}"      # has the bridge, and vLLM where the server runs
: "${MODEL:?set MODEL to a model name or directory, as in: MODEL=Qwen/Qwen3-0.6B sbatch ...}"
: "${LOGROOT:=$SLURM_SUBMIT_DIR/logs}"     # on a file system that every node of the job sees
: "${MAX_REQUEUES:=0}"                     # how often this job may put itself back into the queue
: "${START_TIMEOUT:=1800}"                 # seconds until the server must be ready
: "${SHUTDOWN_TIMEOUT:=20}"                # seconds; below Slurm's KillWait (30), so that scancel is orderly

EX_TEMPFAIL=75 # the launcher's code for "trying again may help"

# A directory per attempt: a requeued job can never read the mapping of the server it had before.
BRIDGE_LOGDIR=$LOGROOT/$SLURM_JOB_NAME-$SLURM_JOB_ID/attempt-${SLURM_RESTART_COUNT:-0}
mkdir -p "$BRIDGE_LOGDIR"
export BRIDGE_LOGDIR PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '%s %s: %s\n' "$(date +%T)" "${SLURM_JOB_NAME:-job}" "$*"; }

# One signal only. Slurm sends CONT within milliseconds of it, and a bash that traps both loses one of them.
warned=0
on_warning() {
    warned=1
    say "USR1: the time is up or the job is preempted; ending the steps in order"
    # TERM to the tasks, not to this shell: the launcher aborts the round, tells the trainer, cleans up.
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap on_warning USR1

# wait_for PID...: until the first of them ends. Sets "code" to its exit code, and "ended" to its pid.
# A trapped signal ends "wait" early, so it is asked again as long as all of them live.
wait_for() {
    local pid
    while :; do
        for pid in "$@"; do
            if ! kill -0 "$pid" 2>/dev/null; then
                # shellcheck disable=SC2034 # read by the scripts
                code=0 ended=$pid
                wait "$pid" || code=$?
                return
            fi
        done
        wait -n "$@" 2>/dev/null || true
    done
}

# finish CODE: exit with it, or with 75 after a warning; put the job back into the queue where that may help.
finish() {
    local code=$1 restarts=${SLURM_RESTART_COUNT:-0}
    ((warned == 0)) || code=$EX_TEMPFAIL
    say "exit $code; logs in $BRIDGE_LOGDIR"
    if ((code == EX_TEMPFAIL && restarts < MAX_REQUEUES)); then
        say "requeue $((restarts + 1)) of $MAX_REQUEUES"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
