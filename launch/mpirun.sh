#!/usr/bin/env bash
# Train under Open MPI (pip install 'twolevel[mpi]' brings mpirun).   launch/mpirun.sh RANKS ARGUMENTS...
#   launch/mpirun.sh 4 --model wrn-28-10 --conv gc2l --groups 4 --data cifar10
# After a rank was lost, start again up to three times: RESTARTS=3 launch/mpirun.sh 4 ...
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
asked=no
ask() {
    asked=yes
    kill -USR1 "$mpirun" 2>/dev/null || true
}
stop() {
    ask
    trap 'kill -TERM "$mpirun" 2>/dev/null || true' INT TERM
}
set -m
trap stop INT TERM
trap ask USR1

# Statuses: 0 is finished, 2 an error that would come again, 130 stopped. 75 is a rank that lost another one, and above
# 128 mpirun tells which signal killed a rank: then the run goes on from its checkpoint, RESTARTS times at most.
left=${RESTARTS:-0}
resume=()
while true; do
    mpirun -n "$ranks" "${flags[@]}" python -m twolevel train ${resume[@]+"${resume[@]}"} "$@" </dev/null &
    mpirun=$!
    # A signal ends the wait, not mpirun.
    while kill -0 "$mpirun" 2>/dev/null; do
        wait "$mpirun" || true
    done
    status=0
    wait "$mpirun" || status=$?
    lost=no
    if [ "$status" -eq 75 ] || { [ "$status" -gt 128 ] && [ "$status" -ne 130 ] && [ "$status" -ne 141 ]; }; then
        lost=yes
    fi
    if [ "$lost" = no ] || [ "$asked" = yes ] || [ "$left" -le 0 ]; then
        exit "$status"
    fi
    left=$((left - 1))
    resume=(--resume)
    echo "launch/mpirun.sh: a rank was lost (status $status); going on with --resume, $left restarts left" >&2
done
