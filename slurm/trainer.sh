#!/usr/bin/env bash
# The trainer ranks of this node, under torchrun. Started by srun from the batch scripts, with their settings.
#
#   trainer.sh ENDPOINT PROGRAM [argument ...]
#
# ENDPOINT is where torchrun's agents meet: HOST:PORT of the first of TRAINER_HOSTS. If that is the only one it may be
# "", and a port is looked for here, right before it is used.
set -euo pipefail
endpoint=$1
shift
read -ra hosts <<<"$TRAINER_HOSTS"
[[ -n $endpoint ]] || endpoint=${hosts[0]}:$("$PYTHON" -m bridge.nodes port)

found=$("$PYTHON" -m bridge.nodes address "${hosts[@]}")
read -r address interface <<<"$found"
# Gloo takes the host's own name, which is the loopback on many. NCCL looks for itself, or at NCCL_SOCKET_IFNAME.
[[ -z $interface ]] || export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}"

first=$((SLURM_PROCID == 0))
exec "$PYTHON" -m torch.distributed.run --nnodes="${#hosts[@]}" \
    --nproc-per-node="${TRAINERS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.$JOB_EPOCH" --rdzv-endpoint="$endpoint" \
    --rdzv-conf="is_host=$first" --local-addr="$address" "$@"
