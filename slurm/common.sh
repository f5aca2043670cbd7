# Sourced by the batch scripts beside it: settings with defaults, and the functions that start, wait and end.
# shellcheck shell=bash

: "${REPO:=$SLURM_SUBMIT_DIR}"         # this checkout; sbatch runs a copy of the script from elsewhere
: "${PYTHON:=$REPO/.venv/bin/python}"  # has the bridge, and vLLM where servers run
: "${MODEL:=}"                         # what the servers load
: "${VLLM_FLAGS:=}"                    # for vllm serve, split at blanks
: "${SERVE_FLAGS:=}"                   # for python -m bridge.launch serve, split at blanks
: "${LOGROOT:=$SLURM_SUBMIT_DIR/logs}" # on a file system that every node of the job sees
: "${NODES_PER_SERVER:=1}"             # nodes of one server; above 1 vLLM splits the model over them
: "${TRAINERS_PER_NODE:=}"             # trainer ranks on each node; empty: its GPUs, or 1 without any
: "${RENDEZVOUS_HOST:=}"               # where trainers reach a server; empty: found on each node
: "${MAX_REQUEUES:=0}"                 # how often this job may put itself back into the queue
: "${START_TIMEOUT:=1800}"             # seconds until all servers must be ready
: "${STOP_TIMEOUT:=180}"               # seconds between the warning and TERM; below what --signal leaves
: "${SHUTDOWN_TIMEOUT:=20}"            # seconds between TERM and KILL; below Slurm's KillWait (30)

EX_CONFIG=2    # the launcher's code for "trying again will not help"
EX_TEMPFAIL=75 # and for "trying again may help"
JOB_EPOCH=${SLURM_RESTART_COUNT:-0}
JOB_DIR=$LOGROOT/$SLURM_JOB_NAME-$SLURM_JOB_ID
# A directory for each attempt: a requeued job can never meet the servers or trainers that it had before.
ATTEMPT=$JOB_DIR/attempt-$JOB_EPOCH
mkdir -p "$ATTEMPT"
BRIDGE_STOP_FILE=$ATTEMPT/stop # asks the trainers to end (bridge.should_stop)
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
export PYTHON TRAINERS_PER_NODE RENDEZVOUS_HOST START_TIMEOUT SHUTDOWN_TIMEOUT SERVE_FLAGS
export JOB_EPOCH JOB_DIR BRIDGE_STOP_FILE

say() { printf '%s %s: %s\n' "$(date +%T)" "${SLURM_JOB_NAME:-job}" "$*"; }

# refuse WHY: the job cannot work as it was asked for.
refuse() {
    say "$*"
    exit "$EX_CONFIG"
}

# --- steps --------------------------------------------------------------------------------------------------

# Each step has all that the job has of its nodes. Threads are not bound: vLLM and torch see to that themselves.
step=(srun --kill-on-bad-exit=1 --cpu-bind=none)
servers=()     # pids of the steps, one for each server
logdirs=()     # of the servers
own_trainer=() # what the launcher of the only server starts beside it: -- and a command
trainer=       # pid of the trainers' step
read -ra vllm_flags <<<"$VLLM_FLAGS"
export -n VLLM_FLAGS # vLLM warns of variables that look like its own

# start_servers FIRST COUNT PEERS [srun flag ...]: servers on COUNT nodes, from node FIRST of the step's on.
# PEERS are hosts to be reached, separated by blanks; none, if the trainers run elsewhere.
start_servers() {
    local first=$1 count=$2 peers=$3 index
    shift 3
    [[ -n $MODEL ]] || refuse "MODEL is not set; as in: MODEL=Qwen/Qwen3-0.6B sbatch ..."
    ((NODES_PER_SERVER > 0 && count % NODES_PER_SERVER == 0)) ||
        refuse "$count node(s) to serve cannot be divided into servers of NODES_PER_SERVER=$NODES_PER_SERVER nodes"
    for ((index = 0; index < count / NODES_PER_SERVER; index++)); do
        logdirs+=("$ATTEMPT/server-$index")
        "${step[@]}" "$@" --relative=$((first + index * NODES_PER_SERVER)) --nodes="$NODES_PER_SERVER" \
            --ntasks="$NODES_PER_SERVER" --ntasks-per-node=1 \
            "$REPO/slurm/server.sh" "$index" "$ATTEMPT/server-$index" "$peers" "$MODEL" "${vllm_flags[@]}" \
            "${own_trainer[@]}" &
        servers+=($!)
    done
    BRIDGE_LOGDIRS=$(IFS=:; echo "${logdirs[*]}")
    export BRIDGE_LOGDIRS
}

