#!/usr/bin/env bash
# Train under Open MPI (pip install 'twolevel[mpi]' brings mpirun).   launch/mpirun.sh RANKS ARGUMENTS...
#   launch/mpirun.sh 4 --model wrn-28-10 --conv gc2l --groups 4 --data cifar10
# More machines: MPIRUN_FLAGS='--hostfile hosts' launch/mpirun.sh 16 ...
set -euo pipefail
ranks=${1:?usage: launch/mpirun.sh RANKS ARGUMENTS of twolevel train...}
shift

flags=(
    --oversubscribe # more ranks than cores is how a laptop simulates many processors
    --bind-to none  # mpirun would tie a rank to one core or two; twolevel divides the cores as threads
)
# mpirun refuses root, which is who one is in most containers.
if [ "$(id -u)" -eq 0 ]; then
    flags+=(--allow-run-as-root)
fi
# shellcheck disable=SC2206  # several flags in one variable
flags+=(${MPIRUN_FLAGS:-})

exec mpirun -n "$ranks" "${flags[@]}" python -m twolevel train "$@"
