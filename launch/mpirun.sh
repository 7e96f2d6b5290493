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

# Asked to end, mpirun kills its ranks within half a second; SIGUSR1 it passes on, and the run stops with a checkpoint.
# So mpirun gets a process group of its own, which Ctrl-C does not reach. A second Ctrl-C ends it at once.
stop() {
    kill -USR1 "$mpirun" 2>/dev/null || true
    trap 'kill -TERM "$mpirun" 2>/dev/null || true' INT TERM
}
set -m
mpirun -n "$ranks" "${flags[@]}" python -m twolevel train "$@" </dev/null &
mpirun=$!
trap stop INT TERM
trap 'kill -USR1 "$mpirun" 2>/dev/null || true' USR1
while true; do
    status=0
    wait "$mpirun" || status=$?
    # A signal ends the wait, not mpirun.
    kill -0 "$mpirun" 2>/dev/null || exit "$status"
done
