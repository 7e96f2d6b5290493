"""What torchrun, MPI or Slurm says of this process: its rank, and where rank 0 can be met (imports no torch)."""

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from twolevel.errors import UserError

# What each launcher calls rank, world size, local rank and local world size.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH and Intel MPI
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
_RANKS = tuple(names[0] for names in (_TORCHRUN, _OPEN_MPI, _PMI, _SLURM))

# Ports that a job's name is mapped to: unprivileged, and below 32768, where Linux starts to give
# ports to outgoing connections.
_PORTS = range(10_000, 30_000)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ranks:
    """What the launcher says of this process, and where rank 0 can be met."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    """One of "torchrun", "mpi", "slurm" and "none"."""
    address: str | None = None
    port: int | None = None
    """Where rank 0 listens. Under MPI either may be None: rank 0 then tells the others through MPI."""
    job: str | None = None
    """What MPI calls this run, the same on every rank."""

    @property
    def one_machine(self) -> bool:
        return self.local_world_size == self.world_size


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks that `environ` describes: by torchrun, then MPI, then Slurm; one rank without them.

    Only what `srun` sets counts as Slurm, so plain python in an sbatch script is one process.
    MASTER_ADDR and MASTER_PORT are honoured whoever launched; an empty variable counts as unset.

    Raises:
        UserError: a variable is missing among those that are set, or has an impossible value.
    """
    if any(environ.get(name) for name in _TORCHRUN[:3]):
        return _torchrun(environ)
    if any(environ.get(name) for name in _OPEN_MPI[:2]):
        return _mpi(environ, _OPEN_MPI)
    srun = all(environ.get(name) for name in _SLURM[:2])
    # `srun --mpi=pmi2` sets PMI_RANK as well, to srun's own numbers: no MPI is needed then. Under
    # MPICH's mpiexec in a Slurm job, srun's numbers are those of its helpers, one on each node.
    same = srun and all(environ.get(_PMI[i]) == environ[_SLURM[i]] for i in (0, 1))
    if any(environ.get(name) for name in _PMI[:2]) and not same:
        return _mpi(environ, _PMI)
    if srun:
        return _slurm(environ)
    return Ranks(0, 1, 0, 1, "none")


def rank_of(environ: Mapping[str, str] = os.environ) -> int | None:
    """This process's rank, for messages: None without a launcher; never an error, which a message may be about."""
    try:
        ranks = discover(environ)
    except UserError:
        return next((int(environ[name]) for name in _RANKS if environ.get(name, "").isdigit()), None)
    return None if ranks.launcher == "none" else ranks.rank


def _torchrun(environ: Mapping[str, str]) -> Ranks:
    _require(environ, (*_TORCHRUN[:3], "MASTER_ADDR", "MASTER_PORT"), "torchrun")
    address, port = _master(environ)
    assert address is not None  # required above
    # Some that imitate torchrun leave LOCAL_WORLD_SIZE out; a loopback address settles it.
    if not environ.get("LOCAL_WORLD_SIZE") and re.fullmatch(r"localhost|127\..*|::1", address):
        environ = {**environ, "LOCAL_WORLD_SIZE": environ["WORLD_SIZE"]}
    _require(environ, _TORCHRUN, "torchrun")
    return _ranks(environ, _TORCHRUN, "torchrun", address, port)


def _mpi(environ: Mapping[str, str], names: tuple[str, ...]) -> Ranks:
    _require(environ, names, "mpirun")
    # How Open MPI 5 and 4 name a job, the same on every rank. MPICH has no such name.
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
    return _ranks(environ, names, "mpi", *_master(environ), job)


def _slurm(environ: Mapping[str, str]) -> Ranks:
    nodes = ("SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
    _require(environ, (*_SLURM, *nodes), "srun")
    counts = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    node = _integer(environ, "SLURM_NODEID")
    if node >= len(counts):
        per_node = environ["SLURM_STEP_TASKS_PER_NODE"]
        raise UserError(f"SLURM_NODEID={node} is not one of SLURM_STEP_TASKS_PER_NODE={per_node!r}")
    local = {**environ, "SLURM_STEP_TASKS_PER_NODE": str(counts[node])}
    address, port = _master(environ)
    if address is None:
        address = LOOPBACK if len(counts) == 1 else first_host(environ["SLURM_STEP_NODELIST"])
    port = port or port_of(f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}")
    return _ranks(local, _SLURM, "slurm", address, port)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "node[003-005,9],b1" is node003, node004, ...

    Raises:
        UserError: `nodes` is not such a list.
    """
    part = r"(?:[^\[\],\s]|\[\d[-,\d]*\])+"
    if not (match := re.fullmatch(f"({part})(?:,{part})*", nodes)):
        raise UserError(f"{nodes!r} is no list of Slurm nodes, like 'node[01-04],b1'; set MASTER_ADDR")
    return re.sub(r"\[(\d+)[-,\d]*\]", r"\1", match[1])


def _tasks_per_node(text: str) -> list[int]:
    """ "2(x3),1" is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not of the form '2(x3),1'")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _ranks(
    environ: Mapping[str, str],
    names: tuple[str, ...],
    launcher: str,
    address: str | None,
    port: int | None,
    job: str | None = None,
) -> Ranks:
    rank, world, local_rank, local_world = (_integer(environ, name) for name in names)
    for index, size, (index_name, size_name) in (
        (rank, world, names[:2]),
        (local_rank, local_world, names[2:]),
    ):
        if index >= size:
            raise UserError(f"{index_name}={index} is not below {size_name}={size}; ranks count from 0")
    if local_world > world:
        raise UserError(f"{names[3]}={local_world} is more than {names[1]}={world}, the number of ranks")
    return Ranks(rank, world, local_rank, local_world, launcher, address, port, job)


def _require(environ: Mapping[str, str], names: tuple[str, ...], launcher: str) -> None:
    missing = [name for name in names if not environ.get(name)]
    if missing:
        present = next(f"{name}={environ[name]}" for name in names if environ.get(name))
        raise UserError(
            f"{present} is set without {', '.join(missing)}; start with {launcher}, which sets them "
            "all, or unset the rest to run as one process"
        )


def _integer(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[0-9]+", environ[name]):
        raise UserError(f"{name}={environ[name]!r} is not a whole number, 0 or more")
    return int(environ[name])


def _master(environ: Mapping[str, str]) -> tuple[str | None, int | None]:
    port = _integer(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else None
    if port is not None and not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is no port; use a free one from 1024 to 65535")
    return environ.get("MASTER_ADDR") or None, port


def listening(port: int = 0) -> socket.socket:
    """A socket of this machine's own processes alone, for a store: torch's listen on every interface.

    Raises OSError where the port is taken.
    """
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def port_of(job: str) -> int:
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]
