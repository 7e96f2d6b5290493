"""What the system, a container and a scheduler allow this rank."""

import os
import resource
import time
from collections.abc import Iterator

import torch

from twolevel.distributed.environment import World
from twolevel.training.config import TrainConfig
from twolevel.training.doctor import cgroup
from twolevel.training.doctor.cores import decoding
from twolevel.training.doctor.finding import Finding, count, ok, problem, size, warning

# Open files of a rank: libraries, logs and shards; connections to each other rank of each process group; pipes and
# shared tensors of a data worker.
FILES, FILES_A_RANK, FILES_A_WORKER = 256, 8, 32
LEAST_FILES = 1024
# Processes and threads of a rank beside its data workers and those that compute: of Gloo, NCCL, the store, the saver.
THREADS = 32
# Of torch and its libraries, in each rank and data worker, before there is a network.
RANK_BYTES, WORKER_BYTES = 2**29, 2**28
# Below this InfiniBand cannot register NCCL's buffers; clusters set it to unlimited.
LOCKED = 2**26
SOON_SECONDS = 600


def check(world: World, config: TrainConfig) -> Iterator[Finding]:
    """Of one rank and the ranks beside it on its machine."""
    workers = decoding(config)
    yield _files(world, workers)
    yield _processes(world, workers)
    if world.device.type == "cuda" and world.size > 1:
        yield _locked()
    yield _memory(world, workers)
    yield from _cores(world)
    yield from _time_left()


def _soft(which: int) -> float:
    soft, _ = resource.getrlimit(which)
    return float("inf") if soft == resource.RLIM_INFINITY else soft


def _count(number: float) -> str:
    return "unlimited" if number == float("inf") else f"{number:,.0f}"


def _files(world: World, workers: int) -> Finding:
    needed = max(LEAST_FILES, FILES + FILES_A_RANK * world.size + FILES_A_WORKER * workers)
    allowed = _soft(resource.RLIMIT_NOFILE)
    found = f"{_count(allowed)} for each process, about {needed:,} needed"
    if allowed >= needed:
        return ok("open files", found)
    return warning(
        "open files",
        found,
        f"run ulimit -n {needed} first (in a container docker run --ulimit nofile={needed})",
    )


def _processes(world: World, workers: int) -> Finding:
    needed = world.local_size * (THREADS + torch.get_num_threads() + workers * 4)
    allowed = _soft(resource.RLIMIT_NPROC)
    found = f"{_count(allowed)} for this user, about {needed:,} needed here"
    if allowed >= 2 * needed:  # the user runs other things too
        return ok("processes", found)
    return warning("processes", found, f"run ulimit -u {4 * needed} first")


def _locked() -> Finding:
    allowed = _soft(resource.RLIMIT_MEMLOCK)
    found = f"{'unlimited' if allowed == float('inf') else size(allowed)} may be locked"
    if allowed >= LOCKED:
        return ok("locked memory", found)
    advice = "NCCL over InfiniBand needs more: run ulimit -l unlimited first (docker run --ulimit memlock=-1)"
    return warning("locked memory", found, advice)


def _memory(world: World, workers: int) -> Finding:
    found = cgroup.memory()
    if found is None:
        return ok("memory limit", "none of a container or a job")
    needed = world.local_size * (RANK_BYTES + workers * WORKER_BYTES)
    text = f"{size(found.limit)}, of which {size(found.used)} are used"
    # This process has its share already.
    if found.limit - found.used + world.local_size * RANK_BYTES >= needed and found.used < 0.9 * found.limit:
        return ok("memory limit", text)
    return warning(
        "memory limit",
        f"{text}, and {count(world.local_size, 'rank')} here take {size(needed)} before there is a network",
        "what uses more is killed without a word: give the job more memory, or use fewer --workers",
    )


def _cores(world: World) -> Iterator[Finding]:
    quota = cgroup.cores()
    threads = world.local_size * torch.get_num_threads()
    if quota is None:
        return
    found = f"{quota:.1f} cores of time for {count(threads, 'thread')} of the ranks here"
    if threads <= max(1.0, quota) or world.device.type == "cuda":
        yield ok("cpu quota", found)
        return
    each = max(1, int(quota) // world.local_size)
    advice = f"threads are halted when it is used up: set OMP_NUM_THREADS={each}, or raise the job's limit"
    yield warning("cpu quota", found, advice)


def _time_left() -> Iterator[Finding]:
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    if not end.isdigit():
        return
    left = int(end) - time.time()
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(int(end)))
    found = (
        f"the Slurm job ends at {when}, in {max(0, left) // 3600:.0f} h {max(0, left) % 3600 // 60:.0f} min"
    )
    if left <= 0:
        yield problem("time limit", found, "submit a new job; --resume goes on")
    elif left < SOON_SECONDS:
        yield warning("time limit", found, "submit with a longer --time; --resume goes on in another job")
    else:
        yield ok("time limit", found)
