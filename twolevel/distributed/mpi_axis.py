"""The exchange over MPI: for ranks on CPUs, whose small tensors Gloo carries much more slowly.

The same ranks, in the same order, as those of the `group` axis; they send each other the same tensors.
"""

import time
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from twolevel.distributed.agreement import together
from twolevel.distributed.collectives import MeshAxis, refuse_second_derivative
from twolevel.distributed.simulation import SimulatedAxis, is_simulated
from twolevel.errors import UserError, unknown
from twolevel.host import usable_cores
from twolevel.launchers import discover
from twolevel.settings import CARRIERS

# How long a rank looks whether an exchange is over before it sleeps. Where ranks share cores: what an exchange takes
# between ranks that are on time, by benchmarks/exchange.py. Where each has its own nobody else wants it, and to be
# woken takes longer than most exchanges; ranks are rarely further apart than this.
POLL_S = 100e-6
POLL_ALONE_S = 1e-3
SLEEP_S = 50e-6
MOST_ITEMS = 2**31 - 1  # of one collective and rank: counts are C ints before MPI 4
SUMMED_IN_FLOAT32 = (torch.bfloat16, torch.float16)  # MPI has no sum of them


def exchange_of(mesh: DeviceMesh, exchange: str, timeout_s: float = 600) -> MeshAxis:
    """What carries the representatives along the mesh's `group` axis; every rank must call it.

    Args:
        exchange: "group", the axis's own process group (NCCL or Gloo); "mpi"; or "auto": MPI where it started
            the ranks and they compute on CPUs, else the process group. Rank 0 warns where "auto" would take
            MPI and cannot. Nothing carries anything where the other ranks are simulated.

    Raises:
        UserError: another `exchange`; "mpi" for a mesh of GPUs, or as in `MPIAxis`.
    """
    if exchange not in CARRIERS:
        raise unknown("exchange", exchange, CARRIERS)
    on_cpus = mesh.device_type == "cpu"
    if exchange == "mpi" and not on_cpus:
        raise UserError(f"exchange=mpi carries CPU tensors, not those of {mesh.device_type}; use group")
    group = mesh.get_group("group")
    if is_simulated(group):
        return SimulatedAxis(group.size())
    if exchange == "mpi":
        return MPIAxis(group, timeout_s)
    if exchange == "auto" and on_cpus and discover().launcher == "mpi":
        try:
            return MPIAxis(group, timeout_s)
        except UserError as error:
            if dist.get_rank() == 0:
                warnings.warn(f"exchange=auto takes group, Gloo, which is slower: {error}", stacklevel=3)
    return MeshAxis(group)


class MPIAxis(MeshAxis):
    """A MeshAxis whose collectives run over mpi4py, on the memory of CPU tensors.

    Numbers of 16 bits are gathered as they are; they are summed in float32 and rounded once, so their sums
    take twice the bytes. The MPI calls come from the threads that call these methods, and from no other.

    Args:
        group: the ranks. The default process group must be that of MPI's world, rank by rank, but for spares.
        timeout_s: how long a rank waits for the others in one collective.

    Raises:
        UserError: on every rank of the world, where mpi4py is missing on one or sees other ranks than torch.
    """

    def __init__(self, group: dist.ProcessGroup, timeout_s: float = 600):
        super().__init__(group)
        self.timeout_s = timeout_s
        alone = discover().local_world_size * torch.get_num_threads() <= len(usable_cores())
        self.poll_s = POLL_ALONE_S if alone else POLL_S
        with together():
            self._mpi = _mpi_of_this_world()
        world = self._mpi.COMM_WORLD
        members = world.Get_group().Incl(dist.get_process_group_ranks(group))
        # A communicator of its own, apart from other users of MPI. It is never freed: that takes all ranks
        # together, and Python drops objects when it likes.
        self._comm = world.Create_group(members)
        members.Free()

    def gather(self, own: Tensor) -> "_InFlight":
        """Start the all-gather `[G/P, ...] -> [G, ...]`."""
        own = _plain(own)
        result = own.new_empty(self.ranks * len(own), *own.shape[1:])
        # As bytes: nothing is computed, so MPI need not know the type.
        sent, received = (_memory(t.view(-1).view(torch.uint8)) for t in (own, result))
        many = own.nbytes > MOST_ITEMS
        item = self._item_of(own.nbytes) if many else self._mpi.BYTE
        request = self._comm.Iallgather([sent, item], [received, item])
        if many:
            item.Free()  # once the request is done
        return _InFlight(request, own, result, own.dtype, self, "all-gather")

    def scatter_sum(self, parts: Tensor) -> "_InFlight":
        """Start the reduce-scatter `[G, ...] -> [G/P, ...]`."""
        refuse_second_derivative(parts)
        wide = _widened(_plain(parts))
        result = wide.new_empty(len(parts) // self.ranks, *parts.shape[1:])
        _check_count(result)
        request = self._comm.Ireduce_scatter_block(_memory(wide), _memory(result), self._mpi.SUM)
        return _InFlight(request, wide, result, parts.dtype, self, "reduce-scatter")

    def sum(self, own: Tensor) -> "_InFlight":
        """Start the sum over ranks, in the memory of `own`, which is contiguous, unless that is of 16 bits."""
        refuse_second_derivative(own)
        return self._start_sum(own.detach())

    def all_reduce_(self, tensor: Tensor) -> None:
        """The sum over ranks, in place and without a gradient; `tensor` is contiguous."""
        plain = tensor.detach()
        total = self._start_sum(plain).wait()
        if total is not plain:
            plain.copy_(total)

    def _start_sum(self, plain: Tensor) -> "_InFlight":
        wide = _widened(plain)
        _check_count(wide)
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, _memory(wide), self._mpi.SUM)
        return _InFlight(request, wide, wide, plain.dtype, self, "all-reduce")

    def _item_of(self, size: int) -> Any:
        """An MPI type whose one item is so many bytes."""
        blocks, rest = divmod(size, MOST_ITEMS)
        block = self._mpi.BYTE.Create_contiguous(MOST_ITEMS)
        types = [block, self._mpi.BYTE]
        item = self._mpi.Datatype.Create_struct([blocks, rest], [0, blocks * MOST_ITEMS], types).Commit()
        block.Free()
        return item


