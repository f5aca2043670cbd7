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
: "${SERVER_RETRIES:=3}"               # how often a server that ended is started again, each
: "${MAX_REQUEUES:=0}"                 # how often this job may put itself back into the queue
: "${START_TIMEOUT:=1800}"             # seconds until all servers must be ready
: "${STOP_TIMEOUT:=180}"               # seconds between the warning and TERM; below what --signal leaves
: "${SHUTDOWN_TIMEOUT:=20}"            # seconds between TERM and KILL; below Slurm's KillWait (30)
: "${BRIDGE_COMMIT:=available}"        # whether a version waits for "all" servers, or those that are there
: "${BRIDGE_CONNECT_TIMEOUT_S:=$START_TIMEOUT}" # seconds for which trainers wait, if none is there
: "${BRIDGE_VERSIONS_AFTER:=0}"       # versions lie above this one, and above all that were served before

EX_CONFIG=2    # the launcher's code for "trying again will not help"
EX_TEMPFAIL=75 # and for "trying again may help"
RETRIES_FORGIVEN_AFTER=3600 # seconds; a server that has run for so long has all its SERVER_RETRIES again
LONGEST_PAUSE=30            # seconds before a server is started again
JOB_EPOCH=${SLURM_RESTART_COUNT:-0}
# Of a job array, this task alone: the first one's id stands for all of them.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

say() { printf '%s %s: %s\n' "$(date +%T)" "${SLURM_JOB_NAME:-job}" "$*"; }

# refuse WHY: the job cannot work as it was asked for.
refuse() {
    say "$*"
    exit "$EX_CONFIG"
}

JOB_DIR=$LOGROOT/$SLURM_JOB_NAME-$SLURM_JOB_ID
[[ $JOB_DIR != *:* ]] || refuse "the job's directory would be $JOB_DIR, but a ':' separates servers in BRIDGE_LOGDIRS;" \
    "choose a LOGROOT and a --job-name without"
[[ $BRIDGE_VERSIONS_AFTER =~ ^[0-9]+$ ]] || refuse "BRIDGE_VERSIONS_AFTER is $BRIDGE_VERSIONS_AFTER, and must be a number"
# A directory for each attempt: a requeued job can never meet the servers or trainers that it had before.
ATTEMPT=$JOB_DIR/attempt-$JOB_EPOCH
mkdir -p "$ATTEMPT"
BRIDGE_STOP_FILE=$ATTEMPT/stop # asks the trainers to end (bridge.should_stop)
ln -sfn "$BRIDGE_STOP_FILE" "$JOB_DIR/stop" # of whichever attempt is the last, for trainers of another job
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"
export PYTHON TRAINERS_PER_NODE RENDEZVOUS_HOST START_TIMEOUT SHUTDOWN_TIMEOUT SERVE_FLAGS
export JOB_EPOCH JOB_DIR BRIDGE_STOP_FILE BRIDGE_COMMIT BRIDGE_CONNECT_TIMEOUT_S

# --- steps --------------------------------------------------------------------------------------------------

# Each step has all that the job has of its nodes. Threads are not bound: vLLM and torch see to that themselves.
step=(srun --cpu-bind=none)
servers=()     # pids of the steps, one for each server
logdirs=()     # of the servers
retries=()     # how often each server was started again
began=()       # when each was started last, on bash's clock
pauses=()      # until when each may still be in its pause before that, on bash's clock
served=()      # whether each has ever answered
server_step=() # what the steps of servers have in common
server_first=0 # the node of the step's on which the first server starts
server_hosts=  # of the trainers
own_trainer=() # what the launcher of the only server starts beside it: -- and a command
trainer=       # pid of the trainers' step
read -rd '' -a vllm_flags <<<"$VLLM_FLAGS" || true # of all lines
export -n VLLM_FLAGS # vLLM warns of variables that look like its own

