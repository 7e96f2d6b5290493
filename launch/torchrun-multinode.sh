#!/usr/bin/env bash
# Train on several machines: run the same line on each.
#   launch/torchrun-multinode.sh NODES RANKS_PER_NODE HOST[:PORT] ARGUMENTS...
#   launch/torchrun-multinode.sh 2 8 node01 --model wrn-28-10 --conv gc2l --groups 16 --data cifar10
# NODES may be a range: with 1:4 the run begins when no more machines come for a while, and starts again from its newest
# checkpoint, up to RESTARTS times (3 unless set), whenever a rank or a machine is lost; one that comes does not count.
#   launch/torchrun-multinode.sh 1:4 8 node01 --model wrn-28-10 --conv gc2l --groups 16 --data cifar10 --mesh auto
# HOST is one of the machines, by a name or address that all of them reach; PORT is 29400 unless given.
# If HOST itself is lost all end: start the line again everywhere, with --resume.
set -euo pipefail
usage="usage: launch/torchrun-multinode.sh NODES RANKS_PER_NODE HOST[:PORT] ARGUMENTS of twolevel train..."
nodes=${1:?$usage}
ranks=${2:?$usage}
host=${3:?$usage}
shift 3

# torchrun would give every rank one thread. On GPUs the number hardly matters.
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# twolevel.torchrun is torchrun without its traceback where a rank has said why it ended.
# c10d: the machines number themselves, so the line is the same on all. Set JOB, again on all, when two
# trainings share a HOST and PORT.
case $nodes in
*:*) restarts=${RESTARTS:-3} ;;
*) restarts=${RESTARTS:-0} ;;
esac
exec python -m twolevel.torchrun --max-restarts "$restarts" --nnodes "$nodes" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$host" --rdzv-id "${JOB:-twolevel}" \
    -m twolevel train "$@"
