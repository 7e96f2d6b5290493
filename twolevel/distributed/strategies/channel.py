"""parallel=channel: the exact dense convolution, its filters split over ranks, at its full price of communication.

Rank p of P holds m/P filters of every convolution and computes on the n/P channels of x that it holds:

                  rank p                                         the link
    forward   start gather of x_p [B, n/P, H, W]  ------------>  x = [x_1 ... x_P]
              y_p = W_p * x   (of every convolution that reads x)

    backward  gx = W_p^T * gy_p, summed over these convolutions
              start scatter  --------------------------------->  gx_p = sum over ranks of gx[p]
              gW_p from gy_p and x                                   |
              wait  <------------------------------------------------+

An activation is gathered once, however many convolutions read it (a block's first convolution and its shortcut). The
gathered x is kept for backward, so that activations take nearly the memory of the whole network. Normalisation,
activation and pooling treat every channel alone and stay local; stem and classifier are split as by `parallelize`.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from twolevel.distributed.batch_norm import synchronise_batch_norm
from twolevel.distributed.collectives import MeshAxis
from twolevel.distributed.layers import GatheringConv2d, become
from twolevel.distributed.mpi_axis import exchange_of
from twolevel.distributed.separable import gathered_together
from twolevel.distributed.shard import check_unshared, cut_channels, whole_layout
from twolevel.distributed.strategies.group import GroupParallel, PlacedReplica
from twolevel.nn import Layout, initialize
from twolevel.nn.layout import channel_dims, set_layout


class ChannelParallel(GroupParallel):
    """As parallel=group, for networks of dense convolutions."""

    parallel = "channel"

    def _place(
        self, network: nn.Module, seed: int, image_shape: tuple[int, int, int], sync_batch_norm: bool
    ) -> PlacedReplica:
        split_channels(
            network,
            self.mesh,
            seed=seed,
            device=self.device,
            sync_batch_norm=sync_batch_norm,
            exchange=self.exchange,
            timeout_s=self.timeout_s,
        )
        return PlacedReplica(self, self._in_memory_format(network))


def split_channels(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    sync_batch_norm: bool = False,
    exchange: str = "auto",
    timeout_s: float = 600,
) -> nn.Module:
    """Keep of `model`, in place, the filters of this rank of the mesh's `group` axis; sets `model.layout`.

    For networks of dense and depthwise convolutions (or group convolutions whose groups the ranks divide) and what
    treats every channel alone, ending in a linear classifier. With `device`, the network is one of the meta device
    and is drawn here from `seed`, layer by layer, with the values of the whole network; `twolevel.nn.initialize`
    must not be called afterwards. `exchange` and `timeout_s` are as in `parallelize`. Every rank must call this.

    Raises UserError, on every rank and before anything is changed, where a module or operation acts across
    channels, or ranks do not divide channels; or as in `exchange_of`.
    """
    whole, ranks = whole_layout(model), mesh["group"].size()
    if ranks == 1:
        set_layout(model, whole)
        if device is not None:
            initialize(model, seed, device)
    else:
        check_unshared(model)
        gathered = gathered_together(model, ranks)
        axis = exchange_of(mesh, exchange, timeout_s)

        def draw(module: nn.Module, name: str) -> None:
            if device is not None:
                initialize(module, seed, device, prefix=name, layout=whole.within(name))

        layout = Layout(whole.groups, channel_dims(model)).part(mesh.get_local_rank("group"), ranks)
        cut_channels(model, layout, axis, draw)
        for convs in gathered:
            _gather_once(convs, axis)
        set_layout(model, layout)
    if sync_batch_norm:
        synchronise_batch_norm(model, mesh)
    return model


def _gather_once(convs: list[nn.Conv2d], axis: MeshAxis) -> None:
    """Have convolutions that read one activation gather it together."""
    members = tuple(become(conv, GatheringConv2d) for conv in convs)
    for conv in members:
        conv.axis = axis
    members[0].together = members
