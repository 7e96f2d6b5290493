"""What the ways to spread a network over ranks share."""

import torch
from torch import fx, nn
from torch.distributed import DeviceMesh
from torch.nn import functional as F

from twolevel.distributed.batch_norm import SyncedBatchNorm2d
from twolevel.distributed.collectives import MeshAxis
from twolevel.errors import UserError
from twolevel.nn import Layout, initialize
from twolevel.nn.structure import trace_layers


def draw(module: nn.Module, name: str, whole: Layout, seed: int, device: torch.device | str) -> None:
    """Give the module called `name` memory on `device` and the values that the whole network of layout `whole` has.

    A network is so drawn piece by piece, each of which can be cut before the next: no rank ever holds the whole.
    """
    module.layout = whole.within(name)
    try:
        initialize(module, seed, device, prefix=name)
    finally:
        del module.layout


def synchronise_batch_norm(model: nn.Module, mesh: DeviceMesh) -> None:
    """Take batch statistics over the mesh's `data` axis."""
    if mesh["data"].size() == 1:
        return
    axis = MeshAxis(mesh.get_group("data"))
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__, module.axis = SyncedBatchNorm2d, axis


def read_graph(model: nn.Module, parallel: str) -> fx.Graph:
    """The operations of a network that is to be split by `parallel`. Raises UserError where it cannot be read."""
    graph = trace_layers(model, f"by parallel={parallel}", "replicate it with --data-parallel")
    if any(node.target is F.dropout for node in graph.nodes):
        raise UserError(
            f"{type(model).__name__} calls F.dropout, which parallel={parallel} cannot split; use the module nn.Dropout"
        )
    return graph
