"""What each rank of a job does: `python -m benchmarks.scaling.rank JOB.json`, started by `launch.run`.

Every case is a training step; they take turns, and ranks meet before each step. A case that one rank does alone
is done by rank 0 while the others wait, so what the machine does meanwhile falls on all cases. A turn's time is
that of the slowest rank, by the clock.

With `memory` there is one case, a few steps are taken, and what each rank's memory came to is read instead. On GPUs
a turn ends when the rank's GPU is done, and memory is that of the GPU.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from benchmarks import report
from benchmarks.collectives import by_kind, counting, sent_by_ring
from benchmarks.exchange import timed
from benchmarks.links import INTERFACE
from benchmarks.scaling.cases import Case
from benchmarks.strategies import ALONE, Training, build, mesh_of
from twolevel.distributed import MeshAxis
from twolevel.distributed.agreement import together
from twolevel.distributed.environment import start, stop
from twolevel.errors import UserError
from twolevel.host import process_memory

TIMEOUT_S = 300
MEMORY_STEPS = 3


def build_all(cases: list[Case], device: torch.device) -> tuple[dict[str, Training], dict[str, str]]:
    """Training steps by name of case; what cannot run, with why."""
    meshes, built, skipped = {}, {}, {}
    for case in cases:
        key = (case.strategy, case.crosses)
        if key not in meshes:
            meshes[key] = mesh_of(case.strategy, crosses=case.crosses, device=device.type)
        try:
            with together():
                built[case.name] = build(
                    case.strategy,
                    case.model,
                    conv=case.conv,
                    groups=case.groups,
                    batch=case.batch,
                    mesh=meshes[key],
                    exchange=case.exchange,
                    device=str(device),
                )
        except UserError as error:
            skipped[case.name] = str(error)
    return built, skipped


def times(job: dict, device: torch.device) -> dict:
    """By name of case: milliseconds of a step; of those that send something, what they send."""
    cases = [Case(**case) for case in job["cases"]]
    meeting = MeshAxis(dist.group.WORLD)
    built, skipped = build_all(cases, device)
    own = {case.name for case in cases if case.strategy != ALONE or dist.get_rank() == 0}
    calls = {name: _finished(step, device) if name in own else _wait for name, step in built.items()}
    seconds = timed(calls, job["turns"], meeting)
    found = {name: report.summary(of_case) for name, of_case in seconds.items()}
    for case in cases:
        if case.name in built and case.strategy != ALONE and case.crosses:
            found[case.name] |= traffic(built[case.name], meeting)
            found[case.name]["held_bytes"] = every_rank(built[case.name].held_bytes())
    return {"cases": found, "skipped": skipped}


def traffic(training: Training, meeting: MeshAxis) -> dict:
    """What one step sends: the collectives that were called here, and on a link what its interface carried."""
    word = torch.zeros(1)
    before = wire_bytes()
    with counting() as seen:
        sums = training()
    meeting.all_reduce_(word)  # until the other end has all of it, too
    after = wire_bytes()
    assert sums.isfinite().all(), sums
    kinds = by_kind(seen)
    crossed = {name: after[name] - before[name] for name in after}
    return {
        "collectives": kinds,
        "sent_by_ring_bytes": sent_by_ring(kinds, meeting.ranks),
        "wire_bytes": crossed or None,
    }


def wire_bytes() -> dict[str, int]:
    """Bytes that this node's end of an emulated link has sent and received, headers and all; none elsewhere."""
    lines = Path("/proc/self/net/dev").read_text().splitlines() if sys.platform == "linux" else []
    for line in lines:
        name, _, numbers = line.partition(":")
        if name.strip() == INTERFACE:
            fields = numbers.split()
            return {"received": int(fields[0]), "sent": int(fields[8])}
    return {}


def every_rank(own: dict) -> list[dict]:
    """What every rank says, in the order of ranks."""
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


def memory(job: dict, device: torch.device) -> dict:
    """By rank: bytes in use before anything was built and at the peak of a few steps."""
    (case,) = [Case(**case) for case in job["cases"]]
    before = in_use("VmRSS", device)
    built, skipped = build_all([case], device)
    if skipped:
        return {"skipped": skipped}
    for _ in range(MEMORY_STEPS):
        built[case.name]()
    return {"ranks": every_rank({"before_bytes": before, "peak_bytes": in_use("VmHWM", device)})}


def in_use(field: str, device: torch.device) -> int:
    """VmRSS, the resident bytes of this process, or VmHWM, the most there have been; of tensors on a GPU."""
    if device.type == "cuda":
        return {"VmRSS": torch.cuda.memory_allocated, "VmHWM": torch.cuda.max_memory_allocated}[field](device)
    # Not getrusage, whose maximum is handed down by the process that started this one, where the system says more.
    found = process_memory(field)
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _finished(step: Training, device: torch.device) -> Callable[[], object]:
    """The step, and all of it done."""
    if device.type == "cpu":
        return step

    def call() -> None:
        step()
        torch.cuda.synchronize(device)

    return call


def _wait() -> None:
    """What the other ranks do while rank 0 takes a step alone: the next thing is a meeting of all."""


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    world = start(job["device"], timeout_s=TIMEOUT_S)
    torch.set_num_threads(job["threads"])
    report.steady_memory()
    found = (memory if job["memory"] else times)(job, world.device)
    if world.rank == 0:
        Path(job["found"]).write_text(json.dumps(found))
    stop(world)
    leave()


def leave() -> NoReturn:
    """End this process without taking Python apart.

    A thread of Gloo's may still hold the tensors of the last collective, and letting go of them after Python has
    ended its threads aborts the process: one run in four, where ranks leave right after a collective.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None:
        mpi.Finalize()  # mpirun takes a rank that leaves without it for one that failed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