# start_servers FIRST COUNT PEERS [srun flag ...]: servers on COUNT nodes, from node FIRST of the step's on.
# PEERS are hosts to be reached, separated by blanks; none, if the trainers run elsewhere.
start_servers() {
    local count=$2 index
    server_first=$1 server_hosts=$3
    shift 3
    [[ -n $MODEL ]] || refuse "MODEL is not set; as in: MODEL=Qwen/Qwen3-0.6B sbatch ..."
    ((NODES_PER_SERVER > 0 && count % NODES_PER_SERVER == 0)) ||
        refuse "$count node(s) to serve cannot be divided into servers of NODES_PER_SERVER=$NODES_PER_SERVER nodes"
    # A server's launchers tell one another that it ends, and clean up; the first to go must not kill the others.
    server_step=("$@" --nodes="$NODES_PER_SERVER" --ntasks="$NODES_PER_SERVER" --ntasks-per-node=1
        --kill-on-bad-exit=0 --wait=$((3 * SHUTDOWN_TIMEOUT)))
    for ((index = 0; index < count / NODES_PER_SERVER; index++)); do
        logdirs+=("$ATTEMPT/server-$index")
        retries+=(0)
        pauses+=(0)
        served+=(0)
        ln -sfn "$ATTEMPT/server-$index" "$JOB_DIR/server-$index" # of whichever attempt is the last
    done
    BRIDGE_LOGDIRS=$(IFS=:; echo "${logdirs[*]}")
    export BRIDGE_LOGDIRS
    # One that starts late or again gets the newest version from the others.
    SERVER_PEERS=
    ((NODES_PER_SERVER > 1 || ${#logdirs[@]} == 1)) || SERVER_PEERS=$BRIDGE_LOGDIRS
    export SERVER_PEERS
    for index in "${!logdirs[@]}"; do
        start_server "$index" 0
    done
}

# start_server INDEX PAUSE: one of them, or what takes its place, PAUSE seconds from now. The process that pauses becomes
# the step, so that this shell waits for all servers alike, and sees the warning and other deaths meanwhile.
start_server() {
    rm -f "${logdirs[$1]}/server.url" # of one that was killed: nobody answers there now
    began[$1]=$((SECONDS + $2))
    {
        while ((SECONDS < began[$1])); do sleep 1; done
        exec "${step[@]}" "${server_step[@]}" --relative=$((server_first + $1 * NODES_PER_SERVER)) \
            "$REPO/slurm/server.sh" "$1" "${logdirs[$1]}" "$server_hosts" "$MODEL" "${vllm_flags[@]}" \
            "${own_trainer[@]}"
    } &
    servers[$1]=$!
    pauses[$1]=$(($2 ? began[$1] + 1 : 0)) # one more: a step this young is not sure to get a signal through Slurm
}

# end_pauses: nothing is started again from now on.
end_pauses() {
    local index
    for index in "${!servers[@]}"; do
        if ((pauses[index] && SECONDS <= pauses[index])) && kill "${servers[index]}" 2>/dev/null; then
            say "server $index is not started again"
        fi
    done
}

# hopeless: whether trying server "index" again cannot help. One that has served was configured well: what stops it now
# (a file system that is away, memory that another job has taken) may pass.
hopeless() { ((code == EX_CONFIG && !served[index])); }

# start_again: after wait_for, that step of a server, if it failed and may do better. Sets "index" to the server's.
start_again() {
    local pause=0
    for index in "${!servers[@]}"; do
        [[ ${servers[index]} != "$ended" ]] || break
    done
    ((code != 0 && !warned && !urged)) && ! hopeless || return 1
    ((SECONDS - began[index] < RETRIES_FORGIVEN_AFTER)) || retries[index]=0
    ((retries[index] < SERVER_RETRIES)) || return 1
    retries[index]=$((retries[index] + 1))
    say "server $index ended with $code; starting it again (${retries[index]} of $SERVER_RETRIES)"
    if ((retries[index] > 1)); then # only what fails again must wait
        ((pause = retries[index] < 6 ? 1 << (retries[index] - 1) : LONGEST_PAUSE))
    fi
    start_server "$index" "$pause"
}

# await_servers: until each says where it answers. One that ends before, perhaps since another job took its port, is
# started again. Ends the job if that does not help, or the time is over.
await_servers() {
    local deadline=$((SECONDS + START_TIMEOUT)) missing index
    while missing=$(away) && [[ -n $missing ]]; do
        note_served
        if ((warned)); then
            end_steps "$EX_TEMPFAIL"
        elif all_live "${servers[@]}"; then
            if ((SECONDS > deadline)); then
                say "not ready after $START_TIMEOUT s: $missing; is LOGROOT on a shared file system?"
                end_steps "$EX_TEMPFAIL"
            fi
            sleep 1
        else
            wait_for "${servers[@]}"
            if ! start_again; then
                say "server $index ended with $code before all were ready"
                ((code != 0)) || code=$EX_TEMPFAIL
                end_steps "$code"
            fi
        fi
    done
    note_served
    say "serving at $(cat "${logdirs[@]/%//server.url}" | tr '\n' ' ')"
}

# note_served: which servers have answered by now.
note_served() {
    local index
    for index in "${!logdirs[@]}"; do
        [[ ! -e ${logdirs[index]}/server.url ]] || served[index]=1
    done
}

# away: the log directories of servers that do not answer now, separated by blanks.
away() {
    local logdir silent=()
    for logdir in "${logdirs[@]}"; do
        [[ -e $logdir/server.url ]] || silent+=("$logdir")
    done
    echo "${silent[*]}"
}

# survive: after wait_for, whether the job goes on although that step of a server has ended: it is started again, or
# others serve on. Not if it cannot work as configured, nor if all steps are being ended. Behind a warning nothing is
# started again, and trainers go on without servers: they save at the end of their round.
survive() {
    local index
    ! start_again || return 0
    hopeless || ((code != EX_CONFIG)) || code=$EX_TEMPFAIL
    ((!urged)) || return 1
    ((warned)) || ! hopeless || return 1
    unset "servers[index]"
    ((${#servers[@]} || (warned && trainer))) || return 1
    say "server $index ended with $code, and is given up; ${#servers[@]} serve on"
}

# served_versions: all that any attempt of this job has served, and of the jobs whose servers BRIDGE_LOGDIRS names. A
# server that was started by hand has no attempts, and goes on with the log in its directory.
served_versions() {
    local logdir elsewhere
    local -A places=(["$(readlink -f "$JOB_DIR")"]=1) # once each: servers of one job lie in the same
    IFS=: read -ra elsewhere <<<"${BRIDGE_LOGDIRS-}"
    for logdir in "${elsewhere[@]}"; do
        [[ -n $logdir ]] || continue
        # A link leads to the last attempt's, whose launcher may not have made it yet.
        if ! logdir=$(LC_ALL=C readlink -fv -- "$logdir" 2>&1); then
            [[ $logdir != *": No such file or directory" ]] || continue # its job has not begun
            echo "$logdir" >&2
            return 1
        fi
        if [[ $logdir =~ ^(.*)/attempt-[^/]*/[^/]*$ ]]; then
            places[${BASH_REMATCH[1]}]=1
        elif [[ -e $logdir ]]; then
            places[$logdir]=1
        fi
    done
    find "${!places[@]}" -mindepth 1 -maxdepth 3 -name 'flips-rank*.jsonl' -exec cat {} + \
        -o -type d ! -name 'attempt-*' ! -name 'server-*' -prune | sed -nE 's/.*"version": *([0-9]+).*/\1/p'
}

# set_versions: numbers that trainers give go on above the last version that an earlier attempt has served, because
# labels must not stand for two things. Each worker has written down what it flipped to. A log that cannot be read may
# hold the last one, so it ends the job; not at once, as the file system may only be away for a moment.
set_versions() {
    local try last
    for try in 1 2 3 4 5; do
        ! last=$({ served_versions && echo "$BRIDGE_VERSIONS_AFTER"; } | sort -n | tail -n 1) || break
        if ((try == 5)); then
            say "what earlier attempts have served could not be read from $JOB_DIR" \
                "${BRIDGE_LOGDIRS:+and beside $BRIDGE_LOGDIRS }for 20 s (see above), and no number may come twice"
            end_steps "$EX_TEMPFAIL"
        fi
        sleep $((2 * try))
    done
    export BRIDGE_VERSIONS_AFTER=$last
}

# start_trainers HOSTS [srun flag ...] -- PROGRAM [argument ...]: on the first nodes of the step, which are HOSTS,
# separated by blanks. This script runs on the first of them, where torchrun's agents meet at a port that is free now.
start_trainers() {
    local endpoint flags=() nodes
    export TRAINER_HOSTS=$1
    nodes=$(wc -w <<<"$TRAINER_HOSTS")
    shift
    while [[ $1 != -- ]]; do
        flags+=("$1")
        shift
    done
    shift
    set_versions
    endpoint=${TRAINER_HOSTS%% *}:$("$PYTHON" -m bridge.nodes port) || end_steps "$?"
    "${step[@]}" --kill-on-bad-exit=1 "${flags[@]}" --relative=0 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
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
    end_pauses
    ((urged)) || urge_at=$((SECONDS + STOP_TIMEOUT))
}
trap on_warning USR2

# --- waiting and ending -------------------------------------------------------------------------------------

# urge: ask the tasks of all steps to end. Those that do not within three times SHUTDOWN_TIMEOUT are killed.
# Through Slurm: an srun that gets TERM kills its tasks at once.
urge() {
    if ((urged)); then
        say "steps did not end $((3 * SHUTDOWN_TIMEOUT)) s after TERM; killing them"
        scancel --signal=KILL "$job" || say "scancel failed; the time limit will end them"
        urge_at=
    else
        urged=1 urge_at=$((SECONDS + 3 * SHUTDOWN_TIMEOUT))
        end_pauses # they are no steps yet
        scancel --signal=TERM "$job" || say "scancel failed; trying KILL next"
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

# work: until the trainers end, and with their exit code; or, failing, until the last server does.
work() {
    local missing
    while wait_for "$trainer" "${servers[@]}" && [[ $ended != "$trainer" ]] && survive; do :; done
    if [[ $ended != "$trainer" ]]; then
        say "a server ended before the trainers, with $code"
        ((code != 0 && code < 128)) || code=$EX_TEMPFAIL # somebody ended it, or a signal did
    elif ((code != 0)) && missing=$(away) && [[ -n $missing ]]; then
        say "the trainers ended with $code while these did not serve: $missing"
        code=$EX_TEMPFAIL
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
        requeue || say "it was not requeued"
    fi
    exit "$code"
}

# requeue: ask for it; the controller may be busy.
requeue() {
    local try
    for try in 1 2 3; do
        scontrol requeue "$job" && return
        ((try == 3)) || sleep $((2 * try))
    done
    return 1
}
