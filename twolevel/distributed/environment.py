"""This process among the ranks: the process group that they make, and the device of each."""

import json
import os
import socket
import warnings
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# torch.distributed documents them, and its type hints leave them out.
from torch.distributed import HashStore, PrefixStore, Store, TCPStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from twolevel.distributed import nccl
from twolevel.errors import UserError, unknown
from twolevel.host import usable_cores
from twolevel.launchers import LOOPBACK, Ranks, discover, port_of
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


def start(device: str = "auto", timeout_s: float = 600) -> World:
    """Join the default process group, which is made here unless it exists; every rank must call it.

    Args:
        device: "cpu", "cuda" (this rank's own GPU), or "auto": cuda where there is one.
        timeout_s: how long the ranks wait for each other, here and in every later collective.

    NCCL carries CUDA tensors if every rank has a GPU to itself. Ranks that share one use Gloo, and rank 0
    warns, unless NCCL can share it (`twolevel.distributed.nccl`). CPU tensors always use Gloo. Ranks that
    share processor cores divide them evenly as threads, unless OMP_NUM_THREADS says how many. An existing
    group is taken as it is, with its threads and timeout.

    Raises:
        UserError: an environment as in `discover`; a device that is not there, on every rank if it
            is missing on one; ranks that do not meet in time; GPUs that NCCL cannot connect.
    """
    if device not in DEVICES:
        raise unknown("device", device, DEVICES)
    if not timeout_s > 0:
        raise UserError(f"timeout_s={timeout_s} is not positive; use a number of seconds, like 600")
    ranks = discover()
    if dist.is_initialized():
        return _existing_world(ranks, device)
    if ranks.one_machine:
        _prefer_loopback()
    report = _probe(ranks, device)
    try:
        store = _meet(ranks, timedelta(seconds=timeout_s))
        # A store can outlive a group that was stopped; the next group must not read its keys.
        generation = (store.add("arrivals", 1) - 1) // ranks.world_size
        store = PrefixStore(f"generation {generation}", store)
        reports = _exchange(PrefixStore("report", store), ranks, report)
        backend = _choose_backend(reports, ranks.rank)
        own_device = _device_of(reports[ranks.rank])
        with nccl.own_timeout():
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timedelta(seconds=timeout_s),
                pg_options=nccl.options(backend),
                device_id=nccl.bound_device(backend, own_device),
            )
    except UserError:
        raise
    except dist.DistBackendError as error:
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} cannot connect {own_device} to the others "
            f"({_first_line(error)}); NCCL_DEBUG=INFO says why, device cpu goes without"
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(_did_not_meet(ranks, timeout_s, error)) from error
    mine = reports[ranks.rank]
    if "OMP_NUM_THREADS" not in os.environ:
        sharing = sum((r["host"], r["cores"]) == (mine["host"], mine["cores"]) for r in reports)
        torch.set_num_threads(max(1, len(mine["cores"]) // sharing))
    return World(
        rank=ranks.rank,
        size=ranks.world_size,
        local_rank=ranks.local_rank,
        local_size=ranks.local_world_size,
        device=own_device,
        backend=backend,
        launcher=ranks.launcher,
        owns_group=True,
        store=PrefixStore("word", store),
    )


def stop(world: World) -> None:
    """Leave the default process group if `start` made it for this `world`.

    The ranks can start again under torchrun and MPI. Elsewhere MASTER_PORT must change first: a
    rank could still reach the store that rank 0 is about to close.
    """
    if world.owns_group and dist.is_initialized():
        dist.destroy_process_group()


# ---- how the ranks meet --------------------------------------------------------------------------


def _meet(ranks: Ranks, timeout: timedelta) -> Store:
    """A store that all ranks read and write."""
    if ranks.world_size == 1:
        return HashStore()
    if ranks.launcher == "torchrun":
        url = "env://"  # torch asks there whether torchrun's agent holds the store already
    else:
        if ranks.address is None or ranks.port is None:
            try:
                from mpi4py import MPI  # an extra; and the import calls MPI_Init
            except (ImportError, RuntimeError):  # RuntimeError: mpi4py is here, its MPI is not
                ranks = _without_mpi4py(ranks)
            else:
                return _meet_through_mpi(ranks, MPI.COMM_WORLD, timeout)
        assert ranks.address is not None
        host = f"[{ranks.address}]" if ":" in ranks.address else ranks.address
        url = f"tcp://{host}:{ranks.port}"
    store, _, _ = next(rendezvous(url, ranks.rank, ranks.world_size, timeout=timeout))
    store.set_timeout(timeout)
    return store


def _meet_through_mpi(ranks: Ranks, comm: Any, timeout: timedelta) -> Store:
    """Rank 0 opens a store at a port that is free, and tells the others where."""
    if comm.Get_size() != ranks.world_size:
        raise UserError(
            f"mpirun started {ranks.world_size} ranks but mpi4py sees {comm.Get_size()}: they are "
            "of different MPIs; use one for both, or set MASTER_ADDR and MASTER_PORT for every rank"
        )
    host = ranks.address or (LOOPBACK if ranks.one_machine else socket.gethostname())
    store = error = None
    if ranks.rank == 0:
        try:
            store = TCPStore(host, ranks.port or 0, None, True, timeout, wait_for_workers=False)
        except RuntimeError as e:  # the others wait for word, good or bad
            error = _first_line(e)
    host, port, error = comm.bcast((host, store and store.port, error), root=0)
    if error is not None:
        raise RuntimeError(error)
    return store or TCPStore(host, port, None, False, timeout)


def _without_mpi4py(ranks: Ranks) -> Ranks:
    address, port = ranks.address, ranks.port
    if ranks.one_machine:
        address = address or LOOPBACK
        port = port or (port_of(ranks.job) if ranks.job else None)
    if address is None or port is None:
        raise UserError(
            f"{ranks.world_size} MPI ranks cannot agree where to meet without mpi4py; "
            "pip install twolevel[mpi], or set MASTER_ADDR and MASTER_PORT for every rank"
        )
    return replace(ranks, address=address, port=port)


def _prefer_loopback() -> None:
    """Gloo over the loopback interface, unless GLOO_SOCKET_IFNAME says otherwise.

    Left alone, Gloo listens at the address that the machine's own name resolves to. On many a
    laptop, container and CI machine that name does not resolve, or only after a time-out.
    """
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])