class _InFlight(NamedTuple):
    """A collective that reads `sent` and writes `result`, which is returned as `dtype`.

    It holds both tensors until then, because a request of mpi4py does not always.
    """

    request: Any  # of mpi4py
    sent: Tensor
    result: Tensor
    dtype: torch.dtype
    axis: MPIAxis
    what: str

    def wait(self) -> Tensor:
        # Not MPI's own wait: it has no end, where a peer has failed, and it keeps the core busy, which costs
        # whoever else needs one.
        began = time.perf_counter()
        while not self.request.Test():
            waited = time.perf_counter() - began
            if waited > self.axis.timeout_s:
                raise RuntimeError(
                    f"an exchange over MPI was not over after timeout={self.axis.timeout_s:g} s; look for a rank "
                    "that failed or is late"
                )
            if waited > self.axis.poll_s:
                time.sleep(SLEEP_S)
        self.axis.waited += time.perf_counter() - began
        return self.result.to(self.dtype)


def _mpi_of_this_world() -> Any:
    """The module mpi4py.MPI, whose world begins with the default process group, rank by rank; the rest are spares."""
    try:
        from mpi4py import MPI  # an extra; and the import calls MPI_Init
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is here, its MPI is not
        what = str(error).split("\n", 1)[0]
        raise UserError(
            f"exchange=mpi needs mpi4py ({what}); pip install twolevel[mpi], or use group"
        ) from error
    world = MPI.COMM_WORLD
    seen, rank, size = (world.Get_rank(), world.Get_size()), dist.get_rank(), dist.get_world_size()
    # Those of MPI's ranks beyond the process group that mpirun started are spares.
    spares = discover().world_size - size if discover().launcher == "mpi" else 0
    if seen != (rank, size + max(spares, 0)):
        raise UserError(
            f"exchange=mpi, but MPI sees rank {seen[0]} of {seen[1]} in what is rank {rank} of {size}; "
            "start the ranks with mpirun, or use group"
        )
    return MPI


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous and without a gradient."""
    return tensor.detach().contiguous()


def _widened(tensor: Tensor) -> Tensor:
    """In a type that MPI can sum."""
    return tensor.float() if tensor.dtype in SUMMED_IN_FLOAT32 else tensor


def _check_count(total: Tensor) -> None:
    if total.numel() > MOST_ITEMS:
        raise UserError(
            f"exchange=mpi adds up {MOST_ITEMS} numbers a rank at most, not {total.numel()}; use group"
        )


def _memory(tensor: Tensor) -> np.ndarray:
    """The numbers of a contiguous CPU tensor as a NumPy array, not copied."""
    if tensor.device.type != "cpu":
        raise UserError(f"exchange=mpi carries CPU tensors, not one on {tensor.device}; use group")
    return tensor.numpy()