# await_servers: until each says where it answers. Ends the job if one ends before, or the time is over.
await_servers() {
    local deadline=$((SECONDS + START_TIMEOUT)) missing logdir
    while :; do
        missing=()
        for logdir in "${logdirs[@]}"; do
            [[ -e $logdir/server.url ]] || missing+=("$logdir")
        done
        ((${#missing[@]})) || break
        if all_live "${servers[@]}" && ((!warned)); then
            if ((SECONDS > deadline)); then
                say "not ready after $START_TIMEOUT s: ${missing[*]}; is LOGROOT on a shared file system?"
                end_steps "$EX_TEMPFAIL"
            fi
            sleep 1
        elif ((warned)); then
            end_steps "$EX_TEMPFAIL"
        else
            wait_for "${servers[@]}"
            say "a server ended with $code before all were ready"
            end_steps "$code"
        fi
    done
    say "serving at $(cat "${logdirs[@]/%//server.url}" | tr '\n' ' ')"
}

# set_versions: numbers that trainers give go on above the last version that an earlier attempt has served, because
# labels must not stand for two things. Each worker has written down what it flipped to.
set_versions() {
    BRIDGE_VERSIONS_AFTER=$(cat "$JOB_DIR"/attempt-*/server-*/flips-rank*.jsonl 2>/dev/null |
        sed -nE 's/.*"version": *([0-9]+).*/\1/p' | sort -n | tail -n 1) || BRIDGE_VERSIONS_AFTER=0
    export BRIDGE_VERSIONS_AFTER
}

# start_trainers ENDPOINT HOSTS [srun flag ...] -- PROGRAM [argument ...]: on the first nodes of the step, which are
# HOSTS, separated by blanks. torchrun's agents meet at ENDPOINT, a port of the first.
start_trainers() {
    local endpoint=$1 flags=() nodes
    export TRAINER_HOSTS=$2
    nodes=$(wc -w <<<"$TRAINER_HOSTS")
    shift 2
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    ((${#servers[@]} == 0)) || set_versions
    "${step[@]}" "${flags[@]}" --relative=0 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
        "$REPO/slurm/trainer.sh" "$endpoint" "$@" &
    trainer=$!
}

# --- the warning --------------------------------------------------------------------------------------------

warned=0
urged=0
urge_at= # when steps are urged to end, on bash's clock
# One signal only. Slurm sends CONT within milliseconds of it, and a bash that traps both loses one of them.
on_warning() {
    ((!warned)) || return 0
    warned=1
    say "USR2: the time is nearly up, or the job is preempted; trainers are asked to end after their round"
    # A file, not a signal: a step's signals reach every process in it, data loaders and torchrun among them.
    : >"$BRIDGE_STOP_FILE"
    ((urged)) || urge_at=$((SECONDS + STOP_TIMEOUT))
}
trap on_warning USR2

# --- waiting and ending -------------------------------------------------------------------------------------

# urge: ask the tasks of all steps to end. Those that do not within three times SHUTDOWN_TIMEOUT are killed.
# Through Slurm: an srun that gets TERM kills its tasks at once.
urge() {
    if ((urged)); then
        say "steps did not end $((3 * SHUTDOWN_TIMEOUT)) s after TERM; killing them"
        scancel --signal=KILL "$SLURM_JOB_ID" || say "scancel failed; the time limit will end them"
        urge_at=
    else
        urged=1 urge_at=$((SECONDS + 3 * SHUTDOWN_TIMEOUT))
        scancel --signal=TERM "$SLURM_JOB_ID" || say "scancel failed; trying KILL next"
    fi
}

# all_live PID...: whether all of these still run.
all_live() {
    local pid
    for pid in "$@"; do
        kill -0 "$pid" 2>/dev/null || return 1
    done
}

# any_lives PID...: whether one of these still runs.
any_lives() {
    local pid
    for pid in "$@"; do
        kill -0 "$pid" 2>/dev/null && return
    done
    return 1
}

# wait_for PID...: until the first of them ends. Sets "code" to its exit code, and "ended" to its pid.
# It looks every second: "wait -n" does not return for a process that ended just before it was called.
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
        [[ -z $urge_at ]] || ((SECONDS < urge_at)) || urge
        sleep 1
    done
}

# end_steps CODE: end what still runs, and the job with CODE; with 75 if it failed and so had a server, which the
# trainers may have noticed first.
end_steps() {
    local result=$1 pid
    if any_lives ${trainer:+"$trainer"} "${servers[@]}"; then
        ((urged)) || urge
    fi
    for pid in ${trainer:+"$trainer"} "${servers[@]}"; do
        wait_for "$pid" # a server that was asked to stop exits with 0
        ((result == 0 || code != EX_TEMPFAIL)) || result=$EX_TEMPFAIL
    done
    finish "$result"
}

# work: until the trainers end, and with their exit code; or, failing, until a server does.
work() {
    wait_for "$trainer" "${servers[@]}"
    if [[ $ended != "$trainer" ]]; then
        say "a server ended before the trainers, with $code"
        ((code != 0)) || code=$EX_TEMPFAIL
    fi
    end_steps "$code"
}

# finish CODE: exit with it, or with 75 if the work was cut short by a warning; requeue where that may help.
finish() {
    local code=$1
    ((!warned || code == 0)) || code=$EX_TEMPFAIL
    say "exit $code; logs in $ATTEMPT"
    if ((code == EX_TEMPFAIL && JOB_EPOCH < MAX_REQUEUES)); then
        say "requeue $((JOB_EPOCH + 1)) of $MAX_REQUEUES"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