def _did_not_meet(ranks: Ranks, timeout_s: float, error: Exception) -> str:
    where = f"{ranks.address or 'the address of rank 0'}, port {ranks.port or 'any'}"
    return (
        f"rank {ranks.rank} of {ranks.world_size} did not meet the others at {where}, "
        f"timeout_s={timeout_s:g} ({_first_line(error)}); check that all {ranks.world_size} ranks "
        "were started, that MASTER_ADDR is rank 0's machine and MASTER_PORT a free port of it, and "
        "that GLOO_SOCKET_IFNAME, if set, is the network between the machines"
    )


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0].rstrip(".")


# ---- which device and backend --------------------------------------------------------------------


def _probe(ranks: Ranks, device: str) -> dict:
    """What the others must know of this rank: its GPU, and the processor cores it may use."""
    report = {
        "host": socket.gethostname(),
        "cores": usable_cores(),
        "gpu": None,
        "index": None,
        "shares_gpus": nccl.shares_gpus(),
        "error": None,
    }
    if device != "cpu" and torch.cuda.is_available():
        # The launcher may show each rank its own GPU alone, or there are fewer GPUs than ranks.
        report["index"] = ranks.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(report["index"])
        report["gpu"] = str(torch.cuda.get_device_properties(report["index"]).uuid)
    elif device == "cuda":
        report["error"] = f"device=cuda but torch {torch.__version__} finds no CUDA GPU; use cpu"
    return report


def _device_of(report: dict) -> torch.device:
    return torch.device("cpu" if report["gpu"] is None else f"cuda:{report['index']}")


def _exchange(store: Store, ranks: Ranks, report: dict) -> list[dict]:
    """Every rank's report, in the order of ranks; raises on all ranks if one reports an error."""
    store.set(str(ranks.rank), json.dumps(report))
    reports = [json.loads(store.get(str(rank))) for rank in range(ranks.world_size)]
    # Rank 0 may hold the store, and may be about to fail: it stays until all have read.
    if store.add("readers", 1) == ranks.world_size:
        store.set("all have read", "")
    if ranks.rank == 0:
        store.get("all have read")
    failed = [rank for rank, report in enumerate(reports) if report["error"]]
    if failed:
        first = failed[0]
        prefix = "" if first == ranks.rank else f"rank {first}: "
        raise UserError(prefix + reports[first]["error"])
    return reports


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


def _existing_world(ranks: Ranks, device: str) -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
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
