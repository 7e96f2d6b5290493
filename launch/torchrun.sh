#!/usr/bin/env bash
# Train on one machine.   launch/torchrun.sh RANKS ARGUMENTS...
#   launch/torchrun.sh 4 --model wrn-28-10 --conv gc2l --groups 4 --data cifar10
# After a rank was lost, start all again up to three times: RESTARTS=3 launch/torchrun.sh 4 ...
set -euo pipefail
ranks=${1:?usage: launch/torchrun.sh RANKS ARGUMENTS of twolevel train...}
shift

# torchrun would give every rank one thread. On GPUs the number hardly matters.
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# twolevel.torchrun is torchrun without its traceback where a rank has said why it ended.
# --standalone: rank 0 takes a free port, so two trainings on one machine do not meet. Restarted ranks go on from the
# newest checkpoint.
exec python -m twolevel.torchrun --standalone --nproc-per-node "$ranks" --max-restarts "${RESTARTS:-0}" \
    -m twolevel train "$@"
