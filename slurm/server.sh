#!/usr/bin/env bash
# A server's launcher on this node, with its daemon and vLLM. Started by srun from the batch scripts, with their settings;
# in a step of several nodes, the launchers on them make one server.
#
#   server.sh INDEX LOGDIR PEERS MODEL [vllm serve flag ...] [-- TRAINER ...]
#
# INDEX counts the job's servers, PEERS are hosts whose trainers must reach this one ("" if nobody knows yet).
set -euo pipefail
index=$1 logdir=$2 peers=$3
shift 3

# shellcheck disable=SC2086 # a word for each host
address=$("$PYTHON" -m bridge.nodes address $peers)
# Offset 0 is torchrun's.
port=$("$PYTHON" -m bridge.nodes port $((index + 1)))
read -rd '' -a own_flags <<<"$SERVE_FLAGS" || true # of all lines
unset BRIDGE_LOGDIRS # of all servers; the launcher tells its own trainer which one it has

# Once a version was served, by this attempt or an earlier, MODEL's own weights answer nobody.
checkpoint=never
if ((!${BRIDGE_VERSIONS_AFTER:-0})); then
    found=0
    grep -rqE --include='flips-rank*.jsonl' '"version": *[1-9]' "$JOB_DIR" || found=$?
    ((found != 1)) || checkpoint=first # 2: a log cannot be read, which may hold the last one
fi

# A --port among the flags comes later, and wins; and so does what SERVE_FLAGS says.
exec "$PYTHON" -m bridge.launch serve --logdir "$logdir" --rendezvous-host "${RENDEZVOUS_HOST:-${address% *}}" \
    --start-timeout "$START_TIMEOUT" --shutdown-timeout "$SHUTDOWN_TIMEOUT" --peers "$SERVER_PEERS" \
    --serve-checkpoint "$checkpoint" "${own_flags[@]}" \
    -- "$1" --port "$port" "${@:2}"
