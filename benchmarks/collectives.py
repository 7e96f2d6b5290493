"""Every collective of a step, counted as it is called, whoever calls it: not what a model says that there are."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.mpi_axis import MPIAxis
from twolevel.distributed.simulation import SimulatedAxis

KINDS = {  # kind, and which argument holds what the rank hands over
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::allgather_": ("all-gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::alltoall_base_": ("reduce-scatter", 1),  # over Gloo; what was received is added up by the package
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("receive", 0),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
    "_c10d_functional::all_reduce_": ("all-reduce", 0),
}
NOTHING = {"_c10d_functional::wait_tensor"}  # begins nothing
BY_METHOD = {  # of an axis that does not call torch.distributed
    "gather": "all-gather",
    "scatter_sum": "reduce-scatter",
    "sum": "all-reduce",
    "all_reduce_": "all-reduce",
}


class Collectives(TorchDispatchMode):
    """Lists kind and bytes handed over of every call that torch.distributed gets from this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional") and op.name() not in NOTHING:
            if op.name() not in KINDS:
                raise NotImplementedError(f"{op.name()} is not in KINDS of benchmarks/collectives.py; add it")
            kind, position = KINDS[op.name()]
            self.seen.append((kind, _bytes(args[position])))
        return op(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[list[tuple[str, int]]]:
    """The collectives of the body: (kind, bytes handed over by this rank), whatever would carry them."""
    with Collectives() as mode:
        patches = [
            mock.patch.object(axis, name, _listed(getattr(axis, name), kind, mode.seen))
            for axis in (MPIAxis, SimulatedAxis)
            for name, kind in BY_METHOD.items()
        ]
        for patch in patches:
            patch.start()
        try:
            yield mode.seen
        finally:
            for patch in patches:
                patch.stop()


def by_kind(seen: list[tuple[str, int]]) -> dict[str, dict[str, int]]:
    """kind -> number and bytes_in, the sum of what this rank handed over."""
    found: dict[str, dict[str, int]] = {}
    for kind, number in seen:
        total = found.setdefault(kind, {"number": 0, "bytes_in": 0})
        total["number"] += 1
        total["bytes_in"] += number
    return found


def sent_by_ring(found: dict[str, dict[str, int]], ranks: int) -> float:
    """Bytes that one rank sends if every collective is bandwidth-optimal (ring), as in `analysis.count`."""
    others = (ranks - 1) / ranks
    share = {
        "all-gather": ranks - 1,  # what it hands over is one part of P
        "reduce-scatter": others,
        "all-reduce": 2 * others,
        "broadcast": others,  # passed on: all but the last rank send it once
        "send": 1,
        "receive": 0,
    }
    return sum(share[kind] * total["bytes_in"] for kind, total in found.items())


def _listed(method, kind: str, seen: list[tuple[str, int]]):
    def call(axis: MeshAxis, tensor: Tensor):
        seen.append((kind, _bytes(tensor)))
        return method(axis, tensor)

    return call


def _bytes(given) -> int:
    """Of a tensor, or of lists of them."""
    if isinstance(given, Tensor):
        return given.numel() * given.element_size()
    return sum(map(_bytes, given))
