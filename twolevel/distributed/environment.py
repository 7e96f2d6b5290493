"""This process among the ranks: the process group that they make, and the device of each."""

import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# torch.distributed documents them, and its type hints leave them out.
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from twolevel.distributed import nccl, simulation
from twolevel.distributed.meeting import did_not_meet, first_line, meet, prefer_loopback
from twolevel.distributed.spares import Spares, wait_for_the_end
from twolevel.errors import LostRank, UserError, unknown
from twolevel.host import usable_cores
from twolevel.launchers import Ranks, discover
from twolevel.settings import DEVICES


@dataclass(frozen=True)
class World:
    """This process among the ranks of the default process group, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str
    launcher: str
    owns_group: bool = field(default=False, repr=False, compare=False)
    """Whether `start` made the group for this world, so that `stop` ends it."""
    store: Store | None = field(default=None, repr=False, compare=False)
    """Where these ranks can leave each other word; None for a group that existed before."""
    spares: Spares | None = field(default=None, repr=False, compare=False)
    """The ranks that came and do not work, on rank 0 if there are any."""

    @property
    def simulated(self) -> bool:
        """Whether this process is its only rank, whatever its size."""
        return self.backend == simulation.FAKE

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"store": None, "spares": None}  # connections of this process


def start(device: str = "auto", timeout_s: float = 600, workers: Callable[[int], int] | None = None) -> World:
    """Join the default process group, which is made here unless it exists; every rank must call it.

    Args:
        device: "cpu", "cuda" (this rank's own GPU), or "auto": cuda where there is one.
        timeout_s: how long the ranks wait for each other, here and in every later collective.
        workers: how many of so many ranks work, the first ones; all unless given. The others, the spares, wait here
            until rank 0 calls `stop`.

    NCCL carries CUDA tensors if every rank has a GPU to itself. Ranks that share one use Gloo, and rank 0
    warns, unless NCCL can share it (`twolevel.distributed.nccl`). CPU tensors always use Gloo. Ranks that
    share processor cores divide them evenly as threads, unless OMP_NUM_THREADS says how many. An existing
    group is taken as it is, with its threads and timeout.

    Raises:
        UserError: an environment as in `discover`; a device that is not there, on every rank if it
            is missing on one; ranks that disagree on `workers`; GPUs that NCCL cannot connect.
        LostRank: the ranks do not meet in time.
        SpareEnded: this rank is a spare, and the others have ended; or as in `wait_for_the_end`.
    """
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if not timeout_s > 0:
        raise UserError(f"timeout_s={timeout_s} is not positive; use a number of seconds, like 600")
    ranks = discover()
    if dist.is_initialized():
        return _existing_world(ranks, device, workers)
    if ranks.one_machine:
        prefer_loopback()
    report = _probe(ranks, device, workers)
    try:
        store, reports = meet(ranks, report, timedelta(seconds=timeout_s))
        size = _agreed_workers(reports)
        if ranks.rank < size:
            own_device = _device_of(reports[ranks.rank])
            backend = _choose_backend(reports[:size], ranks.rank)
            with nccl.own_timeout():
                dist.init_process_group(
                    backend,
                    store=PrefixStore("group", store),
                    rank=ranks.rank,
                    world_size=size,
                    timeout=timedelta(seconds=timeout_s),
                    pg_options=nccl.options(backend),
                    device_id=nccl.bound_device(backend, own_device),
                )
    except UserError:
        raise
    except dist.DistBackendError as error:
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} cannot connect {own_device} to the others "
            f"({first_line(error)}); NCCL_DEBUG=INFO says why, device cpu goes without"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise LostRank(did_not_meet(ranks, timeout_s, error)) from error
    number = ranks.world_size - size
    if ranks.rank >= size:
        wait_for_the_end(PrefixStore("spares", store), number)
    mine, working = reports[ranks.rank], reports[:size]
    _divide_cores(mine, working)
    local_size = sum(r["host"] == mine["host"] for r in working) if number else ranks.local_world_size
    return World(
        rank=ranks.rank,
        size=size,
        local_rank=ranks.local_rank,
        local_size=local_size,
        device=own_device,
        backend=backend,
        launcher=ranks.launcher,
        owns_group=True,
        store=PrefixStore("word", store),
        spares=Spares(PrefixStore("spares", store), number) if number and ranks.rank == 0 else None,
    )


def simulate(size: int, device: str = "auto") -> World:
    """This process as rank 0 of `size` ranks, of which there are no others: see `twolevel.distributed.simulation`.

    `device` is as in `start`. The device and its cores are this rank's alone.

    Raises UserError where a launcher has started others, a process group exists, or the device is not there.
    """
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    ranks = discover()
    if ranks.world_size > 1:
        raise UserError(
            f"simulate={size} takes one process, and {ranks.launcher} has started {ranks.world_size}; "
            "start it without a launcher"
        )
    if dist.is_initialized():
        raise UserError(f"simulate={size} makes a process group of its own, and one exists; end that before")
    report = _probe(ranks, device, None)
    if report["error"] is not None:
        raise UserError(report["error"])
    own_device = _device_of(report)
    simulation.begin(size)
    _divide_cores(report, [report])
    return World(0, size, 0, 1, own_device, simulation.FAKE, ranks.launcher, owns_group=True)


def stop(world: World) -> None:
    """Leave the default process group if `start` made it for this `world`, and release its spares.

    The ranks can start again under torchrun and MPI. Elsewhere MASTER_PORT must change first: a
    rank could still reach the store that rank 0 is about to close.
    """
    if world.owns_group and dist.is_initialized():
        if world.spares is not None:
            world.spares.release()
        dist.destroy_process_group()


# ---- which device and backend --------------------------------------------------------------------


def _probe(ranks: Ranks, device: str, workers: Callable[[int], int] | None) -> dict:
    """What the others must know of this rank: its GPU, its processor cores, and how many ranks it would have work."""
    report = {
        "host": socket.gethostname(),
        "cores": usable_cores(),
        "gpu": None,
        "index": None,
        "shares_gpus": nccl.shares_gpus(),
        "workers": ranks.world_size,
        "error": None,
    }
    if workers is not None:
        try:
            report["workers"] = workers(ranks.world_size)
        except UserError as error:
            report["error"] = str(error)
    if device != "cpu" and torch.cuda.is_available():
        # The launcher may show each rank its own GPU alone, or there are fewer GPUs than ranks.
        report["index"] = ranks.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(report["index"])
        report["gpu"] = str(torch.cuda.get_device_properties(report["index"]).uuid)
    elif device == "cuda":
        report["error"] = f"device=cuda but torch {torch.__version__} finds no CUDA GPU; use cpu"
    return report


def _divide_cores(mine: dict, working: list[dict]) -> None:
    """Give this rank's threads its share of the cores that it shares with others, unless the user has said how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        sharing = sum((r["host"], r["cores"]) == (mine["host"], mine["cores"]) for r in working)
        torch.set_num_threads(max(1, len(mine["cores"]) // sharing))


def _device_of(report: dict) -> torch.device:
    return torch.device("cpu" if report["gpu"] is None else f"cuda:{report['index']}")


def _agreed_workers(reports: list[dict]) -> int:
    for rank, report in enumerate(reports):
        if report["workers"] != reports[0]["workers"]:
            raise UserError(
                f"ranks were started with different settings: by those of rank {rank} {report['workers']} of "
                f"{len(reports)} ranks work, by those of rank 0 {reports[0]['workers']}; start every rank with the "
                "same arguments"
            )
    return reports[0]["workers"]


def _choose_backend(reports: list[dict], rank: int) -> str:
    gpus = [report["gpu"] for report in reports]
    if gpus == [None] * len(gpus):
        return "gloo"
    if None in gpus:
        without, having = gpus.index(None), next(r for r, gpu in enumerate(gpus) if gpu)
        raise UserError(
            f"device=auto finds a GPU on rank {having} but none on rank {without}; use device cpu, "
            "or machines that all have GPUs"
        )
    if len(gpus) == 1:
        return "gloo"  # nothing to carry
    distinct = len(set(gpus))
    fits = distinct == len(gpus) or all(report["shares_gpus"] for report in reports)
    if fits and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    if rank == 0:
        why = "this torch has no NCCL"
        if not fits:
            why = f"{len(gpus)} ranks share {distinct} GPUs, and {nccl.ONE_GPU_EACH}"
        warnings.warn(f"{why}: Gloo carries the CUDA tensors, by way of the CPU", stacklevel=3)
    return "gloo"


def _existing_world(ranks: Ranks, device: str, workers: Callable[[int], int] | None) -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    if workers is not None and workers(size) != size:
        raise UserError(
            f"{workers(size)} of {size} ranks can work, and a process group of all {size} exists; make none before, or "
            f"start {workers(size)} ranks"
        )
    if (rank, size) != (ranks.rank, ranks.world_size):
        # Made without a launcher, as torch.multiprocessing does: all ranks are on this machine.
        ranks = Ranks(rank, size, rank, size, "none")
    backend = dist.get_backend_config()
    index = None
    if device != "cpu":
        if torch.cuda.is_available() and "cuda" in backend:
            index = ranks.local_rank % torch.cuda.device_count()
            torch.cuda.set_device(index)
        elif device == "cuda":
            raise UserError(
                f"device=cuda but the process group that exists serves {backend}, and torch finds "
                f"{torch.cuda.device_count()} GPUs; use cpu"
            )
    chosen = torch.device("cpu" if index is None else f"cuda:{index}")
    local = (ranks.local_rank, ranks.local_world_size)
    return World(rank, size, *local, chosen, dist.get_backend(), ranks.launcher)
